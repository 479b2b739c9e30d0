"""Mini-ImageNet's program as a user runs it: runs, interruptions and tests of a checkpoint."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import ROOT, fails, load, metrics, run
from test_mimgnet import clusters

main, model, dataloader = (load("mimgnet", name) for name in ("main", "model", "dataloader"))
# Enough steps to be killed in, and every part that a resumed run must bring back.
TINY = (
    "--images-per-class 20 --device cpu --precision fp32 --hidden-size 16 --latent-size 4 --batch-size 4 "
    "--train-iters 400 --freq-iters 100 "
    "--train-mc-sample-size 4 --test-mc-sample-size 4 --eval-episodes 20 --query 4 --test-shot 1 5 "
    "--ema-decay 0.99 --kl-warmup-iters 200 "
    "--lr 1e-3 --lr-schedule cosine"
).split()


def save_features(folder, width=32, per_class=20):
    for seed, (split, classes) in enumerate((("train", 12), ("val", 6), ("test", 22))):
        np.save(
            folder / f"{split}_features.npy",
            clusters(seed, classes, per_class, width, noise=0.3).flatten(0, 1).numpy(),
        )
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_features(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The folder of a run that was never interrupted, made by a copy of the experiment's folder alone."""
    alone = shutil.copytree(
        ROOT / "mimgnet",
        tmp_path_factory.mktemp("copy") / "mimgnet",
        ignore=shutil.ignore_patterns("runs", "__pycache__"),
    )
    folder = tmp_path_factory.mktemp("runs") / "finished"
    result = run(alone, "--data-dir", data, "--save-dir", folder, *TINY)
    assert result.returncode == 0, result.stderr
    assert "5way1shot" in result.stdout and "5way5shot" in result.stdout
    return folder


def same(a, b):
    """Whether two checkpoints hold the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a if name != "seconds")
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_outputs(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "last.pt", "best.pt", "test.json", "tb_log"}
    assert [line["step"] for line in metrics(finished)] == [100, 200, 300, 400]
    table = json.loads((finished / "test.json").read_text())
    assert table.keys() == {"5way1shot", "5way5shot"} and table["5way1shot"].keys() == {
        "accuracy", "ci95", "episodes", "accuracies",
    }  # fmt: skip
    config = json.loads((finished / "config.json").read_text())
    assert (
        config["args"]["ema_decay"] == 0.99
        and config["precision"] == "fp32"
        and config["versions"]["torch"] == torch.__version__
    )
    best = torch.load(finished / "best.pt", weights_only=True)
    sizes = {"feature_size": 32, "hidden_size": 16, "latent_size": 4, "set_attention": True}
    assert best["sizes"] == sizes | {"signed": False}
    scores = [line["5way1shot"]["accuracy"] for line in metrics(finished)]
    assert best["step"] == 100 * (1 + scores.index(max(scores)))


def test_validation_is_of_the_averaged_weights_and_repeatable(data, finished):
    last = torch.load(finished / "last.pt", weights_only=True)
    args, val = main.parse_args(TINY), dataloader.load_split(data, "val", 20)
    scores = []
    for weights in (last["average"], last["model"]):
        network = model.GMVAE(**last["sizes"])
        network.load_state_dict(weights)
        scores.append(
            main.summary(main.evaluate_split(network, val, [5], [1], main.VALIDATION_SEED, args)["5way1shot"])
        )
    assert scores[0] == metrics(finished)[-1]["5way1shot"] != scores[1]


def start_and_stop(data, folder, how, *flags):
    """Starts a run, sends the signal `how` once its metrics have changed, and returns its exit status."""
    seen = (folder / "metrics.jsonl").read_text() if folder.exists() else None
    command = [sys.executable, "main.py", "--data-dir", str(data), "--save-dir", str(folder), *TINY, *flags]
    process = subprocess.Popen(
        command, cwd=ROOT / "mimgnet", stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while process.poll() is None:
            if (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").read_text() != seen:
                process.send_signal(how)
                return process.wait(timeout=120)
            time.sleep(0.001)
        return process.returncode
    finally:
        process.kill()


def test_stopped_killed_and_resumed_is_the_same_run(data, finished, tmp_path):
    folder = tmp_path / "run"
    assert start_and_stop(data, folder, signal.SIGTERM) == 128 + signal.SIGTERM
    assert start_and_stop(data, folder, signal.SIGKILL, "--resume") == -signal.SIGKILL
    assert torch.load(folder / "last.pt", weights_only=True)["step"] < 400
    result = run("mimgnet", "--data-dir", data, "--save-dir", folder, *TINY, "--resume")
    assert result.returncode == 0, result.stderr
    assert metrics(folder) == metrics(finished)
    for name in ("last.pt", "best.pt"):
        assert same(*(torch.load(place / name, weights_only=True) for place in (folder, finished))), name
    assert (folder / "test.json").read_text() == (finished / "test.json").read_text()


def test_eval_only_of_the_run_and_of_a_checkpoint_at_another_way(data, finished, tmp_path):
    result = run(
        "mimgnet", "--data-dir", data, "--save-dir", tmp_path / "again", *TINY, "--eval-only",
        "--checkpoint", finished,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "again" / "test.json").read_text() == (finished / "test.json").read_text()

    flags = [
        "--eval-only", "--checkpoint", finished / "best.pt", "--test-way", "5", "20", "--e-step", "learned",
        "--test-shot", "1", "16",
    ]  # fmt: skip
    os.remove(save_features(tmp_path) / "train_features.npy")  # a test needs only the test split
    result = run("mimgnet", "--data-dir", tmp_path, "--save-dir", tmp_path / "test", *TINY, *flags)
    assert result.returncode == 0, result.stderr
    table = json.loads((tmp_path / "test" / "test.json").read_text())
    assert table.keys() == {"5way1shot", "5way16shot", "20way1shot", "20way16shot"}
    assert table["20way16shot"]["accuracy"] > 1.5 * 100 / 20


def test_a_finished_run_is_tested_again_on_other_data(data, finished, tmp_path, monkeypatch):
    """No earlier test.json stands beside its new config.json, even if the test is interrupted."""
    folder, other = (shutil.copytree(place, tmp_path / place.name) for place in (finished, data))
    np.save(other / "test_features.npy", np.load(data / "test_features.npy") + 1)
    seen = []
    monkeypatch.setattr(main, "test", lambda *_: seen.append((folder / "test.json").exists()))
    flags = ["--data-dir", other, "--save-dir", folder, *TINY, "--resume"]
    monkeypatch.setattr(sys, "argv", ["main.py", *map(str, flags)])
    main.main()
    before, after = (json.loads((of / "config.json").read_text())["data"] for of in (finished, folder))
    assert seen == [False] and before["train"] == after["train"] and before["test"] != after["test"]


@pytest.fixture
def refused(capsys, monkeypatch):
    """Calls the program in this process: a subprocess a mistake would cost seconds each, and any other
    exception fails the test."""

    def call(*args, words):
        monkeypatch.setattr(sys, "argv", ["main.py", *map(str, args)])
        monkeypatch.setattr(load("mimgnet", "machine"), "keep_memory", lambda: None)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main.main()
        result = SimpleNamespace(returncode=stop.value.code, stderr=capsys.readouterr().err)
        fails(result, "main.py: error: ", *words)
        assert result.stderr.startswith("main.py: error: ")

    return call


def test_a_folder_with_another_run_is_kept(data, finished, tmp_path, refused):
    folder = shutil.copytree(finished, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    start = ["--data-dir", data, "--save-dir", folder, *TINY]
    refused(*start, words=[folder, "--resume"])
    refused(*start, "--resume", "--lr", 0.5, words=["--lr: 0.5 found, 0.001 expected"])
    longer = "--train-iters", 500  # of a cosine
    refused(*start, "--resume", *longer, words=["--train-iters: 500 found, 400 expected"])
    refused(*start, "--eval-only", "--checkpoint", finished / "best.pt", words=["holds a training run"])
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    other = tmp_path / "wider"
    other.mkdir()
    refused(
        "--data-dir", save_features(other, width=36), *start[2:], "--resume",
        words=["--data-dir", "[12, 20, 36]", "[12, 20, 32]"],
    )  # fmt: skip
    np.save(other / "train_features.npy", np.load(data / "train_features.npy") + 1)
    for split in ("val", "test"):
        shutil.copy(data / f"{split}_features.npy", other)
    refused("--data-dir", other, *start[2:], "--resume", words=["--data-dir: train data", "crc32"])
