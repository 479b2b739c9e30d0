"""Mini-ImageNet's images and CSVs -> train.npy, val.npy, test.npy with their labels, as simclr/ reads them.

    python data/imgnet/prepare.py --source DIR   # with train.csv, val.csv, test.csv and images/ or zips of it

Every image is decoded and resized to 84x84 RGB once. Arrays are (N, 84, 84, 3) uint8, N = 38400/9600/12000
for Mini-ImageNet; classes are contiguous, in the CSV's order of first appearance. Any other data set in this
layout works too, as long as all its classes have the same number of images.
"""

import csv
import io
import json
import re
import signal
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from layout import DAMAGE, check_places, checksum, find_images, load, place_images

sys.path.append(str(Path(__file__).resolve().parents[1]))
from common import Parser, SourceError, folder_beside, plain, program, user_path  # noqa: E402
from common import write_all, write_array  # noqa: E402

SPLITS = {"train": 38400, "val": 9600, "test": 12000}  # Mini-ImageNet's own counts
CLASSES = {"train": 64, "val": 16, "test": 20}
SIZE = 84
AT_ONCE = 4096  # images that wait to be written


def read_csv(path):
    """List a split's [(filename, label)] in the order of its CSV.

    Raises SourceError if it is missing, damaged or has no header.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, restval="")
            header = rows.fieldnames or []
            if not {"filename", "label"} <= set(header):
                found = f"header {','.join(header)[:60]!r} found"
                raise SourceError(f"{path}: {found}, 'filename,label' expected")
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
    """Bring the images of a class together, classes in order of first appearance: -> (rows, classes)."""
    classes = list(dict.fromkeys(label for _, label in rows))
    number = {label: i for i, label in enumerate(classes)}
    return sorted(rows, key=lambda row: number[row[1]]), classes


def check_counts(rows):
    """List problems of {split: [(filename, label)]} that show without reading an image.

    They are repeated images, classes of different size or in two splits, and a Mini-ImageNet of other counts.
    """
    problems = []
    times = Counter(filename for split in rows.values() for filename, _ in split)
    repeated = [filename for filename, count in times.items() if count > 1]
    if repeated:
        count = f"{len(repeated)} images stand more than once in the CSVs"
        problems.append(f"{count} (the first: {repeated[0]})")
    classes = {split: {label for _, label in rows[split]} for split in rows}
    splits_of = Counter(label for labels in classes.values() for label in sorted(labels))
    shared = [label for label, count in splits_of.items() if count > 1]
    if shared:
        count = f"{len(shared)} classes stand in more than one CSV"
        problems.append(f"{count} (the first: {shared[0]}), classes of one split each expected")
    sizes = Counter((split, label) for split in rows for _, label in rows[split])
    usual, times = Counter(sizes.values()).most_common(1)[0]
    unequal = [f"{split}.csv: {label} has {size}" for (split, label), size in sizes.items() if size != usual]
    if unequal:
        count = f"{len(unequal)} of {len(sizes)} classes do not have {usual} images as {times} do"
        problems.append(f"{count} (the first: {unequal[0]})")
    wordnet = all(re.fullmatch(r"n\d{8}", label) for labels in classes.values() for label in labels)
    if wordnet and {split: len(labels) for split, labels in classes.items()} == CLASSES:
        for split, expected in SPLITS.items():
            if len(rows[split]) != expected:
                found = f"{split}.csv: {len(rows[split])} images found"
                problems.append(f"{found}, Mini-ImageNet's {expected} expected")
    return problems


def decode(place):
    """Decode one image, in a process of the pool: (84, 84, 3) uint8, or the reason why not."""
    try:
        image = plain(Image.open(io.BytesIO(load(place)))).convert("RGB")
        # Antialiased by Pillow, as torchvision's Resize; the same pixels if the size is the same.
        return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    except DAMAGE as error:
        return " ".join(str(error).split()).partition(" <_io")[0] or type(error).__name__


def decode_all(places, folder):
    """Decode the images of `place_images` into <folder>/<split>.npy, one by one: they may not fit in memory.

    -> ({split: [hash of an image]}, {split: [(index, reason)]} of the broken images, which are left out).
    """
    sums, broken = {split: [] for split in places}, {split: [] for split in places}
    # A stop from the keyboard goes to the parent alone, which ends the pool.
    pool = ProcessPoolExecutor(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    with pool, tqdm(total=sum(map(len, places.values())), desc="images", unit="img") as bar:

        def images(split, jobs):
            known = [i for i, place in enumerate(jobs) if isinstance(place, tuple)]
            for start in range(0, len(known), AT_ONCE):
                some = known[start : start + AT_ONCE]
                for i, image in zip(some, pool.map(decode, [jobs[i] for i in some], chunksize=64)):
                    if isinstance(image, str):
                        broken[split].append((i, image))
                    else:
                        sums[split].append(hash(image.tobytes()))
                        yield image
                    bar.update()

        for split, jobs in places.items():
            write_array(folder / f"{split}.npy", (len(jobs), SIZE, SIZE, 3), images(split, jobs))
    return sums, broken


def check_apart(rows, sums):
    """List problems of equal images in two splits: more than one in a hundred, or a whole class.

    Mini-ImageNet shares a few. Equal images of one split count once. `sums` {split: [hash of each image]}.
    """
    problems = []
    for pair in combinations(rows, 2):
        names, classes = [dict(zip(sums[split], rows[split])) for split in pair], {}
        alike = names[0].keys() & names[1].keys()
        for split in pair:
            for one, (_, label) in zip(sums[split], rows[split]):
                classes.setdefault(label, set()).add(one)
        whole = any(1 < len(images) and images <= alike for images in classes.values())
        if whole or len(alike) > max(1, min(map(len, names)) / 100):
            first = min((names[0][one][0], names[1][one][0]) for one in alike)
            found = f"{len(alike)} images of {pair[0]}.csv are in {pair[1]}.csv under another name"
            problems.append(f"{found} (the first: {' and '.join(first)})")
    return problems


def unchanged(out, facts, otherwise):
    """Tell if `out` was made from what `facts` say. Raises SourceError if not and `otherwise` is "fail"."""
    try:
        before = json.loads((out / "classes.json").read_text())
        known = {name: before[name] for name in facts if name in before}
        complete = all((out / f"{split}{part}.npy").exists() for split in SPLITS for part in ("", "_labels"))
    except (OSError, ValueError, TypeError):
        return False
    if otherwise == "fail" and any(known[name] != facts[name] for name in known):
        raise SourceError(f"--source: other images found than those that {out} was made from")
    return bool(otherwise) and complete and known == facts and "source_crc32" in known


def look(source):
    """Find what to decode: -> (rows, class names, places, problems). Raises SourceError for unusable CSVs."""
    rows, classes, problems = {}, {}, []
    for split in SPLITS:
        try:
            rows[split], classes[split] = group_by_class(read_csv(source / f"{split}.csv"))
        except SourceError as error:
            problems.append(str(error))
    if problems:
        raise SourceError("; ".join(problems))
    found, damaged = find_images(source)
    places = place_images(rows, found)
    problems = [*check_counts(rows), *damaged, *check_places(source, rows, places, found)]
    return rows, classes, places, problems


def prepare(rows, classes, places, problems, folder):
    """Decode the images into `folder`: -> {file name: array, or the path of a large one}.

    Raises SourceError with every problem in one message.
    """
    sums, broken = decode_all(places, folder)
    for split, failures in broken.items():
        if failures:
            index, reason = failures[0]
            count = f"{len(failures)} of {len(rows[split])} images are not readable"
            problems.append(f"{split}.csv: {count} (the first: {rows[split][index][0]}, {reason})")
    problems = problems or check_apart(rows, sums)
    if problems:
        raise SourceError("; ".join(problems))
    files = {}
    for split in SPLITS:
        number = {label: i for i, label in enumerate(classes[split])}
        files[split] = folder / f"{split}.npy"
        files[f"{split}_labels"] = np.array([number[label] for _, label in rows[split]], np.int64)
    return files


def parse_args():
    parser, here = Parser(__doc__), Path(__file__).resolve().parent
    parser.add_argument("--source", type=user_path, required=True,
                        help="folder with the three CSVs and images/ or zips of it")  # fmt: skip
    parser.add_argument("--out", type=user_path, default=here, help="arrays' folder (default: the script's)")
    parser.add_argument("--if-changed", choices=["again", "fail"],
                        help="keep arrays made from this source; make others again, or fail. fail also "
                        "keeps arrays beside the source that do not say what they are from")  # fmt: skip
    return parser.parse_args()


def main():
    with program():
        args = parse_args()
        if not args.source.is_dir():
            expected = "a folder with the three CSVs and images/ or zips of it expected"
            raise SourceError(f"--source: {args.source} found, {expected}")
        rows, classes, places, problems = look(args.source)
        facts = dict(classes) if problems else classes | {"source_crc32": checksum(rows, places)}
        kept = unchanged(args.out, facts, args.if_changed)
        beside = (args.out / "train.npy").exists() and args.out.samefile(args.source)
        if beside and not kept and args.if_changed == "fail":
            print(f"{args.out}: arrays kept, not compared with the images beside them")
            return
        if not kept:
            with folder_beside(args.out) as folder:
                files = prepare(rows, classes, places, problems, Path(folder))
                write_all(args.out, files, "classes.json", facts)
        for split in SPLITS:
            labels = np.load(args.out / f"{split}_labels.npy")
            classes = f"{labels[-1] + 1} classes of {len(labels) // (labels[-1] + 1)} images"
            print(f"{args.out / split}.npy  {(len(labels), SIZE, SIZE, 3)} uint8  {classes}")


if __name__ == "__main__":
    main()
