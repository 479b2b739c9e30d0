"""The pose of a drawing: where, how large and how slanted it is; images without it; random warps.

Ours, not the paper's: the decoder draws a character without its pose, see the README. Poses differ
within a class, so a latent variable that need not carry them separates the classes better.

A point u = (x, y) lies in [-1, 1]^2, x to the right and y down; pixel i of W is centred at (2i + 1) / W - 1.
A pose is measured and applied in float32 and without matrix products, so neither autocast nor
TF32 lowers its precision.
"""

import math

import torch
import torch.nn.functional as F


def pose(x, shape=0.25):
    """Measure the pose of each image by the moments of its ink (ours, not the paper's; see the README).

    x (..., H, W, 1) in [0, 1], ink 1 -> centre c (..., 2) in [-1, 1], matrix M = r P (..., 2, 2), symmetric.
    C: the covariance of the ink plus 0.002 I. Size r: the root of its trace, clamped to [0.15, 1], over 0.55.
    Shape P = (C / mean eigenvalue)^shape: with 0 the identity (position and size only); 0.25 takes out half
    of the slant and aspect, 0.5 all of it.
    An empty image has centre 0 and the smallest size.
    """
    (ink,) = x.float().unbind(-1)  # (..., H, W); several channels are refused
    height, width = ink.shape[-2:]
    mass = ink.sum((-2, -1)).clamp(min=1e-6)  # one pixel of 1/255 is still a drawing
    columns, rows = ink.sum(-2), ink.sum(-1)  # (..., W), (..., H)
    u, v = _centres(width, x.device), _centres(height, x.device)
    centre = torch.stack([(columns * u).sum(-1), (rows * v).sum(-1)], -1) / mass.unsqueeze(-1)
    u, v = u - centre[..., :1], v - centre[..., 1:]  # before squaring, or float32 cancels
    xx, yy = (columns * u.square()).sum(-1) / mass + 2e-3, (rows * v.square()).sum(-1) / mass + 2e-3
    xy = ((ink * u.unsqueeze(-2)).sum(-1) * v).sum(-1) / mass

    # A symmetric C = mean (I + spread D), where D = [[cos, sin], [sin, -cos]] has the eigenvalues 1 and -1.
    # So (C / mean)^p = even I + odd D: no eigenvectors to find, no trouble where the eigenvalues are equal.
    mean, half = (xx + yy) / 2, (xx - yy) / 2
    length = (half.square() + xy.square()).sqrt()
    cos, sin = half / length.clamp(min=1e-12), xy / length.clamp(min=1e-12)
    high, low = (1 + length / mean) ** shape, ((xx * yy - xy.square()) / (mean * (mean + length))) ** shape
    even, odd = (high + low) / 2, (high - low) / 2
    matrix = torch.stack([even + odd * cos, odd * sin, odd * sin, even - odd * cos], -1).unflatten(-1, (2, 2))
    size = (xx + yy).sqrt().clamp(0.15, 1) / 0.55
    return centre, size[..., None, None] * matrix


def canonical(x, pose):
    """Draw each image without its pose, the decoder's target: t(u) = x(c + M u) (ours, not the paper's).

    x (..., H, W, 1) in [0, 1], pose (c, M) as `pose` measures it -> t of x's shape, float32 in [0, 1];
    bilinear, zero outside x.
    """
    centre, matrix = pose
    return _sample(x, _grid(x, matrix, centre))


def put_back(t, pose):
    """Draw each canonical image in its place, the inverse of `canonical`: x(u) = t(M^-1 (u - c)).

    t (..., H, W, 1) in [0, 1], pose (c, M) -> x of t's shape, float32 in [0, 1]; bilinear, zero outside t.
    """
    centre, matrix = pose
    inverse = torch.linalg.inv_ex(matrix).inverse  # M is never singular, so a GPU need not wait for the check
    return _sample(t, _grid(t, inverse, -(inverse * centre.unsqueeze(-2)).sum(-1)))


def warp(x, strength, generator=None):
    """Warp each image at random, for the encoder in training: x(A u + s + d(u)) (ours, not the paper's).

    x (..., H, W, 1) in [0, 1] -> x's shape, float32 in [0, 1]; bilinear, zero outside x. Drawn for each image
    from `generator`, on x's device. `strength` "affine": A = rotation * shear * scale, uniform
    within +-15 degrees, +-0.2 and, for each axis, e^+-0.2; each shift in s is within +-0.2. "elastic": also a
    smooth displacement d, bicubic between 5 x 5 points of N(0, 0.08^2).
    """
    batch, (height, width) = x.shape[:-3], x.shape[-3:-1]
    draw = torch.rand(*batch, 6, device=x.device, generator=generator) * 2 - 1
    turn, shear, wide, tall = draw[..., :4].unbind(-1)
    cos, sin = (turn * math.radians(15)).cos(), (turn * math.radians(15)).sin()
    shear, wide, tall = 0.2 * shear, (0.2 * wide).exp(), (0.2 * tall).exp()
    matrix = [wide * cos, tall * (shear * cos - sin), wide * sin, tall * (shear * sin + cos)]
    grid = _grid(x, torch.stack(matrix, -1).unflatten(-1, (2, 2)), 0.2 * draw[..., 4:])
    if strength == "elastic":
        knots = 0.08 * torch.randn(*batch, 2, 5, 5, device=x.device, generator=generator)
        with torch.autocast(x.device.type, enabled=False):  # two products are faster than F.interpolate
            field = _bicubic(height, x.device) @ knots @ _bicubic(width, x.device).mT  # (..., 2, H, W)
        grid = grid + torch.stack(field.unbind(-3), -1)
    return _sample(x, grid)


def _centres(count, device):
    """Return the coordinates of `count` pixel centres in [-1, 1]."""
    return (2 * torch.arange(count, device=device, dtype=torch.float32) + 1) / count - 1


def _bicubic(count, device):
    """Return the matrix (count, 5) that draws `count` points through 5, as F.interpolate does."""
    identity = torch.eye(5, device=device)[None, None]
    return F.interpolate(identity, (count, 5), mode="bicubic", align_corners=True)[0, 0]


def _grid(x, matrix, shift):
    """Return A u + s for the pixels u of x (..., H, W, 1), a row term plus a column term: (..., H, W, 2)."""
    height, width = x.shape[-3:-1]
    across = _centres(width, x.device)[:, None] * matrix[..., None, :, 0]  # (..., W, 2)
    down = _centres(height, x.device)[:, None] * matrix[..., None, :, 1] + shift.unsqueeze(-2)  # (..., H, 2)
    return across.unsqueeze(-3) + down.unsqueeze(-2)


def _sample(x, grid):
    """Sample the images x (..., H, W, 1) at the points grid (..., H, W, 2)."""
    images = x.float().reshape(-1, 1, *x.shape[-3:-1])
    points = grid.reshape(-1, *grid.shape[-3:])
    return F.grid_sample(images, points, padding_mode="zeros", align_corners=False).view(x.shape)
