"""Mini-ImageNet's program as a user runs it: runs, interruptions, tests of a checkpoint, and every
mistake."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import ROOT, fails, load, run
from test_mimgnet import clusters

main, model, dataloader = (load("mimgnet", name) for name in ("main", "model", "dataloader"))
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # tensors this small lose more to a second thread than they gain
# Enough steps to be killed in, and every part that a resumed run must bring back.
TINY = (
    "--images-per-class 20 --device cpu --precision fp32 --hidden-size 16 --latent-size 4 --batch-size 4 "
    "--train-iters 400 --freq-iters 100 "
    "--train-mc-sample-size 4 --test-mc-sample-size 4 --eval-episodes 20 --query 4 --test-shot 1 5 "
    "--ema-decay 0.99 --kl-warmup-iters 200 "
    "--lr 1e-3 --lr-schedule cosine"
).split()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def metrics(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


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
    assert best["sizes"] == {"feature_size": 32, "hidden_size": 16, "latent_size": 4, "set_attention": True}
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
        command, cwd=ROOT / "mimgnet", env=os.environ | ONE_THREAD, stdout=subprocess.DEVNULL,
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


def test_what_simclr_says_of_the_features(data, tmp_path, refused):
    """features.json gives the images of a class, each split its own, and stays in the run's config; damaged
    or denied, it is an error."""
    folder = shutil.copytree(data, tmp_path / "features")
    np.save(folder / "test_features.npy", np.load(data / "test_features.npy")[: 10 * 40])
    description = {
        "train_epochs": 9,
        "encoder_crc32": 5,
        "images_per_class": {"train": 20, "val": 20, "test": 40},
    }
    (folder / "features.json").write_text(json.dumps(description))
    assert TINY[:2] == ["--images-per-class", "20"]
    flags = TINY[2:]
    result = run(
        "mimgnet", "--data-dir", folder, "--save-dir", tmp_path / "run", *flags, "--train-iters", 2,
        "--test-shot", 30,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run/config.json").read_text())["features"] == description
    start = ["--data-dir", folder, "--save-dir", tmp_path / "new", *flags]
    (folder / "features.json").write_text(json.dumps(description | {"train_epochs": 400}))
    refused(
        *start, "--eval-only", "--checkpoint", tmp_path / "run",
        words=["features.json", "400 epochs of SimCLR", "9 expected"],
    )  # fmt: skip
    (folder / "features.json").write_text(json.dumps(description | {"encoder_crc32": 6}))
    refused(
        *start, "--eval-only", "--checkpoint", tmp_path / "run",
        words=["features.json", "6 as the encoder's checksum", "5 expected"],
    )  # fmt: skip
    refused(*start, "--images-per-class", 20, words=["--images-per-class: 20 found, 40 expected"])
    for text in (
        "{",
        "{}",
        '{"images_per_class": {"train": 0}}',
        '{"images_per_class": 600}',
        '{"images_per_class": {}, "crc32": 5}',
    ):
        (folder / "features.json").write_text(text)
        refused(*start, words=["features.json: not readable"])
    (folder / "features.json").unlink()
    (folder / "features.json").mkdir()
    refused(*start, words=["features.json: not readable"])
    assert not (tmp_path / "new").exists()


def test_features_that_features_json_does_not_describe(data, tmp_path, refused):
    folder = shutil.copytree(data, tmp_path / "features")
    sums = {
        split: zlib.crc32(np.load(folder / f"{split}_features.npy")) for split in ("train", "val", "test")
    }
    counts = {"train": 20, "val": 20, "test": 20}
    (folder / "features.json").write_text(
        json.dumps({"train_epochs": 9, "images_per_class": counts, "crc32": sums})
    )
    assert dataloader.load_split(folder, "val", 20, sums["val"]).shape == (6, 20, 32)
    for split in sums:
        kept = np.load(folder / f"{split}_features.npy")
        np.save(folder / f"{split}_features.npy", kept * np.float32(0.5))
        words = [
            f"{split}_features.npy",
            "checksum",
            f"{sums[split]} expected, as features.json beside it says",
        ]
        refused("--data-dir", folder, "--save-dir", tmp_path / "run", *TINY, words=words)
        np.save(folder / f"{split}_features.npy", kept)
    assert not (tmp_path / "run").exists()


def test_copies_with_other_last_bits_and_features_in_disorder(data, tmp_path, refused, capsys):
    folder = shutil.copytree(data, tmp_path / "features")
    val = np.load(data / "val_features.npy")
    copies = np.concatenate([val * np.float32(1 + 1e-6), np.load(data / "test_features.npy")[len(val) :]])
    np.save(folder / "test_features.npy", copies)
    flags = ["--data-dir", folder, "--save-dir", tmp_path / "run", *TINY]
    refused(*flags, words=["images of val found in test too"])
    args = main.parse_args([*map(str, flags), "--data-dir", str(data)])
    capsys.readouterr()
    dataloader.load_splits(args, {})
    assert not capsys.readouterr().out
    swapped = np.load(data / "test_features.npy").reshape(22, 20, 32).swapaxes(0, 1)
    np.save(folder / "test_features.npy", swapped.reshape(-1, 32))
    args.data_dir = folder
    dataloader.load_splits(args, {})
    assert "test_features.npy: images of a class are no more alike than others" in capsys.readouterr().out


def test_training_features_need_no_classes(data, tmp_path):
    """Training draws from all images: a number that no class divides will do."""
    folder = shutil.copytree(data, tmp_path / "features")
    np.save(folder / "train_features.npy", np.load(data / "train_features.npy")[:-1])
    result = run("mimgnet", "--data-dir", folder, "--save-dir", tmp_path / "run", *TINY, "--train-iters", 2)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run/config.json").read_text())["data"]["train"]["shape"] == [1, 239, 32]
    with pytest.raises(
        dataloader.UserError, match="239 images, expected a multiple of --images-per-class 20"
    ):
        np.save(folder / "val_features.npy", np.load(folder / "train_features.npy"))
        dataloader.load_split(folder, "val", 20)


def test_any_width(tmp_path):
    result = run(
        "mimgnet", "--data-dir", save_features(tmp_path, width=31), "--save-dir", tmp_path / "run", *TINY,
        "--train-iters", 2,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


# --- mistakes -------------------------------------------------------------------------------------


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


def with_value(value):
    def change(array):
        array = array.astype(np.float64)
        array[3, 2] = value
        return array

    return change


BAD_FILES = {
    "three dimensions": (lambda a: a.reshape(-1, 20, 32), "(12, 20, 32)"),
    "empty": (lambda a: a[:0], "(0, 32)"),
    "integers": (lambda a: a.astype(np.int64), "int64"),
    "complex": (lambda a: a.astype(np.complex64), "complex64"),
    "pickled objects": (lambda a: a.astype(object), "not a readable .npy array"),
    "width of the others": (lambda a: a[:, :28], "expected 28"),
    "NaN": (with_value(np.nan), "1 images with NaN"),
    "infinite": (with_value(-np.inf), "1 images with NaN"),
    "negative": (with_value(-1.0), "down to -1.0 found, none below zero"),
    "beyond float32": (with_value(1e200), "1 images with NaN"),
    "too few for a step": (
        lambda a: a[:0:-1][:20],
        "20 images found, at least --batch-size x --sample-size = 40 expected",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_features(case, data, tmp_path, refused):
    change, words = BAD_FILES[case]
    for split in ("val", "test"):
        shutil.copy(data / f"{split}_features.npy", tmp_path)
    np.save(tmp_path / "train_features.npy", change(np.load(data / "train_features.npy")), allow_pickle=True)
    refused(
        "--data-dir", tmp_path, "--save-dir", tmp_path / "run", *TINY, "--batch-size", 8,
        words=["train_features.npy", words],
    )  # fmt: skip
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["missing", "text", "cut", "npz", "no header"])
def test_unreadable_features(damage, data, tmp_path, refused):
    for split in ("train", "val", "test"):
        shutil.copy(data / f"{split}_features.npy", tmp_path)
    path = tmp_path / "val_features.npy"
    if damage == "missing":
        path.unlink()
    elif damage == "npz":
        with path.open("wb") as file:
            np.savez(file, features=np.zeros((40, 32)))
    else:
        path.write_bytes(
            {"text": b"no,array\n1,2\n", "cut": path.read_bytes()[:-100], "no header": b""}[damage]
        )
    refused("--data-dir", tmp_path, "--save-dir", tmp_path / "run", *TINY, words=["val_features.npy"])
    assert not (tmp_path / "run").exists()


BAD_FLAGS = {
    "--way 7": "val_features.npy: 6 classes, expected at least 7",
    "--test-way 5 23": "test_features.npy: 22 classes, expected at least 23",
    "--shot 17": "val_features.npy: 20 images a class, expected at least 21 (shot 17 + query 4)",
    "--test-shot 1 17": "test_features.npy: 20 images a class, expected at least 21",
    "--query 20": "expected at least",
    "--way 6 --sample-size 1 --train-mc-sample-size 4": "--way: 6 found",
    "--images-per-class 600": "multiple of --images-per-class 600",
    "--images-per-class 0": "--images-per-class: 0 found",
    "--shot x": "--shot: x found, an integer",
    "--lr -1": "--lr: -1 found",
    "--ema-decay 1": "below 1",
    "--device nowhere": "--device: nowhere found",
    "--device meta": "--device: meta found",
    "--precision fp16": "--precision",
    "--sample 3": "unrecognized arguments",
    "--checkpoint some.pt": "--checkpoint goes with --eval-only",
    "--eval-only --checkpoint nowhere.pt": "nowhere.pt: not found",
    "--eval-only": "--eval-only: no --checkpoint found",
    "--eval-only --checkpoint .": "best.pt: not found",
    "--seed 99999999999999999999": "--seed: 99999999999999999999 found",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags(flags, data, tmp_path, refused):
    refused(
        "--data-dir", data, "--save-dir", tmp_path / "run", *TINY, *flags.split(), words=[BAD_FLAGS[flags]]
    )


def test_foreign_and_damaged_checkpoints(data, tmp_path, refused):
    path = tmp_path / "some.pt"
    other = load("omniglot", "model").GMVAE(4, 4)
    wide = model.GMVAE(36, 16, 4)
    for content, words in (
        ({"model": other.state_dict(), "sizes": other.sizes}, "some.pt: not a checkpoint of this experiment"),
        (
            {"model": wide.state_dict(), "sizes": wide.sizes},
            "test_features.npy: 32 features an image, expected 36 as in",
        ),
        (
            {"model": wide.state_dict(), "sizes": {**wide.sizes, "latent_size": 5}},
            "some.pt: not a checkpoint of this experiment",
        ),
        ([1, 2], "some.pt: not a checkpoint"),
        (torch.zeros(3), "some.pt: not a checkpoint"),
        (None, "some.pt: not a readable checkpoint"),
    ):
        path.write_bytes(b"damaged") if content is None else torch.save(content, path)
        refused(
            "--data-dir", data, "--save-dir", tmp_path / "run", *TINY, "--eval-only", "--checkpoint", path,
            words=[words],
        )  # fmt: skip
    assert not (tmp_path / "run" / "test.json").exists()


def test_a_folder_with_another_run_is_kept(data, finished, tmp_path, refused):
    folder = shutil.copytree(finished, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    start = ["--data-dir", data, "--save-dir", folder, *TINY]
    refused(*start, words=[folder, "--resume"])
    refused(*start, "--resume", "--lr", 0.5, words=["--lr: 0.5 found, 0.001 expected"])
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


def test_the_program_itself_says_it_in_one_line(data, tmp_path):
    """As the user sees it: a loss that overflows after the run has begun, and a mistake before."""
    for split in ("train", "val", "test"):
        np.save(
            tmp_path / f"{split}_features.npy", np.load(data / f"{split}_features.npy") * np.float32(1e25)
        )
    result = run("mimgnet", "--data-dir", tmp_path, "--save-dir", tmp_path / "run", *TINY)
    fails(
        result, "main.py: error: step 1: the loss is not finite", "reconstruction", "kl", "features up to ",
        "e+25 found", "divide",
    )  # fmt: skip
    result = run("mimgnet", "--data-dir", tmp_path / "nowhere", "--save-dir", tmp_path / "new", *TINY)
    fails(result, "main.py: error: ", "train_features.npy: not found")
