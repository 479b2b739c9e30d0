"""SimCLR's program as a user runs it."""

import json
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image

from conftest import ROOT, fails, load, metrics, run
from test_imgnet import make_source

data, model = load("simclr", "dataloader"), load("simclr", "model")
TINY = "--hidden-size 4 --batch-size 8 --train-epochs 3 --freq-epochs 2 --eval-episodes 6 --device cpu"
TINY = [*TINY.split(), *"--way 2 --query 1 --test-shot 1 2".split()]

# What features.json says of a run with these flags, beside the checksums.
TINY_FEATURES = {
    "train_epochs": 3, "batch_size": 8, "view_size": 84,
    "loss": "nt-xent", "views": 2, "crop_scale": 0.08, "jitter": 0.8, "hue": 0.2, "neighbours": 0,
    "feature_size": 84, "lda": 0, "images_per_class": {"train": 6, "val": 6, "test": 6},
}  # fmt: skip


# --- the program ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simclr") / "source"
    make_source(folder)
    return folder


@pytest.fixture(scope="module")
def data_dir(source_dir):
    out = source_dir.parent / "prepared"
    result = run("data/imgnet", "--source", source_dir, "--out", out, script="prepare.py")
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="module")
def whole_run(data_dir, tmp_path_factory):
    """A finished tiny run with its probe: (its folder, its features' folder, its flags)."""
    place = tmp_path_factory.mktemp("run")
    result = run(
        "simclr", "--data-dir", data_dir, "--save-dir", place / "whole", "--feature-save-dir",
        place / "features", "--probe", *TINY,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return place / "whole", place / "features", ["--data-dir", data_dir, *TINY]


def read_features(folder):
    return {
        split: np.load(folder / f"{split}_features.npy", allow_pickle=False)
        for split in ("train", "val", "test")
    }


def assert_same_run(a, features_a, b, features_b):
    assert metrics(a) == metrics(b)
    for name in ("last.pt", "best.pt", "encoder.pt"):
        ours, theirs = (torch.load(folder / name, weights_only=True)["model"] for folder in (a, b))
        assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours), name
    for split, array in read_features(features_a).items():
        assert (array == read_features(features_b)[split]).all(), split


def test_a_run_leaves_its_files(whole_run):
    folder, features, _ = whole_run
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "metrics.jsonl", "last.pt", "best.pt", "encoder.pt", "test.json", "tb_log",
    }  # fmt: skip
    assert {path.name for path in features.iterdir()} == {
        "train_features.npy", "val_features.npy", "test_features.npy", "features.json",
    }  # fmt: skip
    arrays = read_features(features)
    assert {split: array.shape for split, array in arrays.items()} == {
        "train": (24, 16),
        "val": (18, 16),
        "test": (12, 16),
    }
    assert all(
        array.dtype == np.float32 and np.isfinite(array).all() and array.std() > 0
        for array in arrays.values()
    )
    lines = metrics(folder)
    assert [(line["epoch"], line["step"]) for line in lines] == [(2, 6), (3, 9)] and all(
        0 < line["nt_xent"] < 20 for line in lines
    )
    assert lines[0].keys() == {"epoch", "step", "nt_xent", "2way1shot", "2way5shot"}
    scores = json.loads((folder / "test.json").read_text())
    assert scores.keys() == {"2way1shot", "2way2shot"}
    assert all(0 <= s["accuracy"] <= 100 and s["ci95"] >= 0 and s["episodes"] == 6 for s in scores.values())
    assert any("events" in path.name for path in (folder / "tb_log").iterdir())


def test_features_are_the_encoders_output_in_order(whole_run, data_dir):
    folder, features, _ = whole_run
    encoder = model.Encoder(4)
    encoder.load_state_dict(torch.load(folder / "last.pt", weights_only=True)["model"])
    encoder.eval()
    for split, array in read_features(features).items():
        for i, image in enumerate(np.load(data_dir / f"{split}.npy")):
            x = torch.from_numpy(image).permute(2, 0, 1) / 255
            expected = encoder(TF.normalize(x, data.MEAN, data.STD).unsqueeze(0))
            assert np.allclose(array[i], expected.detach(), atol=1e-4)


def test_export_only_repeats_the_features(whole_run, tmp_path):
    folder, features, flags = whole_run
    place = ["--save-dir", tmp_path / "s", "--feature-save-dir", tmp_path / "f"]
    result = run("simclr", *flags, *place, "--export-only", "--checkpoint", folder / "encoder.pt", "--probe")
    assert result.returncode == 0, result.stderr
    for split, array in read_features(features).items():
        assert (array == read_features(tmp_path / "f")[split]).all()
    assert (tmp_path / "s/test.json").read_text() == (folder / "test.json").read_text()
    said = json.loads((features / "features.json").read_text())
    assert said == json.loads((tmp_path / "f/features.json").read_text())
    sums = {split: zlib.crc32(array) for split, array in read_features(features).items()}
    assert said.pop("encoder_crc32") > 0 and said.pop("crc32") == sums and said == TINY_FEATURES
    copy = shutil.copytree(folder, tmp_path / "whole")  # whose encoder.pt becomes the best one
    best = torch.load(copy / "best.pt", weights_only=True)
    best["model"]["blocks.4.norm.bias"] += 1  # the best one may be the last one
    torch.save(best, copy / "best.pt")
    result = run(
        "simclr", *flags, "--export-only", "--export", "best", "--save-dir", copy, "--feature-save-dir",
        tmp_path / "best",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (read_features(tmp_path / "best")["test"] != read_features(features)["test"]).any()


def test_no_features_json_lies_beside_files_of_two_encoders(whole_run, tmp_path, monkeypatch):
    """An export ends between its second and its third file."""
    folder, features, flags = whole_run
    out, main, export = tmp_path / "f", load("simclr", "main"), load("simclr", "export")
    shutil.copytree(features, out)
    place = ["--save-dir", tmp_path / "s", "--feature-save-dir", out]
    place += ["--export-only", "--checkpoint", folder / "encoder.pt"]
    args, replace = main.parse_args([*map(str, [*flags, *place])]), Path.replace

    def killed(path, target):
        assert target.name != "test_features.npy", "killed"
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(AssertionError, match="killed"):
        export.export(export.load_splits(args), torch.device("cpu"), args)
    assert (out / "test_features.npy").exists() and not (out / "features.json").exists()


def test_larger_images_have_wider_features(data_dir, whole_run, tmp_path):
    """--feature-size 100: 3 x 3 places instead of 2 x 2, of images that torchvision enlarges."""
    folder, _, flags = whole_run
    place = ["--save-dir", tmp_path / "s", "--feature-save-dir", tmp_path / "f", "--feature-size", 100]
    result = run("simclr", *flags, *place, "--export-only", "--checkpoint", folder / "encoder.pt")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "f/features.json").read_text())["feature_size"] == 100
    encoder, found = model.load_model(folder / "encoder.pt"), read_features(tmp_path / "f")["val"]
    x = torch.from_numpy(np.load(data_dir / "val.npy")).permute(0, 3, 1, 2) / 255
    x = TF.resize(TF.normalize(x, data.MEAN, data.STD), [100, 100], antialias=False)
    assert found.shape[1] == 3 * 3 * 4 and np.allclose(found, encoder(x).detach(), atol=1e-4)


# Ends itself, as a power cut would, right after the checkpoint of step 5: in the middle of the second epoch.
DIES = """
import os, signal, main
main.SAVE_SECONDS, save = 0, main.save_checkpoint
def save_and_die(path, checkpoint):
    save(path, checkpoint)
    if path.name == "last.pt" and checkpoint["step"] == 5:
        os.kill(os.getpid(), signal.SIGKILL)
main.save_checkpoint = save_and_die
main.main()
"""


def test_kill_and_resume_end_as_if_never_interrupted(whole_run, tmp_path):
    folder, features, flags = whole_run
    flags = [*flags, "--save-dir", tmp_path / "s", "--feature-save-dir", tmp_path / "f"]
    command = [sys.executable, "-c", DIES, *map(str, flags)]
    killed = subprocess.run(command, cwd=ROOT / "simclr", capture_output=True, timeout=120)
    assert (
        killed.returncode == -signal.SIGKILL
        and torch.load(tmp_path / "s/last.pt", weights_only=True)["step"] == 5
    )
    result = run("simclr", *flags, "--resume")
    assert result.returncode == 0, result.stderr
    assert_same_run(folder, features, tmp_path / "s", tmp_path / "f")


# Gets a signal in the middle of step 4.
STOPPED = """
import os, signal, main
make, steps = main.training_views, iter(range(1, 10))
def make_and_signal(*args):
    if next(steps) == 4:
        os.kill(os.getpid(), signal.SIGTERM)
    return make(*args)
main.training_views = make_and_signal
main.main()
"""


GENTLE = "--crop-scale 0.2 --jitter 0.4 --hue 0.1 --view-size 64 --views 4".split()
PROTOTYPICAL = ["--loss", "prototypical", "--temperature", 20, "--constant-epochs", 0, *GENTLE]
PROTOTYPICAL += ["--neighbours", 2]


def test_a_prototypical_run_resumes_as_if_never_interrupted(data_dir, tmp_path):
    flags = ["--data-dir", data_dir, *TINY, *PROTOTYPICAL]
    whole, features = tmp_path / "whole", tmp_path / "features"
    result = run("simclr", *flags, "--save-dir", whole, "--feature-save-dir", features)
    assert result.returncode == 0, result.stderr
    assert metrics(whole)[0].keys() == {"epoch", "step", "prototypical", "2way1shot", "2way5shot"}
    said = json.loads((features / "features.json").read_text())
    views = {"views": 4, "view_size": 64, "crop_scale": 0.2, "jitter": 0.4, "hue": 0.1, "neighbours": 2}
    assert (
        said.pop("encoder_crc32") > 0
        and said.pop("crc32")
        and said == TINY_FEATURES | views | {"loss": "prototypical"}
    )
    assert said == said | torch.load(whole / "encoder.pt", weights_only=True)["training"]
    flags = [*flags, "--save-dir", tmp_path / "s", "--feature-save-dir", tmp_path / "f"]
    result = run("simclr", STOPPED, *flags, script="-c")
    assert result.returncode == 128 + signal.SIGTERM and "--resume continues" in result.stderr
    assert "Traceback" not in result.stderr
    assert torch.load(tmp_path / "s/last.pt", weights_only=True)["step"] == 2  # makes views twice a step
    fails(run("simclr", *flags, "--resume", "--views", 2), "--views: 2 found, 4 expected")
    longer = run("simclr", *flags, "--resume", "--train-epochs", 4)  # its rate falls from the first epoch on
    fails(longer, "--train-epochs: 4 found, 3 expected")
    assert run("simclr", *flags, "--resume").returncode == 0
    assert_same_run(whole, features, tmp_path / "s", tmp_path / "f")
    (tmp_path / "s/test.json").write_text("of flags that are not in config.json any more")
    assert run("simclr", *flags, "--resume", "--export", "best").returncode == 0
    assert not (tmp_path / "s/test.json").exists()


def test_training_starts_from_an_encoder(whole_run, tmp_path):
    """At a rate of zero the weights stay those of --init, with or without directions."""
    folder, _, flags = whole_run
    start = folder / "encoder.pt"
    for name, more in (("one", ["--lda", 3]), ("two", [])):
        out = tmp_path / name
        place = ["--save-dir", out, "--feature-save-dir", out, "--init", start, "--lr", 0]
        result = run("simclr", *flags, *place, *more)
        assert result.returncode == 0, result.stderr
        trained, given = model.load_model(out / "encoder.pt"), model.load_model(start)
        for found, expected in zip(trained.blocks.parameters(), given.blocks.parameters(), strict=True):
            assert found.equal(expected)
        checksum = load("simclr", "export").checksum(given)
        assert json.loads((out / "config.json").read_text())["init_crc32"] == checksum
        start = out / "encoder.pt"


def test_recipes():
    main, recipes = load("simclr", "main"), f"@{ROOT}/simclr/recipes"
    assert main.parse_args([f"{recipes}/published.txt"]) == main.parse_args([])
    args = main.parse_args([f"{recipes}/prototypical.txt"])
    assert args.loss == "prototypical" and args.constant_epochs < args.train_epochs
    steps = 38_400 // args.batch_size
    assert args.train_epochs * steps * args.batch_size * args.views == pytest.approx(2.8e6, rel=0.05)
    both = [f"{recipes}/prototypical.txt", f"{recipes}/neighbours.txt"]
    longer = main.parse_args([*both, "--init", "x.pt"])
    changed = {name for name, value in vars(longer).items() if value != vars(args)[name]}
    assert changed == {"init", "neighbours", "lr", "train_epochs"}


def test_a_smoke_run_keeps_its_features_to_itself():
    main = load("simclr", "main")
    assert main.parse_args([]).feature_save_dir == ROOT / "data/imgnet"
    assert main.parse_args(["--debug", "--save-dir", "runs/s"]).feature_save_dir == Path("runs/s/features")


def test_contact_sheet(data_dir, tmp_path):
    result = run(
        "simclr", "--data-dir", data_dir, "--contact-sheet", tmp_path / "sheet.png", "--save-dir",
        tmp_path / "s", "--device", "cpu",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    picture = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert picture.shape == (4 * 84, 10 * 84, 3) and not (tmp_path / "s").exists()
    assert (picture[:84, :84] == np.load(data_dir / "train.npy")[0]).all()
