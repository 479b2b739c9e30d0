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
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import fails, load, needs_shared_data, run, written
from PIL import Image

omniglot = load("data/omniglot", "prepare")
FILES = ["split.json", "test.npy", "train.npy", "val.npy"]
FULL = {"images_background": 964, "images_evaluation": 659}
SMALL = {"images_background": 5, "images_evaluation": 4}


# --- invented archives ----------------------------------------------------------------------------


def saved(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def png(paper):
    """(105, 105) bool, paper True -> a 1-bit PNG, as Omniglot's."""
    return saved(Image.fromarray(paper).convert("1"))


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
