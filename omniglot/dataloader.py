"""Images as one tensor on the device; training sets and few-shot episodes are indices into it."""

from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from machine import UserError, in_short

SHOTS = (1, 5)  # of validation episodes


def check_ink(path, images):
    """Check that the images can be ink on an empty ground. Raises UserError.

    It refuses blank, faint or inverted images, and classes and drawings swapped. It accepts a mean of one
    half, as of grey noise.
    """
    top = 255 if images.dtype == np.uint8 else 1
    low, high, mean = images.min(), images.max(), images.mean(dtype=np.float64) / top
    if low == high:
        raise UserError(f"{path}: every value is {low}, expected drawings: ink {top} on a ground of 0")
    if high < top / 2:
        raise UserError(f"{path}: values up to {high}, expected ink up to {top}")
    if mean > 0.55:
        raise UserError(f"{path}: mean {mean:.2f}, looks inverted, ink = {top} on an empty ground expected")
    flat = images.reshape(*images.shape[:2], -1)
    blank = flat.min(2) == flat.max(2)
    if blank.mean() > 0.5:
        raise UserError(f"{path}: {blank.sum()} of {blank.size} drawings are blank, expected ink in each")
    # Drawings of a class are alike. Analysis of variance on a part: rows (classes), columns (drawings).
    part = flat[:: len(flat) // 200 + 1, :: flat.shape[1] // 200 + 1].astype(np.float32) / top
    rows, columns = part.shape[:2]
    if min(rows, columns) < 5:
        return
    of_rows, of_columns = (part.mean(axis).var(0, ddof=1).sum() for axis in (1, 0))
    rest = part.reshape(-1, part.shape[2]).var(0).sum() - of_rows - of_columns
    of_rows, of_columns = max(of_rows - rest / columns, 0), of_columns - rest / rows
    if of_columns > 0.05 * rest and of_columns > 4 * of_rows:
        found = f"{images.shape}, images alike along its second axis: axes look swapped"
        raise UserError(f"{path}: shape {found}, (classes, drawings, 28, 28, 1) expected")


def load_split(data_dir, split):
    """Load a split, `<split>.npy`: a tensor (classes, drawings, 28, 28, 1), uint8 or float32 in [0, 1].

    Raises UserError for a missing or damaged file, a wrong shape or dtype, values outside [0, 1] or NaN, and
    what `check_ink` refuses.
    """
    path = Path(data_dir) / f"{split}.npy"
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        make = "make it with data/omniglot/prepare.py or data/glyphs/prepare.py"
        raise UserError(f"{path}: not found; {make}") from None
    except Exception as error:  # NumPy raises many kinds for a damaged file
        raise UserError(f"{path}: not a readable .npy array ({in_short(error)})") from None
    shape = getattr(array, "shape", None)  # None: several arrays in one file
    if len(shape or ()) != 5 or shape[2:] != (28, 28, 1) or 0 in shape:
        raise UserError(f"{path}: shape {shape}, expected (classes, drawings, 28, 28, 1)")
    if array.dtype == np.uint8:
        check_ink(path, array)
        return torch.from_numpy(array)
    if array.dtype not in (np.float16, np.float32, np.float64):
        raise UserError(f"{path}: dtype {array.dtype}, expected uint8 or float in [0, 1]")
    low, high = array.min(), array.max()  # NaN propagates into both
    if not (low >= 0 and high <= 1):
        raise UserError(f"{path}: values from {low} to {high}, expected floats in [0, 1]")
    check_ink(path, array)
    return torch.from_numpy(array.astype(np.float32))


def check_episodes(data_dir, split, images, ways, shots, query):
    """Check that a split has the classes and drawings that its episodes need. Raises UserError."""
    path = Path(data_dir) / f"{split}.npy"
    classes, drawings = images.shape[:2]
    way, shot = max(ways), max(shots)
    if classes < way:
        raise UserError(f"{path}: {classes} classes, expected at least {way} for {way}-way episodes")
    if drawings < shot + query:
        expected = f"expected at least {shot + query} ({shot} shots + --query {query})"
        raise UserError(f"{path}: {drawings} drawings a class, {expected}")


def say_if_mixed(path, images):
    """Print a line if images of a class are no more alike than others: they may not lie class by class.

    images (classes, members, ...). members * (variance of class means) / (variance within classes) is about 1
    in a wrong order; Omniglot in the right one has 4.6.
    """
    if min(images.shape[:2]) < 2:
        return
    x = images.flatten(2).float()
    between, within = x.shape[1] * x.mean(1).var(0).sum(), x.var(1).mean(0).sum()
    if between < 1.5 * within:
        print(f"{path}: images of a class are no more alike than others; do they lie class by class?")


def check_apart(data_dir, splits):
    """Check that no two splits share a class or more than 1 % of their images. Raises UserError.

    Floats are compared after rounding to 8 bits. Equal images of one split, such as blank ones, count once.
    """
    sets = {}
    for name, images in splits.items():
        images = images if images.dtype == torch.uint8 else (255 * images).round().byte()
        sets[name] = [{hash(image.tobytes()) for image in members} for members in images.numpy()]
    for one, other in combinations(sets, 2):
        every = [set().union(*sets[name]) for name in (one, other)]
        alike = every[0] & every[1]
        whole = any(1 < len(members) and members <= alike for name in (one, other) for members in sets[name])
        if whole or len(alike) > max(1, min(map(len, every)) / 100):
            found = f"{len(alike)} images of {one} found in {other} too"
            raise UserError(f"{data_dir}: {found}, different ones in each split expected")


def load_splits(args):
    """Load the arrays that a run needs, {split: tensor}; check them against its flags. Raises UserError."""
    folder = args.data_dir
    names = ["test"] if args.eval_only else ["train", "val", "test"]
    splits = {name: load_split(folder, name) for name in names}
    check_apart(folder, splits)
    for name in names[-2:]:  # training needs no classes
        say_if_mixed(folder / f"{name}.npy", splits[name])
    check_episodes(folder, "test", splits["test"], args.test_way, args.test_shot, args.query)
    if args.eval_only:
        return splits
    check_episodes(folder, "val", splits["val"], [args.way], SHOTS, args.query)
    found, needed = splits["train"].shape[:2].numel(), args.batch_size * args.sample_size
    if found < needed:
        expected = f"at least --batch-size x --sample-size = {needed} expected"
        raise UserError(f"{folder / 'train.npy'}: {found} images found, {expected}")
    most = args.sample_size * args.train_mc_sample_size
    if args.way > most:
        expected = f"at most --sample-size x --train-mc-sample-size = {most} expected"
        raise UserError(f"--way: {args.way} found, {expected}: a component starts at a sample")
    return splits


def as_float(images):
    """Return images as float32 in [0, 1], for training and figures; in a test `model.encode` does it."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def draw_sets(images, sets, sample_size, generator):
    """Draw a training batch: `sets` disjoint sets of distinct unlabeled images.

    images (N, 28, 28, 1) -> float32 (sets, sample_size, 28, 28, 1) in [0, 1].
    """
    index = torch.randperm(len(images), device=images.device, generator=generator)[: sets * sample_size]
    return as_float(images[index]).unflatten(0, (sets, sample_size))


def draw_episodes(images, way, shot, query, count, seed):
    """Draw few-shot episodes, indices into images.flatten(0, 1): (count, way, shot + query), support first.

    Drawn on the CPU from `seed` alone, so that every validation, run and machine sees the same episodes.
    """
    classes, drawings = images.shape[:2]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(count, classes, generator=generator).topk(way).indices
    members = torch.rand(count, way, drawings, generator=generator).topk(shot + query).indices
    return chosen.unsqueeze(-1) * drawings + members
