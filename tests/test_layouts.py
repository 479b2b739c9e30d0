"""data/imgnet/prepare.py: where a picture may lie, and names that leave a doubt."""

import csv
import os
import zipfile

import pytest

from conftest import fails, run
from test_imgnet import ARRAYS, COUNTS, jpeg, make_source, prepare, write_csv
from test_imgnet import source  # noqa: F401


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
    "loose files beside a zip of others": lambda source: pack(
        source, "a.zip", lambda path: f"images/{path.name}", True, jpeg(99)
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


def test_a_zip_that_asks_for_a_later_version(source, tmp_path):
    pack(source, "images.zip", lambda path: path.name)
    content = bytearray((source / "images.zip").read_bytes())
    content[content.index(b"PK\1\2") + 6] = 200
    (source / "images.zip").write_bytes(content)
    fails(prepare(source, tmp_path / "out"), "images.zip: damaged or truncated")


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
    (source / "images/train0_3.jpg").unlink()
    for how in ("again", "fail"):
        fails(again(how), "train.csv: 1 of 24 images missing")


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
