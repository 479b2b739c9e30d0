"""Official Omniglot archives -> train.npy, val.npy, test.npy and split.json, as the experiment reads them.

    python data/omniglot/prepare.py                 # downloads the two archives
    python data/omniglot/prepare.py --source DIR    # images_background.zip, images_evaluation.zip

1,623 characters, shuffled by random.Random(47) and cut 1200/100/323; each character's four rotations are four
classes of one split. Arrays are (4800|400|1292, 20, 28, 28, 1) uint8, ink high.
"""

import io
import os
import random
import sys
import zipfile
from http.client import HTTPException
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))
from common import Parser, SourceError, plain, program, user_path, write_all  # noqa: E402

ARCHIVES = {"images_background": 964, "images_evaluation": 659}  # characters in each
DRAWINGS, ROTATIONS = 20, (0, 90, 180, 270)
SPLITS = {"train": 1200, "val": 100, "test": 323}  # characters
RESAMPLING = Image.Resampling.LANCZOS


def download(folder):
    """Download both official archives into `folder`; torchvision checks their published MD5 sums."""
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
    """Tell whether a path is a PNG of Alphabet/characterNN/ and not one of the files that macOS adds."""
    *folders, name = path.split("/")
    added = name.startswith("._") or "__MACOSX" in folders
    return len(folders) > 1 and name.lower().endswith(".png") and not added


def open_archive(source, name):
    """Read the PNGs of an archive: {'Alphabet/characterNN': [bytes of its 20 drawings, by file name]}.

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


def read_drawing(png, name):
    """Read a drawing: one 1-bit PNG -> (28, 28) uint8, ink 255 on 0.

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
    return 255 - np.asarray(image.resize((28, 28), RESAMPLING))


def prepare(source):
    """Make the arrays: ({split: uint8 (classes, 20, 28, 28, 1)}, {split: characters in order})."""
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


def parse_args():
    parser, here = Parser(__doc__), Path(__file__).resolve().parent
    parser.add_argument("--source", type=user_path,
                        help="folder with the two archives or their folders (default: download)")  # fmt: skip
    parser.add_argument("--out", type=user_path, default=here, help="arrays' folder (default: the script's)")
    return parser.parse_args()


def main():
    with program():
        args = parse_args()
        if args.source is None:
            args.source = Path(__file__).resolve().parent / "archives"
            download(args.source)
        arrays, split = prepare(args.source)
        facts = {"rotations": ROTATIONS, "rows": "class 4 i + r is character i rotated by rotations[r]"}
        write_all(args.out, arrays, "split.json", facts | split)
        for name, array in arrays.items():
            print(f"{args.out / name}.npy  {array.shape} {array.dtype}")


if __name__ == "__main__":
    main()
