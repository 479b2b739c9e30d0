"""Official Omniglot archives -> train.npy, val.npy, test.npy and split.json, as the experiment reads them.

    python data/omniglot/prepare.py                 # downloads the two archives (14 MB)
    python data/omniglot/prepare.py --source DIR    # images_background.zip, images_evaluation.zip

1,623 characters, shuffled by random.Random(47) and cut 1200/100/323; each character's four rotations are four
classes of one split. Arrays are (4800|400|1292, 20, 28, 28, 1) uint8, ink high.
"""

import argparse
import io
import json
import os
import random
import signal
import sys
import tempfile
import zipfile
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image
from tqdm import tqdm

ARCHIVES = {"images_background": 964, "images_evaluation": 659}  # characters in each
DRAWINGS, ROTATIONS = 20, (0, 90, 180, 270)
SPLITS = {"train": 1200, "val": 100, "test": 323}  # characters


class SourceError(Exception):
    """Archives that cannot be used: the message names what was found and what was expected."""


def download(folder):
    """Both official archives into `folder`, checked against their published MD5 sums by torchvision."""
    from torchvision.datasets import Omniglot
    from torchvision.datasets.utils import download_url

    for name in ARCHIVES:
        file = f"{name}.zip"
        try:
            download_url(f"{Omniglot.download_url_prefix}/{file}", folder, file, Omniglot.zips_md5[name])
        except (OSError, RuntimeError, HTTPException) as error:
            instead = "fetch it yourself and pass its folder as --source"
            raise SourceError(f"{file}: download failed ({error}); {instead}") from None


def is_drawing(path):
    """Say whether a path is a PNG of Alphabet/characterNN/ and not one of the files that macOS adds."""
    *folders, name = path.split("/")
    added = name.startswith("._") or "__MACOSX" in folders
    return len(folders) > 1 and name.lower().endswith(".png") and not added


def open_archive(source, name):
    """The PNGs of one archive: {'Alphabet/characterNN': [bytes of its 20 drawings, in order of file name]}.

    Reads `name`.zip or the folder `name` in `source`; folders above the alphabets do not count.
    Raises SourceError if it is missing, damaged or incomplete.
    """
    folder, archive = source / name, source / f"{name}.zip"
    contents = {}
    if archive.is_file():
        try:
            with zipfile.ZipFile(archive) as file:
                for entry in file.namelist():
                    if is_drawing(entry):
                        contents[entry] = file.read(entry)
        except Exception as error:  # zipfile raises many kinds for a damaged archive
            expected = "expected the official zip archive"
            raise SourceError(f"{archive}: damaged or truncated ({error}), {expected}") from None
        where = archive
    elif folder.is_dir():
        for root, _, files in os.walk(folder, followlinks=True):
            for path in (Path(root, file) for file in files):
                if is_drawing(path.relative_to(source).as_posix()):
                    contents[path.relative_to(source).as_posix()] = path.read_bytes()
        where = folder
    else:
        there = sorted(path.name for path in source.iterdir()) if source.is_dir() else []
        there = f"; found: {', '.join(there[:5])}" if there else ""
        neither = f"found neither {name}.zip nor a folder {name}"
        raise SourceError(f"{source}: {neither}, expected one of them{there}")
    characters, places = {}, {}
    for path in sorted(contents):
        place, character = path.rpartition("/")[0], "/".join(path.split("/")[-3:-1])
        if places.setdefault(character, place) != place:
            both = f"{places[character]} and in {place}"
            raise SourceError(f"{where}: {character} found in {both}, one expected")
        characters.setdefault(character, []).append(contents[path])
    if len(characters) != ARCHIVES[name]:
        first = f" (such as {min(contents)})" if contents else ""
        raise SourceError(f"{where}: {len(characters)} characters found, {ARCHIVES[name]} expected{first}")
    for character, drawings in characters.items():
        if len(drawings) != DRAWINGS:
            raise SourceError(f"{where}: {character} has {len(drawings)} drawings, {DRAWINGS} expected")
    return characters


# EXIF's orientation -> what turns the picture upright
UPRIGHT = dict(zip(range(2, 9), [Image.Transpose(i) for i in (0, 3, 1, 5, 4, 6, 2)]))


def plain(image):
    """Make a picture of any mode an opaque one of 8 bits, upright by its EXIF; RGB and L stay as they are.

    Raises ValueError where the mode's range does not hold the values.
    """
    image.load()
    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # a damaged EXIF says nothing, the pixels may be whole
        turn = None
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
        # On white, as on paper: a drawing that is only in the alpha channel is ink. White ink goes on black.
        image = image.convert("RGBA")
        grounds = (Image.new("RGBA", image.size, ground) for ground in ("white", "black"))
        flats = [Image.alpha_composite(ground, image).convert("RGB") for ground in grounds]
        seen, other, meant = (max(high - low for low, high in of.getextrema()[:3]) for of in (*flats, image))
        if max(seen, other) < 32 <= meant:
            raise ValueError("too transparent to be seen, an opaque picture expected")
        image = flats[seen < 32 <= other]
    return image if turn is None else image.transpose(turn)


def read_drawing(png, name):
    """One 1-bit PNG -> (28, 28) uint8, ink 255 on 0.

    The PNG is made 8-bit grey *before* resizing: Pillow resizes 1-bit images by nearest neighbour, which
    breaks strokes.
    """
    try:
        image = Image.open(io.BytesIO(png), formats=["PNG"])
        if image.size == (105, 105):
            image = plain(image).convert("L")
    except Exception as error:  # Pillow raises many kinds for a damaged image
        found = str(error).partition(" <_io")[0]
        raise SourceError(f"{name}: not a readable PNG ({found})") from None
    if image.size != (105, 105):
        raise SourceError(f"{name}: {image.size[0]}x{image.size[1]} pixels found, 105x105 expected")
    low, high = image.getextrema()
    if low == high:
        raise SourceError(f"{name}: every pixel is {low}, expected a drawing of dark ink on white")
    ink = 1 - np.asarray(image).mean() / 255
    if ink > 0.5:
        raise SourceError(f"{name}: {100 * ink:.0f} % dark, looks inverted, expected dark ink on white")
    return 255 - np.asarray(image.resize((28, 28), Image.Resampling.LANCZOS))


def prepare(source):
    """-> ({split: uint8 array (classes, 20, 28, 28, 1)}, {split: characters in order})."""
    characters = {}
    for name in ARCHIVES:
        characters |= open_archive(source, name)
    order = sorted(characters)
    random.Random(47).shuffle(order)
    arrays, split, start = {}, {}, 0
    with tqdm(total=len(order), desc="characters", unit="char") as bar:
        for name, count in SPLITS.items():
            split[name] = order[start : start + count]
            start += count
            images = np.empty((count, len(ROTATIONS), DRAWINGS, 28, 28), np.uint8)
            for i, character in enumerate(split[name]):
                drawings = enumerate(characters[character], start=1)
                upright = np.stack([read_drawing(png, f"{character}, drawing {n}") for n, png in drawings])
                for r in range(len(ROTATIONS)):
                    images[i, r] = np.rot90(upright, r, axes=(1, 2))
                bar.update()
            arrays[name] = images.reshape(-1, DRAWINGS, 28, 28, 1)
    return arrays, split


def write_all(out, arrays, split):
    """All files or none: everything is written beside its place first, then renamed."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".prepare-") as folder:
        for name, array in arrays.items():
            np.save(f"{folder}/{name}.npy", array)
        rows = "class 4 i + r is character i rotated by rotations[r]"
        facts = {"rotations": ROTATIONS, "rows": rows, **split}
        Path(folder, "split.json").write_text(json.dumps(facts, indent=1) + "\n")
        for name in [*(f"{name}.npy" for name in arrays), "split.json"]:
            os.replace(f"{folder}/{name}", out / name)


class Parser(argparse.ArgumentParser):
    """Says an error in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def lenient(method):
    """Make a stream's method lose what it cannot write: to a closed pipe, to a full disk."""

    def call(*args):
        with suppress(OSError):
            return method(*args)

    return call


def print_anywhere():
    """Have output that is closed, that nobody reads, or in an encoding without some sign, end nothing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        stream.reconfigure(errors="replace")
        stream.write, stream.flush = lenient(stream.write), lenient(stream.flush)
        setattr(sys, name, stream)


def user_path(text):
    """Parse a path, `~` included, which a shell leaves alone after an equals sign."""
    return Path(os.path.expanduser(text))


def in_words(error, out):
    """Say what ended the program: a full disk and a want of memory by their names."""
    if isinstance(error, MemoryError):
        return f"not enough memory ({error})"
    if not isinstance(error, OSError):
        return error
    # NumPy's error of a full disk has no number.
    said = error.strerror or f"not written, room on the disk expected ({error})"
    return f"{error.filename or out}: {said}"


def main():
    print_anywhere()
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    here = Path(__file__).resolve().parent
    parser.add_argument("--source", type=user_path,
                        help="folder with the two archives or their folders (default: download)")  # fmt: skip
    parser.add_argument("--out", type=user_path, default=here, help="where the arrays go (default: here)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))  # unfinished files go
    try:
        if args.source is None:
            args.source = here / "archives"
            download(args.source)
        arrays, split = prepare(args.source)
        write_all(args.out, arrays, split)
    except (SourceError, OSError, MemoryError) as error:
        print(f"prepare.py: error: {in_words(error, args.out)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    for name, array in arrays.items():
        print(f"{args.out / name}.npy  {array.shape} {array.dtype}")


if __name__ == "__main__":
    main()
