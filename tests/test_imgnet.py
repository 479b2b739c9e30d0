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


# --- where a picture lies -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """A data set of loose files and the arrays made from it."""
    folder = tmp_path_factory.mktemp("right")
    make_source(folder / "source")
    assert prepare(folder / "source", folder / "out").returncode == 0
    return folder


def equal(one, other):
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in ARRAYS)


def pack(source, archive, name, keep=False, content=None):
    """Moves the loose images into a zip, each at name(path)."""
    with zipfile.ZipFile(source / archive, "a") as file:
        for path in sorted((source / "images").iterdir()):
            file.writestr(name(path), path.read_bytes() if content is None else content)
            if not keep:
                path.unlink()


def rename(source, name):
    for path in sorted((source / "images").iterdir()):
        new = source / "images" / name(path)
        new.parent.mkdir(parents=True, exist_ok=True)
        path.rename(new)


def rename_rows(source, name):
    for split in COUNTS:
        rows = list(csv.reader((source / f"{split}.csv").read_text().splitlines()))[1:]
        write_csv(source, split, [(name(filename), label) for filename, label in rows])


def linked(source):
    rename(source, lambda path: f"../elsewhere/{path.name}")
    os.symlink(source / "elsewhere", source / "images/linked")
    os.symlink(source / "images", source / "elsewhere/loop")


LAYOUTS = {
    "class folders": lambda source: rename(source, lambda path: f"{path.name[:-6]}/{path.name}"),
    "suffix in capitals": lambda source: rename(source, lambda path: path.stem + ".JPG"),
    "another suffix": lambda source: rename(source, lambda path: path.stem + ".JPEG"),
    "a prefix in the CSV": lambda source: rename_rows(source, "images/{}".format),
    "a link to a folder": linked,
    "NFD files": lambda source: (
        rename(source, lambda path: "a\u0308" + path.name), rename_rows(source, "\u00e4{}".format),
    ),
    "NFC files": lambda source: (
        rename(source, lambda path: "\u00e4" + path.name), rename_rows(source, "a\u0308{}".format),
    ),
    "a zip of another folder": lambda source: pack(source, "mini.zip", lambda path: f"mini/{path.name}"),
    "a zip in capitals": lambda source: pack(source, "IMAGES.ZIP", lambda path: path.name),
    "two copies": lambda source: (
        pack(source, "a.zip", lambda path: f"images/{path.name}", keep=True),
        pack(source, "b.zip", lambda path: path.name),
    ),
    "masks in the zip": lambda source: (
        pack(source, "a.zip", lambda path: f"images/{path.name}", keep=True), pack(source, "a.zip",
        lambda path: f"mask_images/{path.name}", content=b"mask"),
    ),
    "masks in a zip beside": lambda source: pack(
        source, "masks.zip", lambda path: f"masks/{path.name}", True, b"mask"
    ),
    "images in another word": lambda source: (
        rename_rows(source, "train_images/{}".format), pack(source, "a.zip",
        lambda path: f"train_images/{path.name}"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_that_leaves_no_doubt_is_read(layout, right, source, tmp_path):
    LAYOUTS[layout](source)
    result = prepare(source, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert equal(tmp_path / "out", right / "out")


def test_a_name_of_two_different_files(source, tmp_path):
    pack(source, "a.zip", lambda path: f"images/{path.name}", keep=True)
    pack(source, "b.zip", lambda path: f"images/{path.name}", content=jpeg(99))
    result = prepare(source, tmp_path / "out")
    fails(
        result,
        "train.csv: 24 of 24 names stand for different files",
        "a.zip: images/train3_0.jpg and ",
        "b.zip: images/train3_0.jpg",
    )
    assert not (tmp_path / "out").exists()


def test_a_name_of_two_different_files_in_one_zip(source, tmp_path):
    pack(source, "a.zip", lambda path: f"images/{path.name}")
    with zipfile.ZipFile(source / "a.zip", "a") as file, pytest.warns(UserWarning):
        file.writestr("images/train3_0.jpg", jpeg(99))
    fails(prepare(source, tmp_path / "out"), "a.zip: two different files named images/train3_0.jpg found")


def test_a_mask_does_not_stand_in_for_a_missing_picture(source, tmp_path):
    for place in ("a.zip", "b.zip"):
        pack(
            source, place, lambda path: f"{'images' if place == 'a.zip' else 'masks'}/{path.name}", keep=True
        )
    (source / "images/masks").mkdir()
    (source / "images/train3_0.jpg").rename(source / "images/masks/train3_0.jpg")
    (source / "a.zip").unlink()
    fails(prepare(source, tmp_path / "out"), "train.csv: 1 of 24 images missing", "the first: train3_0.jpg")


def test_a_name_of_two_pictures_in_subfolders(source, tmp_path):
    (source / "images/b").mkdir()
    (source / "images/b/train3_0.jpg").write_bytes(jpeg(99))
    rename(source, lambda path: f"a/{path.name}" if path.suffix else path.name)
    fails(
        prepare(source, tmp_path / "out"),
        "1 of 24 names stand for different files",
        "images/a/train3_0.jpg and ",
        "images/b/train3_0.jpg",
    )


def test_the_same_picture_in_two_splits(source, tmp_path):
    for member in range(6):
        picture = (source / f"images/train2_{member}.jpg").read_bytes()
        (source / f"images/test1_{member}.jpg").write_bytes(picture)
    result = prepare(source, tmp_path / "out")
    fails(result, "6 images of train.csv are in test.csv under another name", "train2_0.jpg and test1_0.jpg")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".prepare-*"))


def test_arrays_stay_while_their_source_is_the_same(source, right, tmp_path):
    """By content: the same images in a zip are no other source, one changed byte is."""

    def again(how, out=tmp_path / "out"):
        return run("data/imgnet", "--source", source, "--out", out, "--if-changed", how, script="prepare.py")

    def when():
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}

    assert again("fail").returncode == 0
    before = when()
    pack(source, "images.zip", lambda path: f"images/{path.name}", keep=True)
    assert again("again").returncode == again("fail").returncode == 0 and when() == before
    (source / "images/train0_3.jpg").write_bytes(jpeg(99))
    (source / "images.zip").unlink()
    fails(again("fail"), "--source: other images found than those that", tmp_path / "out")
    assert when() == before
    assert again("again").returncode == 0 and when() != before
    assert prepare(source, tmp_path / "out").returncode == 0
    before = when()
    assert again("again").returncode == again("fail").returncode == 0 and when() == before
    (tmp_path / "out/test_labels.npy").unlink()
    assert again("again").returncode == 0 and when().keys() == before.keys()


def test_arrays_are_the_same_however_many_wait_to_be_written(source, right, tmp_path):
    code = "import prepare; prepare.AT_ONCE = 7; prepare.main()"
    result = run("data/imgnet", code, "--source", source, "--out", tmp_path / "out", script="-c")
    assert result.returncode == 0 and equal(tmp_path / "out", right / "out"), result.stderr


def test_a_file_of_two_names(source, tmp_path):
    rows = list(csv.reader((source / "train.csv").read_text().splitlines()))[1:]
    (source / "images" / rows[4][0]).unlink()
    write_csv(source, "train", [*rows[:4], (rows[0][0].replace("jpg", "JPEG"), rows[4][1]), *rows[5:]])
    fails(prepare(source, tmp_path / "out"), "are one file")


def test_what_was_found_is_said(source, tmp_path):
    (source / "images").rename(source / "processed_images")
    (source / "images.tar.gz").write_bytes(b"anything")
    fails(
        prepare(source, tmp_path / "out"), "24 of 24 images missing", "no file found",
        "not read: images.tar.gz, processed_images/",
        "a folder images/ or a .zip expected",
    )  # fmt: skip
    (source / "processed_images").rename(source / "images")
    rename_rows(source, lambda name: "other" + name)
    fails(
        prepare(source, tmp_path / "out"), "24 of 24 images missing", "54 files found, such as test0_0.jpg",
        source / "images/test0_0.jpg",
    )  # fmt: skip


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
