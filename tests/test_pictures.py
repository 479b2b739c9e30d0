"""What a pixel means: depth, transparency and orientation of the pictures that data/imgnet reads."""

import io

import numpy as np
import pytest
from PIL import Image

from conftest import load
from test_imgnet import jpeg

RAMP = np.linspace(0, 255, 84 * 84).reshape(84, 84).round().astype(np.uint8)


def decoded(tmp_path, image, suffix="png", **options):
    image.save(tmp_path / f"one.{suffix}", **options)
    return load("data/imgnet", "prepare").decode((None, str(tmp_path / f"one.{suffix}")))


def with_alpha(colour, alpha, mode):
    image = Image.new("RGBA", (84, 84), (colour, colour, colour))
    image.putalpha(Image.fromarray(alpha))
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_a_drawing_in_the_alpha_channel_is_ink_on_white(tmp_path, mode):
    assert (decoded(tmp_path, with_alpha(0, RAMP, mode)) == 255 - RAMP[..., None]).all()
    assert (
        decoded(tmp_path, with_alpha(255, RAMP, mode)) == RAMP[..., None]
    ).all()  # white on white would be nothing
    light = decoded(tmp_path, with_alpha(250, RAMP, mode)).astype(int)
    assert abs(light - RAMP[..., None] / 255 * 250).max() <= 1
    opaque = with_alpha(90, np.full((84, 84), 255, np.uint8), mode)
    assert (decoded(tmp_path, opaque) == 90).all()
    hidden = Image.fromarray(RAMP).convert("RGBA")
    hidden.putalpha(0)
    assert "too transparent to be seen" in decoded(tmp_path, hidden.convert(mode))


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_is_white(tmp_path, mode):
    """Black is ink in one place and, by an index of its own, the transparent ground in another."""
    image = Image.fromarray((RAMP > 99).astype(np.uint8) * 60 + 20).convert(mode)
    if mode == "P":
        image = Image.fromarray((RAMP > 99).astype(np.uint8), "P")
        image.putpalette([0, 0, 0] * 256)
    ground = {"P": 0, "L": 20, "RGB": (20, 20, 20)}[mode]
    image = decoded(tmp_path, image, transparency=ground)
    assert (image[RAMP <= 99] == 255).all() and (image[RAMP > 99] == (0 if mode == "P" else 80)).all()


@pytest.mark.parametrize(
    "suffix, dtype", [("png", np.uint16), ("tif", np.uint16), ("tif", ">u2"), ("tif", np.int32)]
)
def test_sixteen_bits_of_grey_are_scaled(tmp_path, suffix, dtype):
    image = decoded(tmp_path, Image.fromarray((RAMP.astype(np.uint16) * 257).astype(dtype)), suffix)
    assert (image == RAMP[..., None]).all()
    assert (
        decoded(tmp_path, Image.fromarray(np.full((84, 84), 200, dtype)), suffix).max() == 1
    )  # by mode, not by content
    assert "from 0 to 255, 0 to 65535 expected" in decoded(
        tmp_path, Image.fromarray(RAMP.astype(dtype)), suffix
    )  # of which nothing would be left


def test_what_is_no_picture(tmp_path):
    (tmp_path / "a.jpg").write_text("<html>")
    assert load("data/imgnet", "prepare").decode((None, str(tmp_path / "a.jpg"))).endswith("image file")


def test_floats_are_scaled_or_refused(tmp_path):
    assert (decoded(tmp_path, Image.fromarray(RAMP / np.float32(255)), "tif") == RAMP[..., None]).all()
    for value in (1.5, -0.1, np.nan):
        values = np.full((84, 84), 0.5, np.float32)
        values[3, 4] = value
        assert "0 to 1 expected" in decoded(tmp_path, Image.fromarray(values), "tif")
    assert "0 to 65535 expected" in decoded(
        tmp_path, Image.fromarray(np.full((84, 84), 70000, np.int32)), "tif"
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_a_picture_upright(tmp_path, orientation):
    upright = Image.fromarray(RAMP)
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the way a camera stores it
    stored = upright.transpose(Image.Transpose(back[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert (decoded(tmp_path, stored, exif=exif) == RAMP[..., None]).all()


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_plain_jpeg_keeps_its_bytes(tmp_path, mode):
    for exif in (b"", b"Exif\0\0broken"):
        image = Image.open(io.BytesIO(jpeg(3, mode=mode)))
        image.save(tmp_path / "a.jpg", exif=exif)
        expected = np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB"))
        assert (load("data/imgnet", "prepare").decode((None, str(tmp_path / "a.jpg"))) == expected).all()
