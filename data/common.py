"""What every prepare.py uses: pictures of any kind, files written whole, errors in one line."""

import argparse
import json
import os
import signal
import sys
import tempfile
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


class SourceError(Exception):
    """A source that cannot be used: the message names what was found and what was expected."""


def plain(image):
    """Convert a picture of any mode to an opaque 8-bit one, upright by its EXIF; RGB and L keep their mode.

    Raises ValueError if values lie outside the mode's range or the picture is too transparent.
    """
    image.load()
    with suppress(Exception):  # a damaged EXIF is ignored: the pixels may be intact
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F" or image.mode.startswith("I"):  # beyond 8 bits; the mode says the range
        values, top = np.asarray(image).astype(np.float64), 1.0 if image.mode == "F" else 65535.0
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= top) or (top > 1 and low < high <= 255):  # 255: likely of 8 bits
            found = f"mode {image.mode} with values from {low:g} to {high:g}"
            raise ValueError(f"{found}, 0 to {top:g} expected")
        if isinstance(image.info.get("transparency"), int):
            values[values == image.info["transparency"]] = top
        image = Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))
    elif image.has_transparency_data:
        # Put it on white, as on paper: a drawing only in the alpha channel is ink. White ink goes on black.
        image = image.convert("RGBA")
        grounds = (Image.new("RGBA", image.size, ground) for ground in ("white", "black"))
        flats = [Image.alpha_composite(ground, image).convert("RGB") for ground in grounds]
        seen, other, meant = (max(high - low for low, high in of.getextrema()[:3]) for of in (*flats, image))
        if max(seen, other) < 32 <= meant:
            raise ValueError("too transparent to be seen, an opaque picture expected")
        image = flats[seen < 32 <= other]
    return image


# --- files ----------------------------------------------------------------------------------------


def write_array(path, shape, parts):
    """Write an array of bytes as np.save would, part by part: the whole may not fit in memory."""
    with open(path, "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(part.tobytes())


def write_all(out, files, description, facts):
    """Write {name: array} as .npy and facts as JSON, first to a temporary folder, then by renaming.

    An array may also be the path of its file, or (shape, parts) of bytes too many for the memory. The old
    description is removed before the arrays change; the new one comes after them: a killed run leaves none.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".prepare-") as folder:
        for name, array in files.items():
            place = f"{folder}/{name}.npy"
            if isinstance(array, Path):
                os.replace(array, place)
            elif isinstance(array, tuple):
                write_array(place, *array)
            else:
                np.save(place, array)
        Path(folder, description).write_text(json.dumps(facts, indent=1) + "\n")
        Path(out, description).unlink(missing_ok=True)
        for name in [*(f"{name}.npy" for name in files), description]:
            os.replace(f"{folder}/{name}", out / name)


def folder_beside(out):
    """Make a temporary folder on the disk that `out` is or will be on."""
    there = next(path for path in (out, *out.absolute().parents) if path.is_dir())
    return tempfile.TemporaryDirectory(dir=there, prefix=".prepare-")


# --- the program ----------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Parse flags; print an error in one line."""

    def __init__(self, description):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=raw, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def user_path(text):
    """Parse a path and expand `~`, which a shell leaves alone after an equals sign."""
    return Path(os.path.expanduser(text))


def lenient(method):
    """Make a stream's method drop what it cannot write (closed pipe, full disk)."""

    def call(*args):
        with suppress(OSError):
            return method(*args)

    return call


@contextmanager
def program():
    """Set up the process; on an error that the user can fix, print one line and exit with status 2.

    A closed output, one that nobody reads, or one whose encoding lacks a character does not end the program.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="replace")
        stream.write, stream.flush = lenient(stream.write), lenient(stream.flush)
        setattr(sys, name, stream)
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))  # removes unfinished files
    try:
        yield
    except (SourceError, BrokenProcessPool, OSError, MemoryError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {in_words(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def in_words(error):
    """Describe the error that ended the program; name a full disk and out of memory."""
    if isinstance(error, MemoryError):
        return f"not enough memory ({error})"
    if not isinstance(error, OSError):
        return error
    # NumPy's error of a full disk has neither a file nor a number.
    said = error.strerror or f"not written, room on the disk expected ({error})"
    return f"{error.filename or '--out'}: {said}"
