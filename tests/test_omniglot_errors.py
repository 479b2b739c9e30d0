"""What a user of the Omniglot program can do wrong ends in one line."""

import json
import re
import math
import shutil

import numpy as np
import pytest
import torch

from conftest import fails, load, run
from test_omniglot_cli import TINY, start, wait_for
from test_omniglot_cli import whole_run  # noqa: F401


def test_a_folder_with_another_run_is_refused(whole_run):
    folder, flags, _ = whole_run
    before = (folder / "last.pt").read_bytes()
    fails(run("omniglot", "--save-dir", folder, *flags), folder, "holds another run", "--resume")
    fails(
        run("omniglot", "--save-dir", folder, *flags, "--resume", "--lr", "0.5"), "--lr", "0.5 found",
        "0.001 expected",
    )  # fmt: skip
    other = "--resume", "--e-step", "tied"  # validations are compared
    fails(run("omniglot", "--save-dir", folder, *flags, *other), "--e-step: tied found, unit expected")
    precision = json.loads((folder / "config.json").read_text())["precision"]
    other = "fp32" if precision == "bf16" else "bf16"
    fails(
        run("omniglot", "--save-dir", folder, *flags, "--resume", "--precision", other),
        "--precision",
        f"{other} found",
        f"{precision} expected",
    )
    checkpoint = folder / "1shot_best.pt"
    fails(
        run("omniglot", "--save-dir", folder, *flags, "--eval-only", "--checkpoint", checkpoint),
        "--save-dir",
        "holds a training run",
        "another folder expected",
    )
    assert (folder / "last.pt").read_bytes() == before


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--way", "0"], ["--way", "0 found", "at least 1"]),
        (["--lr", "nan"], ["--lr", "nan found"]),
        (["--ema-decay", "1"], ["--ema-decay", "below 1"]),
        (["--device", "cuda:99"], ["--device", "cuda:99 found"]),
        (["--device", "toaster"], ["--device", "toaster found"]),
        (["--device", "meta"], ["--device", "meta found", "cpu"]),
        (["--checkpoint", "x.pt"], ["--checkpoint", "--eval-only"]),
        (["--eval-only"], ["--eval-only", "--checkpoint"]),
        (["--eval-only", "--checkpoint", "x.pt", "--way", "20"], ["--way", "--test-way"]),
        (["--eval-only", "--checkpoint", "x.pt", "--resume"], ["--resume", "--eval-only"]),
        (["--latent-size", "99999999999999999999"], ["--latent-size", "below"]),
        (["--seed", "99999999999999999999"], ["--seed", "below"]),
        (["--way", "26", "--test-way", "5"], ["val.npy", "25 classes", "26"]),
        (["--test-way", "5", "40"], ["test.npy", "25 classes", "40"]),
        (["--test-shot", "6"], ["test.npy", "20 drawings", "21"]),
        (["--query", "16"], ["20 drawings", "21"]),
        (["--sample-size", "2000"], ["train.npy", "1200 images", "4000"]),
        (["--sample-size", "2", "--train-mc-sample-size", "2"], ["--way", "5 found", "4"]),
        (["--no-such-flag"], ["--no-such-flag"]),
    ],
)
def test_wrong_flags(glyphs_dir, tmp_path, flags, words):
    fails(run("omniglot", "--data-dir", glyphs_dir, "--save-dir", tmp_path / "run", *TINY, *flags), *words)
    assert not (tmp_path / "run").exists()


def test_missing_and_wrong_data(glyphs_dir, tmp_path):
    fails(run("omniglot", "--data-dir", tmp_path, "--save-dir", tmp_path / "run"), "train.npy", "not found")
    for name in ("train", "val", "test"):
        (tmp_path / f"{name}.npy").write_bytes((glyphs_dir / f"{name}.npy").read_bytes())
    np.save(tmp_path / "val.npy", np.zeros((30, 20, 28, 28), np.uint8))
    fails(
        run("omniglot", "--data-dir", tmp_path, "--save-dir", tmp_path / "run"),
        "val.npy",
        "(30, 20, 28, 28)",
        "(classes, drawings, 28, 28, 1)",
    )
    shutil.copy(tmp_path / "test.npy", tmp_path / "val.npy")
    result = run("omniglot", "--data-dir", tmp_path, "--save-dir", tmp_path / "run", "--debug")
    fails(result, "images of val found in test too")
    assert not (tmp_path / "run").exists()


def test_a_save_dir_that_cannot_be_made(glyphs_dir, tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file/run", tmp_path / ("x" * 300)):
        fails(run("omniglot", "--data-dir", glyphs_dir, "--save-dir", place, *TINY), place)


def test_wrong_checkpoints(glyphs_dir, tmp_path):
    flags = [
        "--data-dir", glyphs_dir, "--save-dir", tmp_path / "run", "--eval-only", "--eval-episodes", 2,
        "--checkpoint",
    ]  # fmt: skip
    fails(run("omniglot", *flags, tmp_path / "none.pt"), "none.pt", "not found")
    (tmp_path / "text.pt").write_text("hello")
    fails(run("omniglot", *flags, tmp_path / "text.pt"), "text.pt", "not a readable checkpoint")
    torch.save({"model": {}, "sizes": {"hidden_size": 8, "latent_size": 8}}, tmp_path / "empty.pt")
    fails(run("omniglot", *flags, tmp_path / "empty.pt"), "empty.pt", "not a checkpoint of this experiment")
    network = load("omniglot", "model").GMVAE(hidden_size=8, latent_size=8)
    torch.nn.init.constant_(network.set_network[2].bias, math.nan)
    torch.save({"model": network.state_dict(), "sizes": network.sizes}, tmp_path / "nan.pt")
    fails(run("omniglot", *flags, tmp_path / "nan.pt"), "nan.pt", "NaN")
    assert not (tmp_path / "run").exists()


def test_a_damaged_run_is_not_resumed(whole_run, tmp_path):
    folder, flags, _ = whole_run
    unreadable = "not a readable checkpoint"
    for name, content, words in (
        ("config.json", b"{", "not readable"),
        ("last.pt", b"PK", unreadable),
        ("last.pt", b"", unreadable),
    ):
        copy = tmp_path / f"{name} of {len(content)} bytes"
        shutil.copytree(folder, copy)
        (copy / name).write_bytes(content)
        fails(run("omniglot", "--save-dir", copy, *flags, "--resume"), name, words)
    torch.save({"step": 3}, copy / "last.pt")
    config = (copy / "config.json").read_text()
    fails(run("omniglot", "--save-dir", copy, *flags, "--resume"), "last.pt", "not a checkpoint of this run")
    assert (copy / "config.json").read_text() == config
    (copy / "config.json").rename(tmp_path / "aside")
    fails(run("omniglot", "--save-dir", copy, *flags, "--resume"), copy, "config.json: not found")
    (tmp_path / "aside").rename(copy / "config.json")
    (
        copy / "last.pt"
    ).unlink()  # as in results/, where it is too large to keep: to start again would overwrite them
    before = {path: path.read_bytes() for path in copy.iterdir() if path.is_file()}
    fails(run("omniglot", "--save-dir", copy, *flags, "--resume"), "last.pt", "not found")
    assert before == {path: path.read_bytes() for path in copy.iterdir() if path.is_file()}


def test_a_loss_that_is_not_finite_stops_the_run(glyphs_dir, tmp_path):
    flags = [
        "--data-dir", glyphs_dir, "--save-dir", tmp_path / "run", *TINY, "--train-iters", 60, "--freq-iters",
        5,
    ]  # fmt: skip
    result = run("omniglot", *flags, "--lr", "1e12")
    fails(result, "step ", "not finite", "reconstruction", "kl")


def test_a_folder_is_written_by_one_process_alone(glyphs_dir, tmp_path):
    folder, flags = (
        tmp_path / "run",
        ["--data-dir", glyphs_dir, *TINY, "--train-iters", 10**6, "--freq-iters", 10**6],
    )
    first = start(folder, flags)
    try:
        wait_for(folder / "tb_log", first)
        for again in ([], ["--resume"]):
            fails(run("omniglot", "--save-dir", folder, *flags, *again), folder, "written by another process")
    finally:
        first.kill()
        first.communicate()
    result = run(
        "omniglot", "--save-dir", folder, "--data-dir", glyphs_dir, *TINY, "--train-iters", 1
    )  # free again, and without a checkpoint
    assert result.returncode == 0, result.stderr


def test_an_interrupted_test_leaves_no_numbers_of_another(whole_run, glyphs_dir, tmp_path):
    folder, _, _ = whole_run
    flags = [
        "--data-dir", glyphs_dir, "--save-dir", tmp_path / "eval", "--eval-only", "--checkpoint", folder,
        "--eval-episodes", 2,
    ]  # fmt: skip
    assert run("omniglot", *flags).returncode == 0 and (tmp_path / "eval/test.json").exists()
    interrupted = "import evaluate, main\ndef stop(*args): raise KeyboardInterrupt\n"
    interrupted += "evaluate.evaluate = stop\nmain.main()"
    assert run("omniglot", interrupted, *flags, "--e-step", "learned", script="-c").returncode == 130
    assert {path.name for path in (tmp_path / "eval").iterdir()} == {"config.json"}


@pytest.mark.parametrize("encoding", ["ascii", "cp874", "iso-8859-2"])
def test_a_log_in_an_encoding_without_some_sign_ends_no_run(encoding, glyphs_dir, tmp_path):
    flags = ["--data-dir=~", "--save-dir", tmp_path / "run", *TINY, "--train-iters", 1, "--eval-episodes", 2]
    result = run("omniglot", *flags, env={"PYTHONIOENCODING": encoding, "HOME": str(glyphs_dir)})
    assert result.returncode == 0, result.stderr
    assert re.search(r"5way1shot +[\d.]+ \? [\d.]+", result.stdout) and (tmp_path / "run/test.json").exists()
    assert re.match(r".*threads, training in (fp32|bf16), tests with --e-step unit\n", result.stdout)


def test_too_large_a_step_leaves_the_folder_free(glyphs_dir, tmp_path):
    flags = [
        "--data-dir", glyphs_dir, "--save-dir", tmp_path / "run", *TINY, "--train-iters", 1, "--device",
        "cpu",
    ]  # fmt: skip
    fails(run("omniglot", *flags, "--train-mc-sample-size", 2 * 10**9), "not enough memory")
    result = run("omniglot", *flags)
    assert result.returncode == 0, result.stderr


def test_compile_without_a_compiler(glyphs_dir, tmp_path):
    flags = ["--data-dir", glyphs_dir, "--save-dir", tmp_path / "run", *TINY, "--compile"]
    nothing = {
        "CXX": "none",
        "TORCHINDUCTOR_CACHE_DIR": tmp_path / "cache",
    }  # neither a compiler nor what it made before
    fails(run("omniglot", *flags, env=nothing), "--compile", "C++ compiler")
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_resumed_on_other_images(whole_run, glyphs_dir, tmp_path):
    folder, flags, _ = whole_run
    for name in ("train", "val", "test"):
        np.save(tmp_path / f"{name}.npy", np.load(glyphs_dir / f"{name}.npy")[:, :, ::-1])
    fails(
        run("omniglot", "--save-dir", folder, *flags, "--resume", "--data-dir", tmp_path),
        "--data-dir: ",
        " data of ",
        "crc32",
    )
