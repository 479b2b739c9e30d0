"""What data/omniglot/prepare.py refuses: every fault of a source ends in one line."""

import zipfile
import zlib

import numpy as np
import pytest
from conftest import fails, run, written
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prepare import SMALL, as_folders, as_zips, drawing, entries, omniglot, png
from test_prepare import full, refuses, small  # noqa: F401


def test_a_missing_source(refuses, tmp_path):
    refuses(
        tmp_path / "nowhere", "nowhere", "found neither images_background.zip nor a folder images_background"
    )


def test_one_archive_without_the_other(refuses, tmp_path):
    as_zips(entries(SMALL), tmp_path)
    (tmp_path / "images_evaluation.zip").unlink()
    refuses(tmp_path, "found neither images_evaluation.zip nor a folder images_evaluation")


@pytest.mark.parametrize("kept", [0, 1000, -1, -30])
def test_a_truncated_archive(refuses, tmp_path, kept):
    archive = as_zips(entries(SMALL), tmp_path) / "images_evaluation.zip"
    archive.write_bytes(archive.read_bytes()[:kept])
    refuses(tmp_path, "images_evaluation.zip", "damaged or truncated")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_flipped_byte_in_a_drawing(refuses, tmp_path, compression):
    archive = as_zips(entries(SMALL), tmp_path, compression) / "images_background.zip"
    with zipfile.ZipFile(archive) as file:
        entry = file.infolist()[40]
    content = bytearray(archive.read_bytes())
    content[entry.header_offset + 30 + len(entry.filename) + entry.compress_size // 2] ^= 0x10
    archive.write_bytes(content)
    refuses(tmp_path, "images_background.zip", "damaged or truncated")


def test_a_missing_character(refuses, tmp_path):
    archives = entries(SMALL)
    gone = {path for path in archives["images_background"] if "character03" in path}
    archives["images_background"] = {
        path: png for path, png in archives["images_background"].items() if path not in gone
    }
    refuses(as_zips(archives, tmp_path), "images_background.zip: 4 characters found, 5 expected")


@pytest.mark.parametrize(
    "pack, where", [(as_zips, "images_evaluation.zip"), (as_folders, "images_evaluation")]
)
def test_a_missing_drawing(refuses, tmp_path, pack, where):
    archives = entries(SMALL)
    del archives["images_evaluation"]["images_evaluation/Evaluation00/character02/0006_07.png"]
    refuses(pack(archives, tmp_path), f"{where}: Evaluation00/character02 has 19 drawings, 20 expected")


def renamed(archives, change):
    return {
        name: {change(name, path): content for path, content in files.items()}
        for name, files in archives.items()
    }


LAYOUTS = {
    "nested once more": lambda name, path: f"{name}/{path}",
    "capital suffix": lambda name, path: path.replace(".png", ".PNG"),
}


@pytest.mark.parametrize("pack", [as_zips, as_folders])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts_give_the_same_bytes(small, tmp_path, pack, layout):
    for folder, archives in (("a", entries(SMALL)), ("b", renamed(entries(SMALL), LAYOUTS[layout]))):
        (tmp_path / folder).mkdir()
        for name, files in archives.items():
            files[f"{name}/{name.title()[7:]}00/character01/._0000_01.png"] = b"what macOS adds to folders"
        result = small("--source", pack(archives, tmp_path / folder), "--out", tmp_path / f"{folder}-out")
        assert result.returncode == 0, result.stderr
    assert written(tmp_path / "a-out") == written(tmp_path / "b-out")


def test_a_character_in_two_places(refuses, tmp_path):
    archives = entries(SMALL)
    path = min(archives["images_background"])
    archives["images_background"][f"copy/{path}"] = drawing(5)
    refuses(
        as_zips(archives, tmp_path),
        "images_background.zip: Background00/character01 found in ",
        "one expected",
    )


def test_inverted_and_blank_drawings(refuses, tmp_path):
    path = "images_background/Background00/character04/0003_11.png"
    for paper, words in (
        (np.zeros((105, 105), bool), "every pixel is 0"),
        (np.kron(np.eye(7), np.ones((15, 15))) > 0, "looks inverted"),
    ):
        archives = entries(SMALL)
        archives["images_background"][path] = png(paper)
        refuses(as_zips(archives, tmp_path), "Background00/character04, drawing 11: ", words, "expected")


def test_what_a_source_without_archives_holds_is_said(refuses, tmp_path):
    (tmp_path / "omniglot.tar.gz").write_bytes(b"anything")
    refuses(tmp_path, "found neither images_background.zip", "found: omniglot.tar.gz")


def bomb():
    """A PNG that claims 60000 x 60000 pixels."""
    header = b"IHDR" + (60000).to_bytes(4, "big") * 2 + b"\x01\x00\x00\x00\x00"
    content = drawing(1)
    return content[:12] + header + zlib.crc32(header).to_bytes(4, "big") + content[33:], "not a readable PNG"


@pytest.mark.parametrize(
    "broken",
    [
        (png(np.ones((28, 28), bool)), "28x28 pixels found, 105x105 expected"),
        bomb(),
        (b"", "not a readable PNG"),
        (b"not a picture", "not a readable PNG"),
        (drawing(1)[:80], "not a readable PNG"),
    ],
    ids=["wrong size", "bomb", "empty", "text", "truncated"],
)
def test_a_drawing_that_cannot_be_used(refuses, tmp_path, broken):
    archives, (content, words) = entries(SMALL), broken
    archives["images_background"]["images_background/Background00/character04/0003_11.png"] = content
    refuses(as_zips(archives, tmp_path), "Background00/character04, drawing 11: ", words)


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, len(drawing(77)) - 1), value=st.integers(0, 255))
def test_one_damaged_byte_of_a_png_is_refused_or_harmless(position, value):
    content = bytearray(drawing(77))
    content[position] = value
    try:
        image = omniglot.read_drawing(bytes(content), "one")
    except omniglot.SourceError as error:
        assert str(error).startswith("one: ")
    else:
        assert image.shape == (28, 28) and image.dtype == np.uint8


def test_one_damaged_byte_of_an_archive_is_refused_or_harmless(tmp_path, monkeypatch):
    monkeypatch.setattr(omniglot, "ARCHIVES", {"images_background": 1})
    archive = as_zips(entries({"images_background": 1}), tmp_path) / "images_background.zip"
    whole, expected = archive.read_bytes(), omniglot.open_archive(tmp_path, "images_background")

    @settings(max_examples=300, deadline=None)
    @given(position=st.integers(0, len(whole) - 1), flip=st.integers(1, 255))
    def check(position, flip):
        content = bytearray(whole)
        content[position] ^= flip
        archive.write_bytes(content)
        try:
            assert omniglot.open_archive(tmp_path, "images_background") == expected
        except omniglot.SourceError as error:
            assert "images_background.zip" in str(error) and "\n" not in str(error)

    check()


def test_an_output_folder_that_cannot_be_made(small, tmp_path):
    as_zips(entries(SMALL), tmp_path)
    (tmp_path / "file").write_text("in the way")
    fails(small("--source", tmp_path, "--out", tmp_path / "file"), "prepare.py: error:", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("error, words", [
    # NumPy's
    (OSError("1000 requested and 12 written"), "not written, room on the disk expected (1000 requested"),
    (OSError(28, "No space left on device"), "No space left on device"),
    (MemoryError("Unable to allocate 1 GiB"), "not enough memory (Unable to allocate 1 GiB)"),
])  # fmt: skip
def test_a_full_disk_and_too_little_memory_are_named(small, tmp_path, monkeypatch, error, words):
    def save(*_):
        raise error

    as_zips(entries(SMALL), tmp_path)
    monkeypatch.setattr(np, "save", save)
    fails(small("--source", tmp_path, "--out", tmp_path / "out"), "prepare.py: error:", words)
    assert not list((tmp_path / "out").iterdir())


def test_errors_as_a_user_sees_them(full, tmp_path):
    def script(*args):
        return run("data/omniglot", *args, "--out", tmp_path / "out", script="prepare.py")

    fails(script("--source", tmp_path), "prepare.py: error:", "found neither images_background.zip")
    fails(script("--sauce", tmp_path), "prepare.py: error:", "unrecognized arguments: --sauce")
    content = bytearray((full[0] / "images_background.zip").read_bytes())
    content[5000] ^= 1
    (tmp_path / "images_background.zip").write_bytes(content)
    fails(
        script("--source", tmp_path), "prepare.py: error:", tmp_path / "images_background.zip",
        "damaged or truncated",
    )  # fmt: skip
    assert not (tmp_path / "out").exists()
