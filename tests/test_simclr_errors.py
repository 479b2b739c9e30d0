"""What a user of the SimCLR program can get wrong ends in one line."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import fails, load, run
from test_simclr_cli import TINY, model
from test_simclr_cli import data_dir, source_dir, whole_run  # noqa: F401


def fails_here(capsys, monkeypatch, words, *args):
    """As `fails`, in this process: the import of torch would be most of a run."""
    main = load("simclr", "main")
    monkeypatch.setattr(sys, "argv", ["main.py", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        main.main()
    fails(SimpleNamespace(returncode=end.value.code, stderr=capsys.readouterr().err), *words)


@pytest.mark.parametrize("words, flags", [
    (["--device", "nonsense"], ["--device", "nonsense"]),
    (["--batch-size", "1 found"], ["--batch-size", 1]),
    (["--view-size", "63 found"], ["--view-size", 63]),
    (["--lr", "-1"], ["--lr=-1"]),
    (["--temperature"], ["--temperature", 0]),
    (["--views: 4 found, 2 expected for --loss nt-xent"], ["--views", 4]),
    (["--views", "1 found"], ["--loss", "prototypical", "--views", 1]),
    (["--views: 3 found, an even"], ["--loss", "prototypical", "--views", 3, "--neighbours", 1]),
    (["--neighbours: 24 found, fewer than the 24 images"], ["--neighbours", 24]),
    (["--crop-scale", "1.5 found"], ["--crop-scale", 1.5]),
    (["--jitter", "-1 found"], ["--jitter=-1"]),
    (["--loss", "triplet"], ["--loss", "triplet"]),
    (["--checkpoint goes with --export-only"], ["--checkpoint", "x.pt"]),
    (["--export", "middle"], ["--export", "middle"]),
    (["24 images found, at least --batch-size 25"], ["--batch-size", 25]),
    (["val.npy: 6 images a class, expected at least 7"], ["--query", 2]),
    (["val.npy: 3 classes, expected at least 4"], ["--way", 4]),
    (["test.npy: 6 images a class, expected at least 51"], ["--probe", "--test-shot", 1, 50]),
    (["x.pt: not found"], ["--export-only", "--checkpoint", "x.pt"]),
    (["last.pt: not found"], ["--export-only"]),
    (["--resume is of training", "--export-only found"], ["--export-only", "--resume"]),
    (
        ["--export best is of the run", "--checkpoint found"],
        ["--export-only", "--checkpoint", "x.pt", "--export", "best"],
    ),
    (["--init is of training"], ["--export-only", "--init", "x.pt"]),
    (["x.pt: not found"], ["--init", "x.pt"]),
    (["--way: 1 found"], ["--way", 1]),
    (["--probe: --export-only without --checkpoint found"], ["--export-only", "--probe"]),
    (["--feature-save-dir", "/dev/null"], ["--feature-save-dir", "/dev/null"]),
    (["x" * 300], ["--data-dir", "x" * 300]),
])  # fmt: skip
def test_wrong_flags(capsys, monkeypatch, data_dir, tmp_path, words, flags):
    fails_here(
        capsys, monkeypatch, words, "--data-dir", data_dir, *TINY, "--save-dir", tmp_path / "s",
        "--feature-save-dir", tmp_path / "f", *flags,
    )  # fmt: skip
    assert not (tmp_path / "f").exists() and not (tmp_path / "s/last.pt").exists()


def test_an_encoder_of_another_width(capsys, monkeypatch, data_dir, whole_run, tmp_path):
    init = whole_run[0] / "encoder.pt"
    flags = ["--data-dir", data_dir, *TINY, "--save-dir", tmp_path / "s", "--init", init, "--hidden-size", 8]
    fails_here(capsys, monkeypatch, ["--hidden-size: 8 found, 4 expected as in", init], *flags)
    assert not (tmp_path / "s").exists()


def test_wrong_data(capsys, monkeypatch, data_dir, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    arrays = {path.stem: np.load(path) for path in data_dir.glob("*.npy")}
    labels = arrays["train_labels"]
    for name, bad, words in (
        ("train", None, ["train.npy: not found", "prepare.py"]),
        ("val", arrays["val"][..., 0], ["val.npy: shape (18, 84, 84)"]),
        ("train", arrays["train"].astype(np.float32), ["train.npy: dtype float32"]),
        ("val", np.zeros_like(arrays["val"]), ["val.npy: values from 0 to 0 found, pictures of 0 to 255"]),
        ("train", arrays["train"] // 16, ["train.npy: values from 0 to 15 found"]),
        ("test", np.array([{"a": 1}]), ["test.npy: not a readable .npy array"]),
        ("val", arrays["train"][:18], ["18 images of train found in val too"]),
        ("train_labels", None, ["train_labels.npy: not found"]),
        ("train_labels", labels[:-1], ["train_labels.npy: int64 of shape (23,)", "24 images"]),
        ("train_labels", labels + 0.5, ["train_labels.npy: float64"]),
        ("train_labels", np.roll(labels, 1), ["4 classes in 5 runs"]),
        ("train_labels", np.maximum(labels, 1), ["classes of 6 to 12 images"]),
    ):
        for other, array in arrays.items():
            np.save(folder / f"{other}.npy", array)
        (folder / f"{name}.npy").unlink()
        if bad is not None:
            np.save(folder / f"{name}.npy", bad)
        fails_here(capsys, monkeypatch, words, "--data-dir", folder, *TINY, "--save-dir", tmp_path / "s")
        assert not (tmp_path / "s").exists()


def test_folders_and_checkpoints_that_are_taken_or_foreign(capsys, monkeypatch, whole_run, tmp_path):
    folder, features, flags = whole_run
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    place = [*flags, "--save-dir", folder, "--feature-save-dir", tmp_path / "f"]
    fails_here(capsys, monkeypatch, ["holds another run", "--resume"], *place)
    fails_here(capsys, monkeypatch, ["--lr: 0.1 found, 0.001 expected"], *place, "--resume", "--lr", 0.1)
    fails_here(
        capsys, monkeypatch, ["holds a training run"], *place, "--export-only", "--checkpoint",
        folder / "best.pt",
    )  # fmt: skip
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    fails_here(
        capsys, monkeypatch, ["--feature-save-dir", "/dev/null"], *flags, "--save-dir", tmp_path / "s",
        "--feature-save-dir", "/dev/null", "--export-only", "--checkpoint", folder / "encoder.pt",
    )  # fmt: skip
    assert not (tmp_path / "s").exists()
    foreign, network = tmp_path / "foreign.pt", model.Encoder(4)
    torch.nn.init.constant_(network.blocks[0].norm.bias, float("nan"))
    torch.save({"model": network.state_dict(), "sizes": network.sizes}, tmp_path / "nan.pt")
    fails_here(
        capsys, monkeypatch, ["nan.pt", "NaN"], *flags, "--save-dir", tmp_path / "s", "--export-only",
        "--checkpoint", tmp_path / "nan.pt",
    )  # fmt: skip
    for content, words in (
        (b"garbage", "not a readable checkpoint"),
        ({"model": {}, "sizes": {"latent_size": 3}}, "not a checkpoint of this experiment"),
    ):
        foreign.write_bytes(content) if isinstance(content, bytes) else torch.save(content, foreign)
        fails_here(
            capsys, monkeypatch, [foreign, words], *flags, "--save-dir", tmp_path / "s", "--export-only",
            "--checkpoint", foreign,
        )  # fmt: skip


def test_errors_end_in_one_line_in_a_process_of_its_own(source_dir, tmp_path):
    fails(
        run("simclr", "--data-dir", tmp_path / "none", "--save-dir", tmp_path / "s"),
        "none/train.npy: not found",
    )
    broken = tmp_path / "broken"
    broken.mkdir()
    for split in ("train", "val", "test"):
        (broken / f"{split}.csv").write_text((source_dir / f"{split}.csv").read_text())
    fails(
        run("simclr", "--data-dir", broken, "--save-dir", tmp_path / "s"),
        "train.csv: 24 of 24 images missing",
    )
    assert not (tmp_path / "s").exists()
