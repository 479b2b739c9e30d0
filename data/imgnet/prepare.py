"""Mini-ImageNet's images and CSVs -> train.npy, val.npy, test.npy with their labels, as the experiment reads them.

    python data/imgnet/prepare.py --source DIR      # DIR holds train.csv, val.csv, test.csv and images/ or zips of it

Every image is decoded and resized to 84x84 RGB once. Arrays are (N, 84, 84, 3) uint8, N = 38400/9600/12000 for
Mini-ImageNet; classes are contiguous, in the CSV's order of first appearance. Any other data set in this layout
works too, as long as all its classes have the same number of images.
"""

import argparse
import csv
import filecmp
import io
import json
import os
import re
import signal
import sys
import tempfile
import unicodedata
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image
from tqdm import tqdm

SPLITS = {"train": 38400, "val": 9600, "test": 12000}  # Mini-ImageNet's own counts
CLASSES = {"train": 64, "val": 16, "test": 20}
SIZE = 84


class SourceError(Exception):
    """A source that cannot be used: the message names every problem found, with its count."""


def read_csv(path):
    """A split's [(filename, label)] in the order of its CSV. Raises SourceError if it is missing, damaged or has no header."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, restval="")
            header = rows.fieldnames or []
            if not {"filename", "label"} <= set(header):
                raise SourceError(f"{path}: header {','.join(header)[:60]!r} found, 'filename,label' expected")
            rows = [(row["filename"], row["label"]) for row in rows]
    except FileNotFoundError:
        raise SourceError(f"{path}: not found, a CSV with the header 'filename,label' expected") from None
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise SourceError(f"{path}: not a readable CSV ({error})") from None
    if not rows:
        raise SourceError(f"{path}: no images found, at least one expected")
    empty = sum(not (filename and label) for filename, label in rows)
    if empty:
        raise SourceError(f"{path}: {empty} of {len(rows)} lines without a filename or a label")
    return rows


def group_by_class(rows):
    """[(filename, label)] with the images of a class together, classes in order of first appearance -> (rows, classes)."""
    classes = list(dict.fromkeys(label for _, label in rows))
    number = {label: i for i, label in enumerate(classes)}
    return sorted(rows, key=lambda row: number[row[1]]), classes


def check_counts(rows):
    """Problems of {split: [(filename, label)]} that need no image: repeated images, unequal classes, a short Mini-ImageNet."""
    problems = []
    repeated = [name for name, count in Counter(filename for split in rows.values() for filename, _ in split).items() if count > 1]
    if repeated:
        problems.append(f"{len(repeated)} images stand more than once in the CSVs (the first: {repeated[0]})")
    splits_of = Counter(label for split in rows.values() for label in sorted({label for _, label in split}))
    shared = [label for label, count in splits_of.items() if count > 1]
    if shared:
        problems.append(f"{len(shared)} classes stand in more than one CSV (the first: {shared[0]}), classes of one split each expected")
    sizes = Counter((split, label) for split in rows for _, label in rows[split])
    usual, times = Counter(sizes.values()).most_common(1)[0]
    unequal = [f"{split}.csv: {label} has {size}" for (split, label), size in sizes.items() if size != usual]
    if unequal:
        problems.append(f"{len(unequal)} of {len(sizes)} classes do not have {usual} images as {times} do (the first: {unequal[0]})")
    classes = {split: {label for _, label in rows[split]} for split in rows}
    wordnet = all(re.fullmatch(r"n\d{8}", label) for labels in classes.values() for label in labels)
    if wordnet and {split: len(labels) for split, labels in classes.items()} == CLASSES:
        for split, expected in SPLITS.items():
            if len(rows[split]) != expected:
                problems.append(f"{split}.csv: {len(rows[split])} images found, Mini-ImageNet's {expected} expected")
    return problems


def keys(name):
    """Give what a picture is found by: its name, that with any spelling of its suffix, its last part."""
    name = unicodedata.normalize("NFC", name)  # macOS hands out NFD
    stem, dot, suffix = name.rpartition(".")
    suffix = suffix.lower().replace("jpeg", "jpg")
    return name, ("path", f"{stem}{dot}{suffix}"), ("last", f"{stem.rpartition('/')[2]}{dot}{suffix}")


def walk(folder):
    """Yield the files below `folder`, in links to folders as well, but not a folder in itself."""
    for root, folders, names in os.walk(folder, followlinks=True):
        here = os.path.realpath(root) + os.sep
        real = {name: os.path.realpath(f"{root}/{name}") + os.sep for name in sorted(folders)}
        folders[:] = [name for name in real if not here.startswith(real[name])]
        for name in sorted(names):
            if os.path.isfile(f"{root}/{name}") and not name.startswith("._"):
                yield Path(root, name)


def find_images(source):
    """Find the images, {key: (zip file or None, path)}, and the problems met: zips that cannot be opened.

    Reads `source`/images/ and every zip in `source`; the part of a zip's paths up to a folder `images/` does
    not count. A loose file comes before a zipped one. Keys are those of `keys`; where two different files of
    a kind have one key, a string that names both stands there. A zip without `images/` is known by its whole
    paths alone if there is an `images/` elsewhere: it may hold masks.
    """
    loose, zipped, entries, problems = {}, {}, {}, []
    archives = sorted(path for path in source.iterdir() if path.suffix.lower() == ".zip")
    for archive in (path for path in archives if not path.name.startswith("._")):
        try:
            with zipfile.ZipFile(archive) as file:
                for entry in file.infolist():
                    last = entry.filename.rpartition("/")[2]
                    if last and not last.startswith("._") and "__MACOSX" not in entry.filename:
                        entries[str(archive), entry.filename] = (entry.CRC, entry.file_size)
        except (zipfile.BadZipFile, OSError) as error:
            problems.append(f"{archive}: damaged or truncated zip archive ({error})")

    def add(index, key, place, same):
        other = index.setdefault(key, place)
        if not isinstance(other, str) and other != place and not same(other, place):
            index[key] = " and ".join(": ".join(filter(None, of)) for of in (other, place))

    for path in walk(source / "images"):
        for key in keys(path.relative_to(source / "images").as_posix()):
            add(loose, key, (None, str(path)), lambda one, other: filecmp.cmp(one[1], other[1], False))
    rooted = bool(loose) or any("/images/" in f"/{path}" for _, path in entries)
    for archive, path in entries:
        _, inside, name = f"/{path}".rpartition("/images/")
        for key in keys(name if inside else path)[: 3 if inside or not rooted else 1]:
            add(zipped, key, (archive, path), lambda one, other: entries[one] == entries[other])
    return zipped | loose, problems


def place_images(rows, found):
    """Place {split: [(filename, label)]}: {split: [place, None if missing, or a string naming two files]}.

    A name without folder may lie in a subfolder, but only if none lies directly in `images/`: what else lies
    deeper could be masks.
    """

    def look(filename, count):
        for name in (filename, filename.removeprefix("images/")):
            for key in keys(name)[: count if "/" not in name else 2]:
                if key in found:
                    return found[key]
        return None

    for count in (2, 3):
        places = {split: [look(filename, count) for filename, _ in rows[split]] for split in rows}
        if any(any(jobs) for jobs in places.values()):
            break
    return places


def check_places(source, rows, places, found):
    """Problems of what `place_images` gives: missing images, names of two files, files of two names."""
    problems, owner = [], {}
    names = sorted(key for key in found if isinstance(key, str))
    beside = sorted(path.name + "/" * path.is_dir() for path in source.iterdir())
    beside = [name for name in beside if not name.lower().endswith((".csv", ".zip"))]
    beside = [name for name in beside if name != "images/" and name[0] != "."]
    there = f"{len(names)} files found, such as {names[0]}" if names else "no file found"
    if beside:
        listed = ", ".join(beside[:4]) + ", ..." * (len(beside) > 4)
        there += f"; not read: {listed}, a folder images/ or a .zip expected"
    for split, jobs in places.items():
        filenames = [filename for filename, _ in rows[split]]
        missing = [filename for filename, place in zip(filenames, jobs) if place is None]
        if missing:
            count = f"{len(missing)} of {len(jobs)} images missing"
            where = f"in {source}/images and the zips beside it"
            problems.append(f"{split}.csv: {count} {where} (the first: {missing[0]})")
        rivals = [(filename, place) for filename, place in zip(filenames, jobs) if isinstance(place, str)]
        if rivals:
            count = f"{len(rivals)} of {len(jobs)} names stand for different files"
            problems.append(f"{split}.csv: {count} (the first: {rivals[0][0]}, {rivals[0][1]}), one expected")
        for filename, place in zip(filenames, jobs):
            first = owner.setdefault(place, filename) if isinstance(place, tuple) else filename
            if first != filename:
                one = ": ".join(filter(None, place))
                problems.append(f"{split}.csv: {filename} and {first} are one file, {one}")
                break
    if any(None in jobs for jobs in places.values()):
        problems.append(f"{source}: {there}")
    return problems


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
        if not (values.min() >= 0 and values.max() <= top):
            found = f"mode {image.mode} with values from {values.min():g} to {values.max():g}"
            raise ValueError(f"{found}, 0 to {top:g} expected")
        if isinstance(image.info.get("transparency"), int):
            values[values == image.info["transparency"]] = top
        image = Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))
    elif image.has_transparency_data:
        # On white, as on paper: a drawing that is only in the alpha channel is ink. White ink goes on black.
        image = image.convert("RGBA")
        for ground in ("white", "black"):
            flat = Image.alpha_composite(Image.new("RGBA", image.size, ground), image).convert("RGB")
            if any(low < high for low, high in flat.getextrema()):
                break
        image = flat
    return image if turn is None else image.transpose(turn)


@lru_cache
def open_zip(path):
    return zipfile.ZipFile(path)


def decode(place):
    """One image -> (84, 84, 3) uint8, or a string that says why it cannot be read. Runs in a process of the pool."""
    archive, path = place
    try:
        data = open_zip(archive).read(path) if archive else Path(path).read_bytes()
        image = plain(Image.open(io.BytesIO(data))).convert("RGB")
        if image.size != (SIZE, SIZE):
            image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)  # antialiased by Pillow, as torchvision's Resize
        return np.asarray(image)
    except (OSError, SyntaxError, ValueError, RuntimeError, zlib.error, zipfile.BadZipFile, Image.DecompressionBombError) as error:
        return " ".join(str(error).split()) or type(error).__name__


def decode_all(places, pool):
    """{split: [place or None]} -> ({split: uint8 array (N, 84, 84, 3)}, {split: [(index, reason)]} of the broken images)."""
    arrays, broken = {}, {}
    bar = tqdm(total=sum(map(len, places.values())), desc="images", unit="img")
    for split, jobs in places.items():
        arrays[split], broken[split] = np.zeros((len(jobs), SIZE, SIZE, 3), np.uint8), []
        known = [i for i, place in enumerate(jobs) if place]
        for i, image in zip(known, pool.map(decode, [jobs[i] for i in known], chunksize=64)):
            if isinstance(image, str):
                broken[split].append((i, image))
            else:
                arrays[split][i] = image
            bar.update()
    bar.close()
    return arrays, broken


def prepare(source):
    """-> ({file name: array}, {split: class names}). Raises SourceError with every problem of the source in one message."""
    rows, classes, problems = {}, {}, []
    for split in SPLITS:
        try:
            rows[split], classes[split] = group_by_class(read_csv(source / f"{split}.csv"))
        except SourceError as error:
            problems.append(str(error))
    if problems:
        raise SourceError("; ".join(problems))
    problems += check_counts(rows)
    found, damaged = find_images(source)
    problems += damaged
    places = place_images(rows, found)
    problems += check_places(source, rows, places, found)
    for jobs in places.values():
        jobs[:] = [job if isinstance(job, tuple) else None for job in jobs]
    # A stop from the keyboard goes to the parent alone, which ends the pool.
    with ProcessPoolExecutor(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        arrays, broken = decode_all(places, pool)
    for split, failures in broken.items():
        if failures:
            index, reason = failures[0]
            count = f"{len(failures)} of {len(rows[split])} images are not readable"
            problems.append(f"{split}.csv: {count} (the first: {rows[split][index][0]}, {reason})")
    if problems:
        raise SourceError("; ".join(problems))
    files = {}
    for split, array in arrays.items():
        number = {label: i for i, label in enumerate(classes[split])}
        files[split] = array
        files[f"{split}_labels"] = np.array([number[label] for _, label in rows[split]], np.int64)
    return files, classes


def write_all(out, files, classes):
    """Everything is written beside its place first, then renamed; classes.json, which says that all are there, goes first and comes last."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".prepare-") as folder:
        for name, array in files.items():
            np.save(f"{folder}/{name}.npy", array)
        Path(folder, "classes.json").write_text(json.dumps(classes, indent=1) + "\n")
        Path(out, "classes.json").unlink(missing_ok=True)
        for name in [*(f"{name}.npy" for name in files), "classes.json"]:
            os.replace(f"{folder}/{name}", out / name)


class Parser(argparse.ArgumentParser):
    """Says an error in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    here = Path(__file__).resolve().parent
    parser.add_argument("--source", type=Path, required=True, help="folder with train.csv, val.csv, test.csv and images/ or zips of it")
    parser.add_argument("--out", type=Path, default=here, help="where the arrays go (default: this script's folder)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))  # takes the unfinished files with it
    try:
        if not args.source.is_dir():
            raise SourceError(f"--source: {args.source} found, a folder with the three CSVs and images/ or zips of it expected")
        files, classes = prepare(args.source)
        write_all(args.out, files, classes)
    except (SourceError, BrokenProcessPool) as error:
        print(f"prepare.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"prepare.py: error: {error.filename or args.out}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    for split, names in classes.items():
        images = files[split]
        print(f"{args.out / split}.npy  {images.shape} {images.dtype}  {len(names)} classes of {len(images) // len(names)} images")


if __name__ == "__main__":
    main()
