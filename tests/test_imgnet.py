"""data/imgnet/prepare.py: arrays from loose files and from zips, and every problem of a source named with its
count."""

import csv
import io
import json
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from conftest import fails, load, needs_shared_data, run, shared_data

COUNTS = {"train": 4, "val": 3, "test": 2}  # classes, of 6 images each
ARRAYS = {f"{split}{part}.npy" for split in COUNTS for part in ("", "_labels")} | {"classes.json"}


def jpeg(seed, size=(84, 84), mode="RGB"):
    """A JPEG of smooth noise, so that compression changes it little."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode).save(
        buffer, "jpeg", quality=95
    )
    return buffer.getvalue()


def make_source(folder, members=6):
    """A data set of loose files whose CSVs alternate between classes; returns {split: rows}."""
    (folder / "images").mkdir(parents=True)
    rows, seed = {}, 0
    for split, classes in COUNTS.items():
        rows[split] = []
        for member in range(members):
            for c in reversed(range(classes)):
                name = f"{split}{c}_{member}.jpg"
                size, mode = (
                    ((120, 90), "RGB")
                    if member == 1
                    else ((84, 84), "L")
                    if member == 2
                    else ((84, 84), "RGB")
                )
                (folder / "images" / name).write_bytes(jpeg(seed, size, mode))
                rows[split].append((name, f"{split}{c}"))
                seed += 1
        write_csv(folder, split, rows[split])
    return rows


def write_csv(folder, split, rows, header=("filename", "label")):
    with open(folder / f"{split}.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *rows] if header else rows)


def prepare(source, out):
    return run("data/imgnet", "--source", source, "--out", out, script="prepare.py")


@pytest.fixture
def source(tmp_path):
    make_source(tmp_path / "source")
    return tmp_path / "source"


def test_arrays_hold_the_images_class_by_class(source, tmp_path):
    result = prepare(source, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == ARRAYS
    names = json.loads((tmp_path / "out/classes.json").read_text())
    for split, classes in COUNTS.items():
        images, labels = (
            np.load(tmp_path / f"out/{split}{part}.npy", allow_pickle=False) for part in ("", "_labels")
        )
        assert images.shape == (6 * classes, 84, 84, 3) and images.dtype == np.uint8
        assert labels.tolist() == [i for i in range(classes) for _ in range(6)]
        assert names[split] == [f"{split}{c}" for c in reversed(range(classes))]  # order of first appearance
        for i, name in enumerate(names[split]):
            for member in range(6):
                image = (
                    Image.open(source / f"images/{name}_{member}.jpg")
                    .convert("RGB")
                    .resize((84, 84), Image.Resampling.BILINEAR)
                )
                assert (images[6 * i + member] == np.asarray(image)).all()


def test_classes_json_stands_only_beside_all_arrays(tmp_path, monkeypatch):
    """A kill between two renames must not leave what `make mini` takes for prepared images."""
    prepare_py = load("data/imgnet", "prepare")
    old, new = ({"train": array, "val": array} for array in (np.zeros(1), np.ones(1)))
    prepare_py.write_all(tmp_path, old, "classes.json", {"train": ["old"]})
    renamed, replace = [], os.replace

    def killed(source, target):
        assert not (tmp_path / "classes.json").exists()
        renamed.append(target)
        if len(renamed) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare_py.write_all(tmp_path, new, "classes.json", {"train": ["new"]})
    assert {path.name for path in tmp_path.iterdir()} == {"train.npy", "val.npy"}


def test_zips_give_the_same_arrays_as_loose_files(source, tmp_path):
    zipped = tmp_path / "zipped"
    zipped.mkdir()
    images = sorted((source / "images").iterdir())
    for name, part, prefix in (("a", images[::2], "images"), ("b", images[1::2], "deeper/images")):
        with zipfile.ZipFile(zipped / f"{name}.zip", "w") as file:
            for path in part:
                file.write(path, f"{prefix}/{path.name}")
    for split in COUNTS:
        (zipped / f"{split}.csv").write_text((source / f"{split}.csv").read_text())
    for place in (source, zipped):
        assert prepare(place, tmp_path / f"{place.name}-out").returncode == 0
    for name in ARRAYS:
        assert (tmp_path / "source-out" / name).read_bytes() == (tmp_path / "zipped-out" / name).read_bytes()


def test_every_problem_is_named_with_its_count_and_nothing_is_written(source, tmp_path):
    for name in ("train0_0.jpg", "train3_5.jpg"):
        (source / "images" / name).unlink()
    whole = (source / "images/val0_0.jpg").read_bytes()
    (source / "images/val0_0.jpg").write_bytes(whole[: len(whole) // 2])
    (source / "images/val1_0.jpg").write_bytes(b"not an image")
    (source / "images.zip").write_bytes(b"PK not a zip")
    rows = [(f"test{c}_{m}.jpg", f"test{c}") for c in range(2) for m in range(6)]
    write_csv(source, "test", rows[:-1] + rows[:1])
    result = prepare(source, tmp_path / "out")
    fails(
        result, "train.csv: 2 of 24 images missing", "train3_5.jpg",
        "val.csv: 2 of 18 images are not readable", "val1_0.jpg",
        "images.zip: damaged", "1 images stand more than once", "test0_0.jpg",
        "2 of 9 classes do not have 6 images", "test.csv: test0 has 7",
    )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_bad_csvs(source, tmp_path):
    rows = [("a.jpg", "a")]
    write_csv(source, "train", rows, header=None)
    write_csv(source, "val", [])
    (source / "test.csv").unlink()
    result = prepare(source, tmp_path / "out")
    fails(
        result,
        "train.csv: header 'a.jpg,a' found, 'filename,label' expected",
        "val.csv: no images",
        "test.csv: not found",
    )
    assert not (tmp_path / "out").exists()
    fails(prepare(tmp_path / "nowhere", tmp_path / "out"), "--source", "nowhere")


def test_a_class_in_two_csvs(source, tmp_path):
    rows = [(f"val{c}_{m}.jpg", f"train{c}") for c in range(3) for m in range(6)]
    write_csv(source, "val", rows)
    fails(prepare(source, tmp_path / "out"), "3 classes stand in more than one CSV", "train0")


@pytest.mark.parametrize(
    "content", [b"filename,label\n\xff\xfe,a\n", b"filename,label\na.jpg\n", b"filename,label\n,a\n"]
)
def test_damaged_csv_lines(source, content):
    module = load("data/imgnet", "prepare")
    (source / "val.csv").write_bytes(content)
    with pytest.raises(module.SourceError, match="val.csv"):
        module.read_csv(source / "val.csv")


def test_only_mini_imagenet_is_held_to_its_counts():
    module = load("data/imgnet", "prepare")

    def rows(members, name="n{:08d}"):
        first = {"train": 0, "val": 64, "test": 80}
        return {
            split: [
                (f"{split}{c}_{m}.jpg", name.format(first[split] + c))
                for c in range(count)
                for m in range(members)
            ]
            for split, count in module.CLASSES.items()
        }

    assert module.check_counts(rows(600)) == []
    assert module.check_counts(rows(7, "class{}")) == []
    problems = module.check_counts(rows(599))
    assert len(problems) == 3 and "38336 images found, Mini-ImageNet's 38400 expected" in problems[0]


@needs_shared_data
def test_real_csvs_and_images():
    """The real CSVs pass every check, and each image they name lies in one of the zips."""
    module = load("data/imgnet", "prepare")
    rows = {split: module.read_csv(shared_data / f"imgnet/{split}.csv") for split in COUNTS}
    assert module.check_counts(rows) == []
    found, problems = module.find_images(shared_data / "imgnet")
    assert problems == [] and all(filename in found for split in rows.values() for filename, _ in split)
    image = module.decode(found[rows["train"][0][0]])
    assert image.shape == (84, 84, 3) and image.std() > 10
