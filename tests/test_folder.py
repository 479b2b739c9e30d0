"""data/folder/prepare.py: class folders of pictures become what omniglot/ and simclr/ read."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from conftest import fails, load, run

OMNIGLOT = ["split.json", "test.npy", "train.npy", "val.npy"]
ARRAYS = [f"{split}{part}.npy" for split in ("train", "val", "test") for part in ("", "_labels")]
SIMCLR = sorted(["classes.json", *ARRAYS])


def prepare(source, out, *args):
    return run("data/folder", "--source", source, "--out", out, *args, script="prepare.py")


def make(folder, classes=20, members=4, light=True, mode="L", size=(56, 56)):
    """A bar at a place of its own for each class, drawn by hand."""
    for c in range(classes):
        (folder / f"class{c:02d}").mkdir(parents=True)
        for m in range(members):
            ink = np.zeros(size[::-1], np.uint8)
            ink[8 + m : 48 - m, 8 + 2 * c : 12 + 2 * c] = 250
            image = Image.fromarray(255 - ink if light else ink).convert(mode)
            image.save(folder / f"class{c:02d}/{m}.png")
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("light", [True, False])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "1"])
def test_drawings_for_omniglot(tmp_path, light, mode):
    result = prepare(make(tmp_path / "in", light=light, mode=mode), tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert f"{'light' if light else 'dark'} ground" in result.stdout
    assert names(tmp_path / "out") == OMNIGLOT
    split, classes = json.loads((tmp_path / "out/split.json").read_text()), []
    for name, count in (("train", 10), ("val", 5), ("test", 5)):
        images = load("omniglot", "dataloader").load_split(tmp_path / "out", name).numpy()
        assert images.shape == (count, 4, 28, 28, 1) and np.median(images) == 0 and images.max() > 200
        for x, member in zip(images[:, 0, 14, :, 0].astype(float), split[name]):
            assert abs((x * np.arange(28)).sum() / x.sum() + 0.5 - (10 + 2 * int(member[5:])) / 2) < 0.2
        classes += split[name]
    assert sorted(classes) == names(tmp_path / "in")


def test_shares_and_the_first_pictures_by_name(tmp_path):
    """50 classes are cut 32 / 8 / 10; where another class has four pictures, the first four of five stay."""
    for c in range(50):
        (tmp_path / f"in/{c:02d}").mkdir(parents=True)
        for m in range(4 + (c == 7)):
            ink = np.full((28, 28), 255, np.uint8)
            ink[4 : 8 + m, 4:8], ink[10:20, 10] = 0, 255 - c
            ink[20, 20 : 21 + m] = c
            Image.fromarray(ink).save(tmp_path / f"in/{c:02d}/{m}.png")
    assert prepare(tmp_path / "in", tmp_path / "out").returncode == 0
    split = json.loads((tmp_path / "out/split.json").read_text())
    assert [len(split[name]) for name in ("train", "val", "test")] == [32, 8, 10]
    (name,) = (name for name in ("train", "val", "test") if "07" in split[name])
    found = np.load(tmp_path / f"out/{name}.npy")[split[name].index("07")][..., 0]
    assert [(of[:20, 5] > 127).sum() for of in found] == [4, 5, 6, 7]


def test_a_wide_drawing_keeps_its_shape_on_its_own_ground(tmp_path):
    make(tmp_path / "in", size=(112, 56))  # twice as wide as high
    assert prepare(tmp_path / "in", tmp_path / "out").returncode == 0
    for name in ("train", "val", "test"):
        images = np.load(tmp_path / f"out/{name}.npy")[..., 0]
        assert images[:, :, :6].max() == images[:, :, -6:].max() == 0 and (images.max((2, 3)) > 100).all()


def test_pictures_for_simclr(tmp_path):
    make(tmp_path / "in", mode="RGB", size=(120, 60))
    assert prepare(tmp_path / "in", tmp_path / "out", "--for", "simclr").returncode == 0
    assert names(tmp_path / "out") == SIMCLR
    assert load("simclr", "dataloader").load_split(tmp_path / "out", "val").shape == (5, 4, 84, 84, 3)
    split = json.loads((tmp_path / "out/classes.json").read_text())
    expected = Image.open(tmp_path / "in" / split["val"][1] / "2.png")
    expected = expected.resize((84, 84), Image.Resampling.BILINEAR)
    assert (np.load(tmp_path / "out/val.npy")[4 + 2] == np.asarray(expected)).all()


def test_the_seed_decides_the_split(tmp_path):
    make(tmp_path / "in")
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert prepare(tmp_path / "in", tmp_path / out, "--seed", seed).returncode == 0
    a, b, c = ([(tmp_path / out / name).read_bytes() for name in OMNIGLOT] for out in "abc")
    assert a == b != c


def test_unequal_classes_keep_the_smallest_count_and_say_so(tmp_path):
    make(tmp_path / "in")
    (tmp_path / "in/class07/0.png").unlink()
    result = prepare(tmp_path / "in", tmp_path / "out")
    assert "3 pictures of each class kept, as many as class07 has; 19 of 79 left out" in result.stdout
    assert np.load(tmp_path / "out/train.npy").shape == (10, 3, 28, 28, 1)


def test_every_class_folder_counts(tmp_path):
    make(tmp_path / "in")
    (tmp_path / "in/class07").rename(tmp_path / "in/_g")
    (tmp_path / "in/class03/more.png").mkdir()
    (tmp_path / "in/__MACOSX").mkdir()
    result = prepare(tmp_path / "in", tmp_path / "out")
    assert result.returncode == 0 and "left out" not in result.stdout, result.stderr
    split = json.loads((tmp_path / "out/split.json").read_text())
    assert "_g" in split["train"] + split["val"] + split["test"]


def test_a_class_on_another_ground(tmp_path):
    source = make(tmp_path / "in")
    for path in (source / "class07").iterdir():
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    fails(prepare(source, tmp_path / "out"), "76 of 80 pictures have a light border", "--ground")
    assert prepare(source, tmp_path / "out", "--ground", "light").returncode == 0


def test_what_is_refused(tmp_path):
    source, out = make(tmp_path / "in"), tmp_path / "out"
    fails(prepare(tmp_path / "nowhere", out), "--source", "nowhere")
    colour = prepare(source, out, "--for", "simclr", "--ground", "light")
    fails(colour, "--ground: light found, none expected with --for simclr")
    few = make(tmp_path / "few", classes=14)
    fails(prepare(few, out), "few: 14 class folders found, at least 15 expected")
    fails(prepare(tmp_path, out), "few: no picture found (class00, class01, class02)")
    one = make(tmp_path / "one", members=1)
    fails(prepare(one, out), "class00: 1 picture found, at least 2 in each class expected")
    fails(prepare(source, out, "--ground", "dark"), "has ink up to 255, mean 2", "expected up to 255")
    pale = make(tmp_path / "pale", light=False)
    for path in pale.glob("*/*.png"):
        Image.fromarray(np.asarray(Image.open(path)) // 5).save(path)
    fails(prepare(pale, out), "has ink up to 5", "expected up to 255 on an empty ground")
    for c in range(8):
        for path in (source / f"class{c:02d}").iterdir():
            Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    fails(prepare(source, out), "48 of 80 pictures have a light border", "--ground")
    (source / "class03/2.png").write_bytes(b"not a picture")
    fails(prepare(source, out), "class03/2.png: not a readable picture")
    assert not out.exists()


def test_the_same_pictures_in_two_class_folders(tmp_path):
    source = make(tmp_path / "in")
    for c in range(1, 20):
        shutil.copytree(
            source / f"class{c:02d}", source / "class00", dirs_exist_ok=True
        )  # the last one's stay
    shutil.rmtree(source / "class18")
    result = {seed: prepare(source, tmp_path / f"out{seed}", "--seed", seed) for seed in range(4)}
    refused = [seed for seed, of in result.items() if of.returncode]
    assert refused
    for seed in refused:
        fails(result[seed], "4 pictures stand in several class folders (class", "class00", "class19")
        assert not (tmp_path / f"out{seed}").exists()
