"""What the Mini-ImageNet program says of features and flags that do not fit: one line each."""

import json
import shutil
import zlib

import numpy as np
import pytest
import torch

from conftest import fails, load, run
from test_mimgnet_cli import TINY, dataloader, main, model, save_features
from test_mimgnet_cli import data, refused  # noqa: F401


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
    (folder / "features.json").write_text(json.dumps(description | {"encoder_crc32": 6}))
    refused(
        *start, "--eval-only", "--checkpoint", tmp_path / "run",
        words=["features.json", "encoder_crc32 6 found", "5 expected"],
    )  # fmt: skip
    alone = shutil.copytree(tmp_path / "run", tmp_path / "alone")
    (alone / "config.json").write_text("[]")  # of something else: what the weights were trained on is unknown
    place = "--save-dir", tmp_path / "again"
    result = run("mimgnet", *start, *place, "--eval-only", "--checkpoint", alone, "--test-shot", 30)
    assert result.returncode == 0, result.stderr
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


def test_features_too_small_to_be_worth_a_latent(data, tmp_path, capsys):
    """Unit length, as many encoders give: no direction has the variance that a squared error needs."""
    x = {split: np.load(data / f"{split}_features.npy") for split in ("train", "val", "test")}
    for scale, small in ((1, True), (10, False)):
        for split in x:
            unit = x[split] / np.linalg.norm(x[split], axis=1, keepdims=True)
            np.save(tmp_path / f"{split}_features.npy", scale * unit)
        capsys.readouterr()
        dataloader.load_splits(main.parse_args(["--data-dir", str(tmp_path), *TINY]), {})
        assert ("train_features.npy: a variance of at most 0." in capsys.readouterr().out) == small


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


def test_features_below_zero_where_those_of_training_are_not(data, tmp_path, refused):
    for split in ("train", "val", "test"):
        shutil.copy(data / f"{split}_features.npy", tmp_path)
    path = tmp_path / "test_features.npy"
    np.save(path, np.load(path) - 0.5)
    said = "test_features.npy: features down to -0.5 found, none below zero expected as in train_features.npy"
    refused("--data-dir", tmp_path, "--save-dir", tmp_path / "run", *TINY, words=[said])
    network = model.GMVAE(32, 16, 4)
    torch.save({"model": network.state_dict(), "sizes": network.sizes}, tmp_path / "some.pt")
    flags = "--data-dir", tmp_path, "--save-dir", tmp_path / "run", *TINY, "--eval-only", "--checkpoint"
    refused(*flags, tmp_path / "some.pt", words=[said.replace("train_features.npy", ""), "some.pt"])


def test_labels_of_val_and_test_are_enough(data, tmp_path, refused):
    folder, flags = shutil.copytree(data, tmp_path / "features"), TINY[2:]
    for split, classes in (("val", 6), ("test", 22)):
        said = f"--images-per-class: neither features.json nor {split}_labels.npy found in {folder}"
        refused("--data-dir", folder, "--save-dir", tmp_path / "run", *flags, words=[said])
        np.save(folder / f"{split}_labels.npy", np.repeat(np.arange(classes), 20))
    found = dataloader.load_splits(main.parse_args(["--data-dir", str(folder), *flags]), {})
    shapes = {"train": (240, 1, 32), "val": (6, 20, 32), "test": (22, 20, 32)}
    assert {name: x.shape for name, x in found.items()} == shapes
    said = "20 images a class found in val_labels.npy, 10 expected as --images-per-class"
    flags = "--data-dir", folder, "--save-dir", tmp_path / "run", *TINY, "--images-per-class", 10
    refused(*flags, words=[said])


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
    "--shot 17": "val_features.npy: 20 images a class, expected at least 21 (--shot 17 + --query 4)",
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
