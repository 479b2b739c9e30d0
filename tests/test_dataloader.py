"""omniglot/dataloader.py: what it accepts and refuses, and the laws of training sets and episodes."""

import numpy as np
import pytest
import torch
from conftest import bomb, load
from hypothesis import given, settings
from hypothesis import strategies as st

data = load("omniglot", "dataloader")
UserError = data.UserError


def pixels(classes=3, drawings=4, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (classes, drawings, 28, 28, 1), dtype=np.uint8)


def save(folder, array):
    np.save(folder / "train.npy", array)
    return folder


def refuses(folder, *words):
    """Assert that loading folder/train.npy ends in a one-line UserError with the file and all `words`."""
    with pytest.raises(UserError) as caught:
        data.load_split(folder, "train")
    message = str(caught.value)
    assert "\n" not in message
    for word in ("train.npy", *words):
        assert word in message


# --- what is read ---------------------------------------------------------------------------------


def test_uint8_is_kept_and_read_as_floats_from_0_to_1(tmp_path):
    array = pixels()
    array[0, 0, 0, :2, 0] = 0, 255
    images = data.load_split(save(tmp_path, array), "train")
    assert images.dtype == torch.uint8 and torch.equal(images, torch.from_numpy(array))
    floats = data.as_float(images)
    assert floats.dtype == torch.float32 and floats[0, 0, 0, :2, 0].tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_float_and_uint8_files_give_equal_images(tmp_path, dtype):
    from_bytes = data.as_float(data.load_split(save(tmp_path, pixels()), "train"))
    from_floats = data.load_split(save(tmp_path, (pixels() / dtype(255)).astype(dtype)), "train")
    assert from_floats.dtype == torch.float32
    assert torch.equal(data.as_float(from_floats), from_bytes)


def test_half_precision_and_any_memory_order_are_read(tmp_path):
    halves = data.load_split(save(tmp_path, (pixels() / 255).astype(np.float16)), "train")
    assert halves.dtype == torch.float32
    assert torch.allclose(halves, torch.from_numpy(pixels() / 255).float(), atol=1e-3)
    assert np.array_equal(data.load_split(save(tmp_path, np.asfortranarray(pixels())), "train"), pixels())


# --- what is refused ------------------------------------------------------------------------------


def test_a_missing_file_names_the_scripts_that_make_it(tmp_path):
    refuses(tmp_path, "not found", "prepare.py")


def test_a_folder_in_place_of_the_file(tmp_path):
    (tmp_path / "train.npy").mkdir()
    refuses(tmp_path, "not a readable .npy array")


def test_a_damaged_header(tmp_path):
    """NumPy says it in three lines."""
    (tmp_path / "train.npy").write_bytes(b"\x93NUMPY\x01\x00\xff\xff" + bytes(2**16))
    refuses(tmp_path, "not a readable .npy array")


@pytest.mark.parametrize("kept", [0, 5, 40, 128, 1000, -1])
def test_a_truncated_file(tmp_path, kept):
    save(tmp_path, pixels())
    (tmp_path / "train.npy").write_bytes((tmp_path / "train.npy").read_bytes()[:kept])
    refuses(tmp_path, "not a readable .npy array")


@pytest.mark.parametrize("content", [b"hello, I am a text\n", b"PK\x03\x04 not a zip", b"\x93NUMPY\x07\x00"])
def test_a_file_of_another_kind(tmp_path, content):
    (tmp_path / "train.npy").write_bytes(content)
    refuses(tmp_path, "not a readable .npy array")


def test_pickles_are_never_run(tmp_path):
    array = np.empty((1, 1, 28, 28, 1), object)
    array[...] = bomb(tmp_path / "exploded")
    save(tmp_path, array)
    assert not (tmp_path / "exploded").exists()
    refuses(tmp_path, "not a readable .npy array")
    assert not (tmp_path / "exploded").exists()


def test_an_archive_of_arrays(tmp_path):
    with open(tmp_path / "train.npy", "wb") as file:
        np.savez(file, a=pixels())
    refuses(tmp_path, "expected (classes, drawings, 28, 28, 1)")


@pytest.mark.parametrize(
    "shape",
    [
        (),
        (3,),
        (3, 4, 28, 28),
        (12, 28, 28, 1),
        (3, 4, 28, 28, 3),
        (3, 4, 32, 32, 1),
        (3, 4, 1, 28, 28),
        (0, 4, 28, 28, 1),
        (3, 0, 28, 28, 1),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_wrong_shape(tmp_path, shape, dtype):
    refuses(
        save(tmp_path, np.zeros(shape, dtype)), f"shape {shape}", "expected (classes, drawings, 28, 28, 1)"
    )


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint16, bool, np.complex64, "U1", "M8[s]"])
def test_a_wrong_dtype(tmp_path, dtype):
    refuses(
        save(tmp_path, np.zeros((1, 1, 28, 28, 1), dtype)),
        f"dtype {np.dtype(dtype)}",
        "expected uint8 or float",
    )


def white(x):
    return 255 - x


WRONG = {
    "white ground": (white, "looks inverted"),
    "white ground, floats": (lambda x: 1 - x / 255, "looks inverted"),
    "white ground, halves": (lambda x: (1 - x / 255).astype(np.float16), "looks inverted"),
    "bytes 0 to 15": (lambda x: x // 16, "values up to 15, expected ink up to 255"),
    "percent": (lambda x: (x / 2.55).astype(np.uint8), "values up to 100, expected ink up to 255"),
    "divided twice": (lambda x: x / 255 / 255, "expected ink up to 1"),
    "all 255": (lambda x: np.full_like(x, 255), "every value is 255"),
    "all one half": (lambda x: np.full(x.shape, 0.5), "every value is 0.5"),
    "all 0.0": (lambda x: np.zeros(x.shape), "every value is 0.0"),
    "mostly blank": (
        lambda x: x * (np.arange(20) < 9)[:, None, None, None].astype(np.uint8),
        "275 of 500 drawings are blank",
    ),
    "axes swapped": (lambda x: x.swapaxes(0, 1), "(20, 25, 28, 28, 1)"),
    "axes swapped, floats": (lambda x: x.swapaxes(0, 1) / 255, "axes look swapped"),
}


@pytest.mark.parametrize("case", WRONG)
def test_values_that_are_not_ink_on_an_empty_ground(case, glyphs_dir, tmp_path):
    change, words = WRONG[case]
    refuses(save(tmp_path, change(np.load(glyphs_dir / "val.npy"))), words)


def test_grey_images_and_few_drawings_are_read(glyphs_dir, tmp_path):
    glyphs = np.load(glyphs_dir / "val.npy")
    for array in (
        glyphs // 2 + 70,
        glyphs[:3],
        glyphs[:, :1],
        glyphs[:5, :, :, ::-1],
        (glyphs > 127).astype(np.float32),
        glyphs // 2 + 1,
    ):
        assert data.load_split(save(tmp_path, array), "train").shape == array.shape


def test_drawings_that_do_not_lie_class_by_class(glyphs_dir, capsys):
    glyphs = torch.from_numpy(np.load(glyphs_dir / "val.npy"))
    data.say_if_mixed("val.npy", glyphs)
    data.say_if_mixed("val.npy", torch.zeros_like(glyphs))
    assert not capsys.readouterr().out
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    data.say_if_mixed("val.npy", glyphs.flatten(0, 1)[order].view_as(glyphs))
    assert "val.npy: images of a class are no more alike than others" in capsys.readouterr().out


def test_a_run_names_the_split_whose_drawings_do_not(glyphs_dir, tmp_path, capsys):
    for name in ("train", "val", "test"):
        glyphs = np.load(glyphs_dir / f"{name}.npy")
        order = np.random.default_rng(0).permutation(500) if name == "val" else np.arange(20 * len(glyphs))
        np.save(tmp_path / f"{name}.npy", glyphs.reshape(-1, 28, 28, 1)[order].reshape(glyphs.shape))
    data.load_splits(load("omniglot", "main").parse_args(["--data-dir", str(tmp_path)]))
    said = capsys.readouterr().out
    assert said.count("do they lie class by class") == 1 and said.startswith(f"{tmp_path}/val.npy: ")


@pytest.mark.parametrize(
    "value, word",
    [(1.5, "1.5"), (255.0, "255"), (-0.25, "-0.25"), (np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")],
)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_single_value_out_of_range(tmp_path, value, word, dtype):
    array = (pixels() / 255).astype(dtype)
    array[1, 2, 13, 17, 0] = value
    refuses(save(tmp_path, array), word, "expected floats in [0, 1]")


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 300), value=st.integers(0, 255))
def test_one_damaged_byte_is_refused_or_harmless(tmp_path_factory, position, value):
    """Header or data: either the one-line error or an array of the promised form, never another exception."""
    folder = save(tmp_path_factory.mktemp("damaged"), (pixels(2, 2) / 255).astype(np.float32))
    content = bytearray((folder / "train.npy").read_bytes())
    content[position] = value
    (folder / "train.npy").write_bytes(content)
    try:
        images = data.load_split(folder, "train")
    except UserError as error:
        assert "train.npy" in str(error) and "\n" not in str(error)
    else:
        assert images.shape[2:] == (28, 28, 1) and images.dtype in (torch.uint8, torch.float32)
        assert 0 <= data.as_float(images).min() and data.as_float(images).max() <= 1


def test_too_few_classes_or_drawings(tmp_path):
    images = torch.zeros(7, 20, 28, 28, 1, dtype=torch.uint8)
    data.check_episodes(tmp_path, "val", images, ways=[5, 7], shots=[1, 5], query=15)  # exactly enough
    with pytest.raises(UserError, match=r"val\.npy: 7 classes, expected at least 8 for 8-way"):
        data.check_episodes(tmp_path, "val", images, ways=[8, 5], shots=[1], query=15)
    with pytest.raises(
        UserError, match=r"test\.npy: 20 drawings a class, expected at least 21 \(5 shots \+ --query 16\)"
    ):
        data.check_episodes(tmp_path, "test", images, ways=[5], shots=[5, 1], query=16)


# --- training sets --------------------------------------------------------------------------------


def numbered(count, size=28):
    """Images that tell which they are: pixel values 0..count-1, count up to 256."""
    return torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, size, size, 1)


@settings(max_examples=40, deadline=None)
@given(sets=st.integers(1, 5), size=st.integers(1, 20), spare=st.integers(0, 40), seed=st.integers(0, 2**31))
def test_sets_are_of_distinct_images_as_floats(sets, size, spare, seed):
    images = numbered(sets * size + spare)
    x = data.draw_sets(images, sets, size, torch.Generator().manual_seed(seed))
    assert x.shape == (sets, size, 28, 28, 1) and x.dtype == torch.float32
    assert 0 <= x.min() and x.max() <= 1
    drawn = (x * 255).round()
    assert (drawn == drawn[..., :1, :1, :]).all()  # every image came whole
    assert len(drawn[..., 0, 0, 0].unique()) == sets * size


def test_sets_follow_the_generator_alone():
    draw = lambda generator: data.draw_sets(numbered(100), 2, 10, generator)  # noqa: E731
    first, second = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    a = draw(first)
    torch.manual_seed(1)
    assert torch.equal(a, draw(second))
    assert not torch.equal(a, draw(first))  # the next step sees other images
    assert torch.equal(draw(first), [draw(second), draw(second)][1])


def test_every_image_is_drawn_equally_often():
    images, generator, counts = numbered(50, size=1), torch.Generator().manual_seed(0), torch.zeros(50)
    for _ in range(2000):
        x = data.draw_sets(images, 2, 5, generator)
        counts += torch.bincount((x[..., 0, 0, 0] * 255).round().long().flatten(), minlength=50)
    expected = 2000 * 10 / 50
    assert (counts - expected).abs().max() < 5 * expected**0.5


# --- episodes -------------------------------------------------------------------------------------

shapes = st.tuples(st.integers(1, 25), st.integers(2, 20), st.data())


@settings(max_examples=60, deadline=None)
@given(shape=shapes, count=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_an_episode_has_distinct_classes_and_distinct_drawings(shape, count, seed):
    classes, drawings, draw = shape
    way, shot = draw.draw(st.integers(1, classes)), draw.draw(st.integers(1, drawings - 1))
    query = draw.draw(st.integers(1, drawings - shot))
    episodes = data.draw_episodes(torch.empty(classes, drawings, 1), way, shot, query, count, seed)
    assert episodes.shape == (count, way, shot + query) and episodes.dtype == torch.int64
    assert 0 <= episodes.min() and episodes.max() < classes * drawings
    for episode in episodes:
        of_class = episode // drawings
        assert (of_class == of_class[:, :1]).all()  # a row is one class
        assert len(of_class[:, 0].unique()) == way
        assert len(episode.unique()) == episode.numel()  # so support and query share no drawing


def test_episodes_follow_the_seed_alone():
    images = torch.empty(30, 20, 1)
    torch.manual_seed(0)
    a = data.draw_episodes(images, 5, 1, 15, 50, seed=1)
    torch.manual_seed(1)
    assert torch.equal(a, data.draw_episodes(images.to(torch.uint8), 5, 1, 15, 50, seed=1))
    assert not torch.equal(a, data.draw_episodes(images, 5, 1, 15, 50, seed=2))
    assert len({tuple(episode.flatten().tolist()) for episode in a}) == 50


def test_every_class_and_drawing_is_drawn_equally_often_in_every_place():
    classes, drawings, way, shot, query, count = 12, 20, 5, 2, 6, 6000
    episodes = data.draw_episodes(torch.empty(classes, drawings, 1), way, shot, query, count, seed=0)
    for k in range(way):  # the place of a class is its label: no class may prefer one
        counts = torch.bincount(episodes[:, k, 0] // drawings, minlength=classes)
        expected = count / classes
        assert (counts - expected).abs().max() < 5 * expected**0.5
    for members in (episodes[:, :, :shot], episodes[:, :, shot:]):
        counts = torch.bincount(members.flatten(), minlength=classes * drawings)
        expected = members.numel() / (classes * drawings)
        assert (counts - expected).abs().max() < 5 * expected**0.5


def test_the_drawings_of_one_class_do_not_depend_on_those_of_another():
    episodes = data.draw_episodes(torch.empty(10, 20, 1), 2, 1, 1, 8000, seed=0) % 20
    same = (episodes[:, 0, 0] == episodes[:, 1, 0]).float().mean()
    assert abs(same - 1 / 20) < 5 * (0.05 * 0.95 / 8000) ** 0.5
