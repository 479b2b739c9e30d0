"""Features as one tensor on the device; training sets and few-shot episodes are indices into it."""

import json
import zlib
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from machine import UserError, in_short
from runtime import read_config


def read_description(data_dir):
    """Read features.json, which simclr/main.py writes beside the features; {} if there is none.

    It says which encoder made them, and has {"images_per_class": {split: count}, "crc32": {split: checksum of
    the array}}; older files have no checksums. Raises UserError if it is damaged.
    """
    path = Path(data_dir) / "features.json"
    try:
        description = json.loads(path.read_text())
        counts, _ = description["images_per_class"].values(), description.get("crc32", {}).values()
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        counts = [None]
    if not all(isinstance(count, int) and count > 0 for count in counts):
        expected = "the images per class of every split expected, as simclr/main.py writes them"
        raise UserError(f"{path}: not readable, {expected}")
    return description


def read_labels(path, images):
    """Read `<split>_labels.npy`, one class per image: (order, number of classes), or None without it.

    `order` groups images by class: classes by first appearance, images in stored order. Raises UserError for
    a damaged file, labels that are not one integer per image, and classes that differ in size.
    """
    try:
        labels = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        return None
    except Exception as error:  # NumPy raises many kinds for a damaged file
        raise UserError(f"{path}: not a readable .npy array ({in_short(error)})") from None
    if not isinstance(labels, np.ndarray) or labels.shape != (images,) or labels.dtype.kind not in "iu":
        found = f"{getattr(labels, 'dtype', None)} of shape {getattr(labels, 'shape', None)}"
        raise UserError(f"{path}: {found}, expected an integer for each of the {images} images beside it")
    _, first, number, sizes = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    if sizes.min() != sizes.max():
        found = f"classes of {sizes.min()} to {sizes.max()} images"
        raise UserError(f"{path}: {found}, expected the same number in each")
    return np.argsort(first[number], kind="stable"), len(sizes)


def load_split(data_dir, split, images_per_class, crc32=None):
    """Load a split, `<split>_features.npy` (images, width): a float32 tensor (classes, members, width).

    `<split>_labels.npy` beside it gives the class of every image; without it every `images_per_class` images
    are a class. Training needs no classes: any number of images will do, then as one class. Other floats
    become float32. Raises UserError for a missing or damaged file, a wrong shape, dtype or number of images,
    values that are NaN or infinite, another checksum than `crc32`, and what `read_labels` refuses.
    """
    path = Path(data_dir) / f"{split}_features.npy"
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        make = "make it with simclr/main.py, option --feature-save-dir"
        raise UserError(f"{path}: not found; {make}") from None
    except Exception as error:  # NumPy raises many kinds for a damaged file
        raise UserError(f"{path}: not a readable .npy array ({in_short(error)})") from None
    if not isinstance(array, np.ndarray) or array.ndim != 2 or 0 in array.shape:
        raise UserError(f"{path}: shape {getattr(array, 'shape', None)}, expected (images, features)")
    if array.dtype not in (np.float16, np.float32, np.float64):
        raise UserError(f"{path}: dtype {array.dtype}, expected float32 (or another float)")
    found = zlib.crc32(np.ascontiguousarray(array))
    if crc32 not in (None, found):
        said = f"{crc32} expected, as features.json beside it says; without features.json, it is read"
        raise UserError(f"{path}: features of checksum {found} found, {said}")
    labels = path.with_name(f"{split}_labels.npy")
    labelled = None if split == "train" else read_labels(labels, len(array))
    if labelled:
        order, classes = labelled
        array, images_per_class = array[order], len(array) // classes
    elif split == "train" and len(array) % images_per_class:
        images_per_class = len(array)
    elif len(array) % images_per_class:
        expected = f"expected a multiple of --images-per-class {images_per_class}"
        raise UserError(f"{path}: {len(array)} images, {expected}")
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused as infinite
        array = array.astype(np.float32)
    bad = np.count_nonzero(~np.isfinite(array).all(1))
    if bad:
        raise UserError(f"{path}: {bad} images with NaN or infinite features, expected finite float32 values")
    return torch.from_numpy(array).unflatten(0, (-1, images_per_class))


def check_episodes(data_dir, split, images, ways, shots, query):
    """Check that a split has the classes and images that its episodes need. Raises UserError."""
    path = Path(data_dir) / f"{split}_features.npy"
    classes, per_class = images.shape[:2]
    way, shot = max(ways), max(shots)
    if classes < way:
        raise UserError(f"{path}: {classes} classes, expected at least {way} for {way}-way episodes")
    if per_class < shot + query:
        flag = "--test-shot" if split == "test" else "--shot"
        expected = f"expected at least {shot + query} ({flag} {shot} + --query {query})"
        raise UserError(f"{path}: {per_class} images a class, {expected}")


def say_if_mixed(path, images):
    """Print a line if images of a class are no more alike than others: they may not lie class by class.

    images (classes, members, ...). members * (variance of class means) / (variance within classes) is about 1
    in a wrong order; Mini-ImageNet in the right one has 80.
    """
    if min(images.shape[:2]) < 2:
        return
    x = images.flatten(2).float()
    between, within = x.shape[1] * x.mean(1).var(0).sum(), x.var(1).mean(0).sum()
    if between < 1.5 * within:
        print(f"{path}: images of a class are no more alike than others; do they lie class by class?")


def say_if_small(path, images, kl_weight):
    """Print a line if the features vary so little that a latent costs more than it explains.

    images (classes, members, width). A linear decoder uses no direction of a variance under kl_weight / 2.
    """
    x = images.flatten(0, 1).float()
    if not x.var(0).max() < kl_weight:  # one feature is enough, and needs no matrix of all pairs
        return
    highest = torch.linalg.eigvalsh(torch.atleast_2d(torch.cov(x.T)))[-1]
    if highest < kl_weight:
        found = f"a variance of at most {highest:.2g} in any direction"
        print(f"{path}: {found}; below --kl-weight {kl_weight:g} latents may stay empty, multiply them all")


def check_apart(data_dir, splits):
    """Check that no two splits share a class or more than 1 % of their images. Raises UserError.

    Mini-ImageNet shares a few (6 of 9,600 in val). Equal images of one split, such as blank ones, count once.
    Features are compared in bfloat16: encoded in another batch, an image has other last bits.
    """
    sets = {}
    for name, images in splits.items():
        rounded = images.bfloat16().view(torch.int16).numpy()
        sets[name] = [{hash(image.tobytes()) for image in members} for members in rounded]
    for one, other in combinations(sets, 2):
        every = [set().union(*sets[name]) for name in (one, other)]
        alike = every[0] & every[1]
        whole = any(1 < len(members) and members <= alike for name in (one, other) for members in sets[name])
        if whole or len(alike) > max(1, min(map(len, every)) / 100):
            found = f"{len(alike)} images of {one} found in {other} too"
            raise UserError(f"{data_dir}: {found}, different ones in each split expected")


def check_alike(data_dir, split, images, width, signed, source):
    """Check that a split's features are `width` wide and below zero only if `signed`, as those of `source`.

    Raises UserError.
    """
    path, found = Path(data_dir) / f"{split}_features.npy", images.shape[-1]
    if found != width:
        raise UserError(f"{path}: {found} features an image, expected {width} as in {source}")
    if images.min() < 0 and not signed:
        expected = f"none below zero expected as in {source}"
        raise UserError(f"{path}: features down to {images.min()} found, {expected}")


def check_encoder(described, path, data_dir):
    """Check that features come from the encoder that a checkpoint was trained on, if both are known.

    Raises UserError.
    """
    trained_on = read_config(path.parent, strict=False).get("features", {})
    found, expected = (of.get("encoder_crc32") for of in (described, trained_on))
    if found and expected and found != expected:
        said = f"encoder_crc32 {found} found, {expected} expected, as {path} was trained on"
        raise UserError(f"{data_dir / 'features.json'}: {said}")


def load_splits(args, described):
    """Load the arrays that a run needs, {split: tensor}; check them against its flags. Raises UserError.

    `described` comes from `read_description`.
    """
    folder, splits = args.data_dir, {}
    for name in ["test"] if args.eval_only else ["train", "val", "test"]:
        given, expected = args.images_per_class, described.get("images_per_class", {}).get(name)
        if given and expected and given != expected:
            file = folder / "features.json"
            raise UserError(f"--images-per-class: {given} found, {expected} expected as {file} says")
        known = expected or given
        if not known and name != "train" and not (folder / f"{name}_labels.npy").exists():
            found = f"neither features.json nor {name}_labels.npy found in {folder}"
            expected = "the number of images of a class expected (600 in Mini-ImageNet)"
            raise UserError(f"--images-per-class: {found}, {expected}")
        splits[name] = load_split(folder, name, known or 1, described.get("crc32", {}).get(name))
        if known and name != "train" and splits[name].shape[1] != known:
            found = f"{splits[name].shape[1]} images a class found in {name}_labels.npy"
            raise UserError(f"{folder}: {found}, {known} expected as --images-per-class or features.json say")
        if name != "train":
            say_if_mixed(folder / f"{name}_features.npy", splits[name])
    check_apart(folder, splits)
    check_episodes(folder, "test", splits["test"], args.test_way, args.test_shot, args.query)
    if args.eval_only:
        return splits
    train = splits["train"]
    say_if_small(folder / "train_features.npy", train, args.kl_weight)
    for name in ("val", "test"):
        check_alike(folder, name, splits[name], train.shape[-1], train.min() < 0, "train_features.npy")
    check_episodes(folder, "val", splits["val"], [args.way], [args.shot], args.query)
    found, needed = splits["train"].shape[:2].numel(), args.batch_size * args.sample_size
    if found < needed:
        expected = f"at least --batch-size x --sample-size = {needed} expected"
        raise UserError(f"{folder / 'train_features.npy'}: {found} images found, {expected}")
    most = args.sample_size * args.train_mc_sample_size
    if args.way > most:
        expected = f"at most --sample-size x --train-mc-sample-size = {most} expected"
        raise UserError(f"--way: {args.way} found, {expected}: a component starts at a sample")
    return splits


def draw_sets(images, sets, sample_size, generator):
    """Draw a training batch: `sets` disjoint sets of distinct unlabeled images.

    images (N, width) -> (sets, sample_size, width).
    """
    index = torch.randperm(len(images), device=images.device, generator=generator)[: sets * sample_size]
    return images[index].unflatten(0, (sets, sample_size))


def draw_episodes(images, way, shot, query, count, seed):
    """Draw few-shot episodes, indices into images.flatten(0, 1): (count, way, shot + query), support first.

    Drawn on the CPU from `seed` alone, so that every validation, run and machine sees the same episodes.
    """
    classes, per_class = images.shape[:2]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(count, classes, generator=generator).topk(way).indices
    members = torch.rand(count, way, per_class, generator=generator).topk(shot + query).indices
    return chosen.unsqueeze(-1) * per_class + members
