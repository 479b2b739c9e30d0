"""data/omniglot/prepare.py: what it writes, and how it fails.

The archives are invented: complete ones (1,623 characters) run through the script as a user runs it; small
ones, with the script's counts lowered, run inside this process, where a damaged file costs milliseconds.
"""

import io
import json
import random
import shutil
import sys
import urllib.error
import zipfile
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import fails, load, needs_shared_data, run
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

omniglot = load("data/omniglot", "prepare")
FILES = ["split.json", "test.npy", "train.npy", "val.npy"]
FULL = {"images_background": 964, "images_evaluation": 659}
SMALL = {"images_background": 5, "images_evaluation": 4}


# --- invented archives ----------------------------------------------------------------------------


def png(paper):
    """(105, 105) bool, paper True -> a 1-bit PNG, as Omniglot's."""
    buffer = io.BytesIO()
    Image.fromarray(paper).convert("1").save(buffer, "PNG")
    return buffer.getvalue()


def drawing(code):
    """An upright drawing that says which it is: 7 x 7 cells of ink, an asymmetric corner and then `code` in
    binary.

    A cell is 15 pixels of 105 and 4 of 28.
    """
    cells = np.zeros(49, bool)
    cells[[0, 1]] = True
    cells[14:35] = [code >> bit & 1 for bit in range(21)]
    return png(~np.kron(cells.reshape(7, 7), np.ones((15, 15), bool)))


def read_code(image):
    """The reverse of `drawing` on a (28, 28) array; fails unless the drawing stands upright."""
    cells = image.reshape(7, 4, 7, 4)[:, 1:3, :, 1:3].mean((1, 3)).flatten() > 127
    assert cells[[0, 1]].all() and not cells[2:14].any() and not cells[35:].any()
    return sum(int(bit) << i for i, bit in enumerate(cells[14:35]))


def entries(counts, drawings=20):
    """{archive: {path in it: PNG}}; a small drawing's code is its character * 32 + its number, a full one's
    has no number."""
    archives, code = {}, 0
    for name, count in counts.items():
        archives[name] = {}
        for i in range(count):
            image = drawing(code)
            for n in range(drawings):
                character = f"{name[7:].title()}{i // 30:02d}/character{i % 30 + 1:02d}"
                path = f"{name}/{character}/{code:04d}_{n + 1:02d}.png"
                archives[name][path] = image if counts is FULL else drawing(code * 32 + n)
            code += 1
    return archives


def as_zips(archives, folder, compression=zipfile.ZIP_DEFLATED):
    for name, files in archives.items():
        with zipfile.ZipFile(folder / f"{name}.zip", "w", compression) as file:
            file.writestr(f"__MACOSX/{name}/A/character01/._0001_01.png", b"what macOS adds to archives")
            for path in random.Random(0).sample(
                sorted(files), len(files)
            ):  # an archive has no order to rely on
                file.writestr(path, files[path])
    return folder


def as_folders(archives, folder):
    for files in archives.values():
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
    return folder


def written(folder):
    """{name: bytes} of everything in a folder, hidden files included."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="session")
def full(tmp_path_factory):
    """(zips, what the script wrote from them) for complete archives."""
    source, out = tmp_path_factory.mktemp("zips"), tmp_path_factory.mktemp("out")
    as_zips(entries(FULL), source, zipfile.ZIP_STORED)
    result = run("data/omniglot", "--source", source, "--out", out, script="prepare.py")
    assert result.returncode == 0, result.stderr
    assert "train.npy  (4800, 20, 28, 28, 1) uint8" in result.stdout
    return source, out


@pytest.fixture
def small(monkeypatch, capsys):
    """The script with lowered counts: a function of its arguments -> what subprocess.run would return."""
    monkeypatch.setattr(omniglot, "ARCHIVES", SMALL)
    monkeypatch.setattr(omniglot, "SPLITS", {"train": 4, "val": 2, "test": 3})

    def main(*args):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, args)])
        status = 0
        try:
            omniglot.main()
        except SystemExit as stop:
            status = stop.code
        return SimpleNamespace(returncode=status, stderr=capsys.readouterr().err)

    return main


@pytest.fixture
def refuses(small, tmp_path):
    """Assert that the script refuses a source in one line with all `words`, and leaves nothing behind."""

    def check(source, *words):
        fails(small("--source", source, "--out", tmp_path / "refused"), "prepare.py: error:", *words)
        assert not (tmp_path / "refused").exists()

    return check


# --- Omniglot: what is written --------------------------------------------------------------------


def test_complete_archives_give_the_promised_shapes(full):
    _, out = full
    assert sorted(written(out)) == FILES
    for name, classes in (("train", 4800), ("val", 400), ("test", 1292)):
        array = np.load(out / f"{name}.npy", allow_pickle=False)
        assert array.shape == (classes, 20, 28, 28, 1) and array.dtype == np.uint8
        assert array.min() == 0 and array.max() == 255 and np.median(array) == 0  # ink high on paper 0


def test_the_split_is_complete_disjoint_and_the_documented_shuffle(full):
    split = json.loads((full[1] / "split.json").read_text())
    names = sorted(
        "/".join(path.split("/")[1:3]) for files in entries(FULL, drawings=1).values() for path in files
    )
    random.Random(47).shuffle(names)
    assert split["rotations"] == [0, 90, 180, 270]
    assert [len(split[name]) for name in ("train", "val", "test")] == [1200, 100, 323]
    assert split["train"] + split["val"] + split["test"] == names and len(set(names)) == 1623


def test_rows_4i_to_4i_plus_3_are_the_four_rotations_of_character_i(full):
    split = json.loads((full[1] / "split.json").read_text())
    codes = {
        "/".join(path.split("/")[1:3]): int(path[-11:-7])
        for files in entries(FULL, 1).values()
        for path in files
    }
    for name in ("train", "val", "test"):
        images = np.load(full[1] / f"{name}.npy")[..., 0].reshape(-1, 4, 20, 28, 28)
        for r in range(1, 4):
            assert np.array_equal(images[:, r], np.rot90(images[:, 0], r, axes=(2, 3)))
        assert [read_code(image) for image in images[:, 0, 0]] == [
            codes[character] for character in split[name]
        ]
        assert (images == images[:, :, :1]).all()  # these archives hold twenty equal drawings


def test_extracted_folders_give_the_same_bytes_as_zips(small, tmp_path):
    (tmp_path / "zips").mkdir()
    small("--source", as_zips(entries(SMALL), tmp_path / "zips"), "--out", tmp_path / "a")
    small("--source", as_folders(entries(SMALL), tmp_path / "folders"), "--out", tmp_path / "b")
    assert written(tmp_path / "a") == written(tmp_path / "b") and sorted(written(tmp_path / "a")) == FILES


def test_drawings_keep_the_order_of_their_file_names(small, tmp_path):
    assert small("--source", as_zips(entries(SMALL), tmp_path), "--out", tmp_path / "out").returncode == 0
    for name in ("train", "val", "test"):
        for of_character in np.load(tmp_path / f"out/{name}.npy")[::4, ..., 0]:
            codes = [read_code(image) for image in of_character]
            assert codes == [codes[0] // 32 * 32 + n for n in range(20)]


def test_the_same_source_gives_the_same_bytes_and_replaces_older_files(small, tmp_path):
    as_zips(entries(SMALL), tmp_path)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/val.npy").write_bytes(b"old")
    for name in ("a", "b"):
        assert small("--source", tmp_path, "--out", tmp_path / name).returncode == 0
    assert written(tmp_path / "a") == written(tmp_path / "b")


@pytest.mark.parametrize("horizontal", [False, True])
@pytest.mark.parametrize("at", range(10, 95, 7))
def test_the_thinnest_stroke_survives_as_grey(at, horizontal):
    """One pixel of 105 is a quarter of a pixel of 28: nearest neighbour would drop three such strokes in
    four."""
    paper = np.ones((105, 105), bool)
    paper[at] = False
    image = omniglot.read_drawing(png(paper if horizontal else paper.T), "a stroke")
    image = image if horizontal else image.T
    assert (image.max(0) > 30).all() and image.max() < 255
    assert 0.8 < image.mean() / 255 * 105 < 1.3  # all of its ink; the filter's negative lobes are cut off
    assert abs(image.mean(1).argmax() + 0.5 - (at + 0.5) * 28 / 105) < 1


def saved(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def test_transparent_and_deep_drawings_mean_what_they_show():
    """Black ink on a transparent ground, 16 bits of grey, and a drawing stored on its side."""
    expected = omniglot.read_drawing(drawing(77), "one")
    paper = np.asarray(Image.open(io.BytesIO(drawing(77))))
    clear = Image.new("LA", (105, 105), (0, 0))
    clear.putalpha(Image.fromarray(np.uint8(255) * ~paper))
    palette = Image.fromarray(paper.astype(np.uint8), "P")
    palette.putpalette([0, 0, 0] * 256)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored a quarter turn to the left
    images = {
        "LA": saved(clear),
        "RGBA": saved(clear.convert("RGBA")),
        "P": saved(palette, transparency=1),
        "16 bits": saved(Image.fromarray(paper.astype(np.uint16) * 65535)),
        "on its side": saved(Image.fromarray(np.rot90(paper.astype(np.uint8) * 255).copy()), exif=exif),
    }
    for name, content in images.items():
        assert np.array_equal(omniglot.read_drawing(content, name), expected), name


# --- Omniglot: what is refused --------------------------------------------------------------------


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


def wrong_size():
    return png(np.ones((28, 28), bool)), "28x28 pixels found, 105x105 expected"


def bomb():
    """A PNG that claims 60000 x 60000 pixels."""
    header = b"IHDR" + (60000).to_bytes(4, "big") * 2 + b"\x01\x00\x00\x00\x00"
    content = drawing(1)
    return content[:12] + header + zlib.crc32(header).to_bytes(4, "big") + content[33:], "not a readable PNG"


@pytest.mark.parametrize(
    "broken",
    [
        wrong_size(),
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


# --- Omniglot: download ---------------------------------------------------------------------------


def test_without_a_source_the_archives_are_downloaded_and_checked(small, tmp_path, monkeypatch):
    from torchvision.datasets import Omniglot

    (tmp_path / "elsewhere").mkdir()
    as_zips(entries(SMALL), tmp_path / "elsewhere")

    def download_url(url, root, filename, md5):
        assert url == f"{Omniglot.download_url_prefix}/{filename}" and md5 == Omniglot.zips_md5[filename[:-4]]
        root.mkdir(exist_ok=True)
        shutil.copy(tmp_path / "elsewhere" / filename, root)

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download_url)
    monkeypatch.setattr(omniglot, "__file__", str(tmp_path / "prepare.py"))
    assert small().returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archives", "elsewhere", *FILES]


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("no route to host"),
        RuntimeError("File not found or corrupted."),
        TimeoutError("timed out"),
    ],
)
def test_a_failed_download_is_one_line(small, tmp_path, monkeypatch, error):
    def download_url(*_):
        raise error

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download_url)
    monkeypatch.setattr(omniglot, "__file__", str(tmp_path / "prepare.py"))
    fails(small(), "images_background.zip: download failed", "--source")
    assert not list(tmp_path.iterdir())


# --- Omniglot: the real one -----------------------------------------------------------------------


@needs_shared_data
def test_real_omniglot(omniglot_dir):
    split = json.loads((omniglot_dir / "split.json").read_text())
    assert len({*split["train"], *split["val"], *split["test"]}) == 1623
    for name, classes in (("train", 4800), ("val", 400), ("test", 1292)):
        array = np.load(omniglot_dir / f"{name}.npy")
        assert array.shape == (classes, 20, 28, 28, 1) and array.dtype == np.uint8
        assert 0.075 < array.mean() / 255 < 0.09 and np.median(array) == 0
        assert (array.max((2, 3, 4)) > 100).all()  # no drawing is empty
