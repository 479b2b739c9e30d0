"""Images as one uint8 tensor on the device; random views of a batch by batched tensor operations.

The random numbers of a view are few and are drawn on the CPU: the views are the same on every device, and the
number of images in each operation is known without waiting for a GPU.
"""

import io
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from machine import UserError, in_short
from parallel import share, world

SIZE = 84
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # crop's area / image's area, crop's width / height
# Factors of brightness, contrast and saturation from 1 - JITTER to 1 + JITTER; shift of hue in turns.
JITTER, HUE = 0.8, 0.2
STRENGTH = SCALE[0], JITTER, HUE  # what a caller may change: crop_scale, jitter, hue
P_FLIP, P_JITTER, P_GREY = 0.5, 0.8, 0.2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of RGB in [0, 1]
GREY = (0.2989, 0.587, 0.114)  # weights of R, G, B, as torchvision has them


# --- stored images --------------------------------------------------------------------------------


def read_array(path):
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; make it with data/imgnet/prepare.py") from None
    except Exception as error:  # NumPy raises many kinds for a damaged file
        raise UserError(f"{path}: not a readable .npy array ({in_short(error)})") from None


def load_split(data_dir, split):
    """Load a split, `<split>.npy` with its labels: a uint8 tensor (classes, images of a class, 84, 84, 3).

    Raises UserError for a missing or damaged file, a wrong shape or dtype, blank or faint images, labels that
    are not one integer an image, and classes that do not lie together or differ in size.
    """
    path, beside = Path(data_dir) / f"{split}.npy", Path(data_dir) / f"{split}_labels.npy"
    images, labels = read_array(path), read_array(beside)
    shape = getattr(images, "shape", ())  # (): the file holds several arrays
    if len(shape) != 4 or shape[1:] != (SIZE, SIZE, 3) or 0 in shape:
        raise UserError(f"{path}: shape {shape}, expected (images, {SIZE}, {SIZE}, 3)")
    if images.dtype != np.uint8:
        raise UserError(f"{path}: dtype {images.dtype}, expected uint8")
    low, high = images.min(), images.max()
    if low == high or high < 128:
        raise UserError(f"{path}: values from {low} to {high} found, pictures of 0 to 255 expected")
    shape, dtype = getattr(labels, "shape", None), getattr(labels, "dtype", None)
    if shape != images.shape[:1] or dtype.kind not in "iu":
        expected = f"expected an integer for each of the {len(images)} images of {path.name}"
        raise UserError(f"{beside}: {dtype} of shape {shape}, {expected}")
    starts = np.flatnonzero(np.diff(labels)) + 1
    sizes = np.diff([0, *starts, len(labels)])
    if len(np.unique(labels)) != len(sizes):
        found = f"{len(np.unique(labels))} classes in {len(sizes)} runs"
        raise UserError(f"{beside}: {found}, expected the images of a class together")
    if sizes.min() != sizes.max():
        found = f"classes of {sizes.min()} to {sizes.max()} images"
        raise UserError(f"{beside}: {found}, expected the same number in each")
    return torch.from_numpy(images).unflatten(0, (len(sizes), -1))


def check_episodes(data_dir, split, images, way, shots, query):
    """Check that a split has the classes and images that its episodes need. Raises UserError."""
    path, shot = Path(data_dir) / f"{split}.npy", max(shots)
    classes, members = images.shape[:2]
    if classes < way:
        raise UserError(f"{path}: {classes} classes, expected at least {way} for {way}-way episodes")
    if members < shot + query:
        expected = f"expected at least {shot + query} ({shot} shots + --query {query})"
        raise UserError(f"{path}: {members} images a class, {expected}")


def check_apart(data_dir, splits):
    """Check that no two splits share a class or more than 1 % of their images. Raises UserError.

    Mini-ImageNet shares a few (6 of 9,600 in val). Equal images of one split, such as blank ones, count once.
    """
    sets = {}
    for name, images in splits.items():
        sets[name] = [{hash(image.tobytes()) for image in members} for members in images.numpy()]
    for one, other in combinations(sets, 2):
        every = [set().union(*sets[name]) for name in (one, other)]
        alike = every[0] & every[1]
        whole = any(1 < len(members) and members <= alike for name in (one, other) for members in sets[name])
        if whole or len(alike) > max(1, min(map(len, every)) / 100):
            found = f"{len(alike)} images of {one} found in {other} too"
            raise UserError(f"{data_dir}: {found}, different ones in each split expected")


def draw_episodes(features, way, shot, query, count, seed):
    """Draw few-shot episodes, indices into features.flatten(0, 1): (count, way, shot + query), support first.

    features (classes, images of a class, width). Drawn on the CPU from `seed` alone, so that every
    validation, run and machine sees the same episodes.
    """
    classes, members = features.shape[:2]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(count, classes, generator=generator).topk(way).indices
    picked = torch.rand(count, way, members, generator=generator).topk(shot + query).indices
    return chosen.unsqueeze(-1) * members + picked


def epoch_order(images, seed, epoch):
    """Return the order in which an epoch (from 0) sees the images.

    It depends on the seed and the epoch alone, so it needs no state.
    """
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    return torch.randperm(len(images), generator=generator)


# --- draws: what is random in a view --------------------------------------------------------------


def uniform(shape, low, high, generator):
    return low + (high - low) * torch.rand(shape, generator=generator)


def draw_crops(count, generator, crop_scale=SCALE[0]):
    """Draw boxes of a random resized crop in whole pixels, left, top, width, height: (count, 4), float32.

    As torchvision's RandomResizedCrop: the share of the image's area (at least crop_scale) and the log ratio
    are uniform; after ten failed tries it is the whole image.
    """
    area = SIZE**2 * uniform((count, 10), crop_scale, SCALE[1], generator)
    ratio = uniform((count, 10), math.log(RATIO[0]), math.log(RATIO[1]), generator).exp()
    tries = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], -1).round()  # (count, 10, 2)
    fits = ((tries > 0) & (tries <= SIZE)).all(-1)
    first = fits.int().argmax(-1)
    size = torch.where(fits.any(-1, keepdim=True), tries[torch.arange(count), first], SIZE)
    corner = (torch.rand(count, 2, generator=generator) * (SIZE - size + 1)).floor().minimum(SIZE - size)
    return torch.cat([corner, size], -1)


def draw_jitter(count, generator, strength=JITTER, hue=HUE):
    """Draw colour jitter: factors and order of the four OPERATIONS, (count, 4); order -1: no jitter.

    As torchvision's ColorJitter: factors within `strength` of 1, none negative; hue within `hue` of 0.
    """
    low, high = torch.tensor([max(1 - strength, 0)] * 3 + [-hue]), torch.tensor([1 + strength] * 3 + [hue])
    factors = uniform((count, 4), low, high, generator)
    order = torch.rand(count, 4, generator=generator).argsort(-1)
    left_alone = torch.rand(count, generator=generator) >= P_JITTER
    return factors, order.masked_fill(left_alone.unsqueeze(-1), -1)


# --- batched operations: x (N, 3, H, W), float32 in [0, 1]; factor (N,) -----------------------------


def crop(images, boxes, flip, size=SIZE):
    """Crop boxes of uint8 images (N, 84, 84, 3), mirrored where flip (N,): -> (N, 3, size, size) in [0, 1].

    It is bilinear inside the box and repeats the pixels at its edge. At the published size no box is larger
    than the result, so an antialiasing filter would change nothing; smaller results are not antialiased
    either. grid_sample on channels-last images was the fastest form tried on a CPU: twice as fast as two
    matrix products with the separable weights.
    """
    left, top, width, height = boxes.unsqueeze(-1).unbind(1)  # each (N, 1)
    centre = (torch.arange(size, device=images.device) + 0.5) / size
    column = torch.where(flip.unsqueeze(-1), 1 - centre, centre)
    column = left + (column * width - 0.5).clamp_min(0).minimum(width - 1)  # (N, size), in pixels
    row = top + (centre * height - 0.5).clamp_min(0).minimum(height - 1)
    places = torch.stack(torch.broadcast_tensors(column.unsqueeze(1), row.unsqueeze(2)), -1)
    grid = places * (2 / (SIZE - 1)) - 1
    x = F.grid_sample(images.permute(0, 3, 1, 2).float(), grid, padding_mode="border", align_corners=True)
    return x.contiguous().div_(255)  # the colour operations below are several times faster on planes


def blend(x, other, factor):
    """Return other + factor (x - other), cut to [0, 1]."""
    return torch.lerp(other, x, factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def greyscale(x):
    """Return the luminance of RGB images: (N, 3, H, W) -> (N, 1, H, W)."""
    r, g, b = x.split(1, dim=1)
    return (GREY[0] * r).add_(g, alpha=GREY[1]).add_(b, alpha=GREY[2])


def adjust_brightness(x, factor):
    return (x * factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_contrast(x, factor):
    return blend(x, greyscale(x).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(x, factor):
    return blend(x, greyscale(x), factor)


def adjust_hue(x, factor):
    """Turn the hue of HSV by `factor` turns: with V = max, C = max - min and hue h in turns, a channel is
    V - C clamp(2 - 6 d, 0, 1), d the distance on the circle from h to n / 6, n = 3, 5, 1 for R, G, B.

    It uses masks of 0 and 1 for `where` and rounding for `%`, which take several times as long on a CPU.
    """
    r, g, b = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    red, green = (torch.eq(value, channel, out=torch.empty_like(value)) for channel in (r, g))
    scale = chroma.clamp_min(1e-12).mul_(6).reciprocal_()
    hue = (r - g).mul_(scale).add_(4 / 6).lerp_((b - r).mul_(scale).add_(2 / 6), green)
    hue.lerp_((g - b).mul_(scale), red)
    opposite = send(torch.tensor([3, 1, -1]), x.device).view(-1, 1, 1) / 6  # for R, G, B
    d = (hue + factor.view(-1, 1, 1)).unsqueeze(1) + opposite
    d = d.sub_(d.round()).abs_()
    return torch.addcmul(value.unsqueeze(1), chroma.unsqueeze(1), d.mul_(-6).add_(2).clamp_(0, 1), value=-1)


OPERATIONS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def send(x, device):
    """Send a small tensor from the CPU to the device, without waiting for what runs on a CUDA device."""
    cuda = device.type == "cuda"
    return (x.pin_memory() if cuda else x).to(device, non_blocking=cuda)


def jitter(x, factors, order):
    """Jitter colours, perhaps in place: image i gets OPERATIONS[order[i, 0]], order[i, 1], ...; -1: none.

    factors, order (N, 4) on the CPU. At each position the images with the same operation go through it
    together, so that an image costs four operations, whatever its order.
    """
    for position in order.unbind(1):
        for i, operation in enumerate(OPERATIONS):
            rows = (position == i).nonzero().squeeze(1)
            if len(rows) == len(x):
                x = operation(x, send(factors[:, i], x.device))
            elif len(rows):
                factor, rows = send(factors[rows, i], x.device), send(rows, x.device)
                x.index_copy_(0, rows, operation(x.index_select(0, rows), factor))
    return x


def normalise(x):
    """Normalise RGB in [0, 1] as the encoder reads it."""
    mean, std = send(torch.tensor([MEAN, STD]), x.device).view(2, 3, 1, 1)
    return (x - mean).div_(std)


# --- views ----------------------------------------------------------------------------------------


def strength_of(settings):
    """Return the strength of views as `draw_views` takes it, from flags or a checkpoint's settings."""
    return settings["crop_scale"], settings["jitter"], settings["hue"]


def draw_views(count, generator, strength=STRENGTH):
    """Draw all that is random in `count` views: boxes, flip, factors, order, grey, on the CPU."""
    crop_scale, *colours = strength
    boxes, flip = draw_crops(count, generator, crop_scale), torch.rand(count, generator=generator) < P_FLIP
    factors, order = draw_jitter(count, generator, *colours)
    return boxes, flip, factors, order, torch.rand(count, generator=generator) < P_GREY


def together(order, device):
    """Split views by their order of colour operations (count, 4) into parts to make at once: index lists.

    On a CPU the views of a part share one order, so that none has to be picked out for an operation, and a
    part is small enough for the caches.
    """
    if device.type != "cpu":
        return [torch.arange(len(order))]
    order = order @ torch.tensor([64, 16, 4, 1])
    sizes = order.unique(return_counts=True)[1]
    return [rows for same in order.argsort(stable=True).split(sizes.tolist()) for rows in same.split(64)]


def make_views(images, boxes, flip, factors, order, grey, size=SIZE):
    """Make a view of every image, drawn by `draw_views`: uint8 (N, 84, 84, 3) -> (N, 3, size, size)."""
    boxes, flip, rows = (send(part, images.device) for part in (boxes, flip, grey.nonzero().squeeze(1)))
    x = jitter(crop(images, boxes, flip, size), factors, order)
    return x.index_copy_(0, rows, greyscale(x.index_select(0, rows)).expand(-1, 3, -1, -1))


def training_views(images, generator, size=SIZE, views=2, strength=STRENGTH):
    """Make normalised views: uint8 (N, 84, 84, 3) -> (views * N, 3, size, size), all first views first.

    SimCLR's views without blur (released code): random resized crop, flip, colour jitter, greyscale. With
    several processes each one has its share of the images, but draws for all of them.
    """
    draws = draw_views(views * len(images) * world(), generator, strength)
    draws = [share(draw.unflatten(0, (views, -1)), 1).flatten(0, 1) for draw in draws]
    out = torch.empty(views * len(images), 3, size, size, device=images.device)
    for rows in together(draws[3], images.device):
        of = images.index_select(0, send(rows % len(images), images.device))
        part = make_views(of, *(draw[rows] for draw in draws), size)
        out.index_copy_(0, send(rows, images.device), normalise(part))
    return out


def plain_views(images, size=SIZE):
    """Normalise whole images, to make features from: uint8 (N, 84, 84, 3) -> (N, 3, size, size)."""
    x = normalise(images.permute(0, 3, 1, 2).float() / 255)
    return x if size == SIZE else F.interpolate(x, (size, size), mode="bilinear", align_corners=False)


def contact_sheet(images, views, generator, size=SIZE, strength=STRENGTH):
    """Make a picture of training views, as the bytes of a PNG: a row is an image and random views of it.

    images uint8 (N, 84, 84, 3); the picture has N * 84 x (1 + views) * 84 pixels, to which views are scaled.
    """
    count = len(images)
    x = make_views(images.repeat_interleave(views, 0), *draw_views(count * views, generator, strength), size)
    x = F.interpolate(x, SIZE)
    x = (255 * x).round().byte().permute(0, 2, 3, 1).unflatten(0, (count, views)).cpu()
    rows = torch.cat([images.unsqueeze(1).cpu(), x], 1)  # (N, 1 + views, 84, 84, 3)
    buffer = io.BytesIO()
    Image.fromarray(rows.transpose(1, 2).reshape(count * SIZE, -1, 3).numpy()).save(buffer, "png")
    return buffer.getbuffer()
