"""Where, how large and how slanted a character was drawn: its pose, taken out of a drawing and put back (ours, not the
paper's).

Coordinates u are in [-1, 1]^2, x to the right and y down, at the centres of pixels. Images are (N, H, W, 1), ink = 1.
"""

import math

import torch
import torch.nn.functional as F

SOFT = 2e-3  # added to the covariance: a dot has an extent too
SIZE, SMALLEST = 0.55, 0.15  # of a canonical drawing, and of the smallest that is magnified
ROTATION, SCALE, SHEAR, SHIFT = math.radians(15), 0.2, 0.2, 0.2  # most that `warp` draws: radians, log, share, half-widths
BEND, KNOTS = 0.08, 5  # standard deviation of an elastic warp's displacements, and their grid


def pixel_centres(x):
    """Return the coordinates u of the pixels of x (N, H, W, 1) -> (H, W, 2)."""
    v, u = ((2 * torch.arange(n, device=x.device) + 1) / n - 1 for n in x.shape[1:3])
    return torch.stack(torch.meshgrid(u, v, indexing="xy"), -1)


def pose(x, shape=0.25):
    """Measure the pose of drawings by the moments of their ink: x (N, H, W, 1) -> centre c (N, 2), matrix r W (N, 2, 2).

    r is the size, W = (C / mean eigenvalue)^shape the share of slant and aspect: with shape 0 none (W = I), with 1/2 all.
    Without ink: centre 0.
    """
    u = pixel_centres(x).flatten(0, 1)  # (pixels, 2)
    ink = x.flatten(1).float()
    ink = ink / ink.sum(1, keepdim=True).clamp_min(1e-6)
    c = ink @ u
    second = (ink @ torch.stack([u[:, 0] ** 2, u[:, 0] * u[:, 1], u[:, 1] ** 2], -1)).unbind(1)
    xx, xy, yy = second[0] - c[:, 0] ** 2 + SOFT, second[1] - c[:, 0] * c[:, 1], second[2] - c[:, 1] ** 2 + SOFT
    size = (xx + yy).sqrt().clamp(SMALLEST, 1) / SIZE
    # C / mean eigenvalue = I + T with eigenvalues 1 +- e; its power is even(e) I + odd(e) / e T.
    mean = (xx + yy) / 2
    trace_free = torch.stack([(xx - yy) / 2, xy, xy, (yy - xx) / 2], -1).view(-1, 2, 2) / mean.view(-1, 1, 1)
    e = trace_free[:, 0].norm(dim=-1).clamp(1e-6, 1 - 1e-6)
    high, low = (1 + e) ** shape, (1 - e) ** shape
    even, odd = (high + low) / 2, (high - low) / 2
    W = even.view(-1, 1, 1) * torch.eye(2, device=x.device) + (odd / e).view(-1, 1, 1) * trace_free
    return c, size.view(-1, 1, 1) * W


def sample(x, grid):
    """Read x (N, H, W, 1) at grid (N, H, W, 2), bilinear, zero outside."""
    return F.grid_sample(x.permute(0, 3, 1, 2).float(), grid, align_corners=False).permute(0, 2, 3, 1)


def canonical(x, pose):
    """Draw x (N, H, W, 1) without its pose: t(u) = x(c + r W u)."""
    c, matrix = pose
    return sample(x, pixel_centres(x) @ matrix.mT.unsqueeze(1) + c.view(-1, 1, 1, 2))


def put_back(t, pose):
    """Draw canonical images t (N, H, W, 1) back in their place: the inverse of `canonical`, but for what fell outside."""
    c, matrix = pose
    inverse = torch.linalg.inv(matrix)
    return sample(t, (pixel_centres(t) - c.view(-1, 1, 1, 2)) @ inverse.mT.unsqueeze(1))


def warp(x, kind, generator=None):
    """Warp every image at random: x (N, H, W, 1) -> the same; one draw an image, from `generator` on x's device.

    "affine": rotation, scale of each axis, shear and shift, uniform; "elastic": also smooth displacements.
    """
    N = len(x)
    draw = 2 * torch.rand(N, 6, device=x.device, generator=generator) - 1  # in [-1, 1)
    angle, shear, shift = ROTATION * draw[:, 0], SHEAR * draw[:, 3], SHIFT * draw[:, 4:]
    scale = (SCALE * draw[:, 1:3]).exp()
    cos, sin, one, zero = angle.cos(), angle.sin(), torch.ones_like(angle), torch.zeros_like(angle)
    rotation = torch.stack([cos, -sin, sin, cos], -1).view(N, 2, 2)
    matrix = rotation @ torch.stack([one, shear, zero, one], -1).view(N, 2, 2) * scale.unsqueeze(1)
    grid = pixel_centres(x) @ matrix.mT.unsqueeze(1) + shift.view(N, 1, 1, 2)
    if kind == "elastic":
        bend = BEND * torch.randn(N, 2, KNOTS, KNOTS, device=x.device, generator=generator)
        bend = F.interpolate(bend, x.shape[1:3], mode="bicubic", align_corners=True)
        grid = grid + bend.permute(0, 2, 3, 1)
    return sample(x, grid)
