"""A folder of class folders of pictures -> train.npy, val.npy, test.npy, as omniglot/ or simclr/ reads them.

    python data/folder/prepare.py --source DIR                 # DIR/class/picture -> 28x28 for omniglot/
    python data/folder/prepare.py --source DIR --for simclr    # 84x84 colour with labels for simclr/

Classes are shuffled by --seed and cut 64/16/20 percent, at least five a split. All classes keep as many
pictures as the smallest has, the first by file name.
"""

import random
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))
from common import Parser, SourceError, folder_beside, plain, program, user_path  # noqa: E402
from common import write_all, write_array  # noqa: E402

SHARES = {"val": 0.16, "test": 0.2}  # of the classes; the rest trains
WAY = 5  # classes that an episode needs
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def find_classes(source):
    """List {class: [pictures]} of the folders in `source`. Raises SourceError for one without pictures."""
    classes = {}
    folders = sorted(path for path in source.iterdir() if path.is_dir() and path.name != "__MACOSX")
    for folder in (path for path in folders if path.name[0] != "."):
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        files = [path for path in files if path.name[0] != "." and not path.is_dir()]
        if not files:
            names = ", ".join(sorted(path.name for path in folder.iterdir())[:3])
            found = f"no picture found ({names or 'empty'})"
            raise SourceError(f"{folder}: {found}, a folder of class folders of pictures expected")
        classes[folder.name] = files
    if len(classes) < 3 * WAY:
        found = f"{len(classes)} class folders found"
        raise SourceError(f"{source}: {found}, at least {3 * WAY} expected, {WAY} for each of three splits")
    return classes


def read(path, size):
    """Read a picture: (84, 84, 3) uint8 and None, or (28, 28, 1) and its ground, its border's median."""
    try:
        image = plain(Image.open(path))
        if size == 84:
            return np.asarray(image.convert("RGB").resize((84, 84), Image.Resampling.BILINEAR)), None
        image = image.convert("L")
        pixels = np.asarray(image)
        border = int(np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])))
        image = ImageOps.pad(image, (28, 28), Image.Resampling.LANCZOS, color=border)
        return np.asarray(image)[..., None], border
    except Exception as error:  # Pillow raises many kinds for a damaged picture
        raise SourceError(f"{path}: not a readable picture ({' '.join(str(error).split())})") from None


def find_ground(borders):
    """Return whether the ground is "light" or "dark": borders (classes, pictures).

    Raises SourceError if fewer than nine in ten pictures agree, or most of a class differs from the others.
    """
    light = np.asarray(borders) > 127
    other = abs(light.mean(1) - light.mean().round()) > 0.5
    if 0.1 < light.mean() < 0.9 or other.any():
        found = f"{light.sum()} of {light.size} pictures have a light border"
        raise SourceError(f"{found}, one ground for all expected: say which by --ground, or use --for simclr")
    return "light" if light.mean() > 0.5 else "dark"


def check_apart(sums):
    """Raise SourceError for equal pictures in two splits: more than one in a hundred, or a whole class.

    `sums` {split: {class: set of its pictures' hashes}}. Equal pictures of one split count once.
    """
    for pair in combinations(sums, 2):
        every = [set().union(*sums[split].values()) for split in pair]
        alike = every[0] & every[1]
        touched = {name: of for split in pair for name, of in sums[split].items() if alike & of}
        whole = any(1 < len(of) and of <= alike for of in touched.values())
        if whole or len(alike) > max(1, min(map(len, every)) / 100):
            found = f"{len(alike)} pictures stand in several class folders ({', '.join([*touched][:4])})"
            raise SourceError(f"{found}, which {' and '.join(pair)} would share; one folder each expected")


def prepare(source, size, seed, ground, folder):
    """Write the large arrays into `folder`.

    -> ({file name: array, or the path of a large one}, {split: class names}, lines on what was decided)
    """
    classes = find_classes(source)
    counts = {name: len(files) for name, files in classes.items()}
    smallest = min(counts, key=counts.get)
    least, total, notes = counts[smallest], sum(counts.values()), []
    if least < 2:
        raise SourceError(f"{source / smallest}: 1 picture found, at least 2 in each class expected")
    if least < max(counts.values()):
        left = total - least * len(counts)
        kept = f"{least} pictures of each class kept, as many as {smallest} has"
        notes.append(f"{kept}; {left} of {total} left out")
    order = list(classes)
    random.Random(seed).shuffle(order)
    val, test = (max(WAY, round(share * len(order))) for share in SHARES.values())
    split = {"train": order[val + test :], "val": order[:val], "test": order[val : val + test]}
    sums, borders = {name: {} for name in split}, []
    with tqdm(total=least * len(order), desc="pictures", unit="img") as bar:

        def pictures(name):
            for member in split[name]:
                for path in classes[member][:least]:
                    picture, border = read(path, size)
                    borders.append(border)
                    sums[name].setdefault(member, set()).add(hash(picture.tobytes()))
                    bar.update()
                    yield picture

        for name, members in split.items():
            shape = (len(members), least, 28, 28, 1) if size == 28 else (len(members) * least, 84, 84, 3)
            write_array(folder / f"{name}.npy", shape, pictures(name))
    check_apart(sums)
    files = {name: folder / f"{name}.npy" for name in split}
    if size == 84:
        labels = {f"{name}_labels": np.repeat(np.arange(len(of)), least) for name, of in split.items()}
        return files | labels, split, notes
    how = "as --ground says" if ground else "as the borders of the pictures are"
    ground = ground or find_ground(np.reshape(borders, (-1, least)))
    notes.append(f"{ground} ground, {how}: {'inverted, ' * (ground == 'light')}ink is high")
    for name, path in files.items():
        x = np.load(path, mmap_mode="r+")
        if ground == "light":
            np.subtract(255, x, out=x)
        if x.max() < 128 or x.mean() > 0.55 * 255:
            found = f"ink up to {x.max()}, mean {x.mean():.0f}"
            raise SourceError(f"{source}: {name} has {found}, expected up to 255 on an empty ground")
    return files, split, notes


def parse_args():
    parser, here = Parser(__doc__), Path(__file__).resolve().parent
    parser.add_argument("--source", type=user_path, required=True, help="folder of class folders of pictures")
    parser.add_argument("--out", type=user_path, default=here, help="arrays' folder (default: the script's)")
    parser.add_argument("--for", dest="experiment", choices=["omniglot", "simclr"], default="omniglot",
                        help="experiment that reads them (default: omniglot)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of the split (default: 0)")
    parser.add_argument("--ground", choices=["light", "dark"],
                        help="the pictures' ground, for omniglot (default: from their borders)")  # fmt: skip
    return parser.parse_args()


def main():
    with program():
        args = parse_args()
        if not args.source.is_dir():
            raise SourceError(f"--source: {args.source} found, a folder of class folders expected")
        if args.ground and args.experiment == "simclr":
            found = f"--ground: {args.ground} found, none expected with --for simclr"
            raise SourceError(f"{found}: colour pictures stay as they are")
        size, description = (28, "split.json") if args.experiment == "omniglot" else (84, "classes.json")
        facts = {"seed": args.seed, "rotations": [0], "rows": "class i is folder i"} if size == 28 else {}
        with folder_beside(args.out) as folder:
            files, split, notes = prepare(args.source, size, args.seed, args.ground, Path(folder))
            write_all(args.out, files, description, facts | split)
        for line in notes:
            print(line)
        for name in split:
            x = np.load(args.out / f"{name}.npy", mmap_mode="r")
            print(f"{args.out / name}.npy  {x.shape} {x.dtype}  {len(split[name])} classes")


if __name__ == "__main__":
    main()
