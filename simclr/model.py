"""SimCLR: an image encoder trained so that views of an image have similar projections, or features.

Symbols: N images of a batch, so 2 N views (or more); h features (the encoder's output), z projections.
"""

import torch
import torch.nn.functional as F
from torch import nn

from blocks import PoolReLU, first_block, frozen_bias
from machine import UserError, in_short
from runtime import load_checkpoint


class ConvBlock(nn.Module):
    """3x3 convolution, batch norm, 2x2 max-pool (odd sizes rounded down), ReLU.

    Max-pool and ReLU commute; pooling first leaves the ReLU and its gradient a quarter of the pixels.
    """

    def __init__(self, channels_in, channels):
        super().__init__()
        self.conv = frozen_bias(nn.Conv2d(channels_in, channels, 3, padding=1))
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        if not (self.training and x.device.type == "cpu"):
            return F.max_pool2d(self.norm(self.conv(x)), 2).relu()
        if x.requires_grad or x.shape[2] % 2 or x.shape[3] % 2:
            return PoolReLU.apply(self.norm(self.conv(x)))
        return first_block(x, self.conv, self.norm)


class Encoder(nn.Module):
    """Conv5: (N, 3, 84, 84) normalised images -> float32 features h (N, 4 * hidden_size); 150,144 parameters.

    Published features are 256 wide: 2 x 2 places of 64 channels (paper, Mini-ImageNet). Images of other sizes
    have (size // 32)^2 places. With bf16 the convolutions run under autocast. With `directions` (width, K),
    which `lda` finds once the encoder is trained, `features` are K wide.
    """

    def __init__(self, hidden_size=64, bf16=False, directions=None):
        super().__init__()
        c = hidden_size
        self.sizes, self.bf16 = {"hidden_size": hidden_size}, bf16
        if directions:
            self.sizes["directions"] = list(directions)
            self.register_buffer("centre", torch.zeros(directions[0]))
            self.register_buffer("directions", torch.zeros(*directions))
        blocks = ConvBlock(3, c), *(ConvBlock(c, c) for _ in range(4))  # 84, 42, 21, 10, 5, 2 pixels
        self.blocks = nn.Sequential(*blocks, nn.Flatten())
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return self.blocks(x.contiguous(memory_format=torch.channels_last)).float()

    def width(self, size):
        """Return the number of features h of an image of `size` pixels."""
        return self.sizes["hidden_size"] * (size // 32) ** 2

    def features(self, x):
        """Return the features for few-shot learning: h, or its coordinates by `lda`, all of the same norm."""
        h = self(x)
        if "directions" in self.sizes:
            h = F.normalize((h - self.centre) @ self.directions, dim=-1) * self.sizes["directions"][1] ** 0.5
        return h


def projection_head(hidden_size=64):
    """Make h -> z, used in training only: 4 * hidden_size -> the same -> ReLU -> 128; 98,688 parameters."""
    width = 4 * hidden_size
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 128))


def nt_xent(z, temperature):
    """Return NT-Xent, the loss of 2 N views, in nats a view (SimCLR, ICML 2020, equation 1).

    z (2 N, width), float32: rows i and i + N are views of the same image. Each view has to find its other
    view among the 2 N - 1 others by cosine similarity / temperature.
    """
    z = F.normalize(z, dim=-1)
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)  # a view is no candidate for itself
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z) // 2))


def prototypical(h, views, temperature):
    """Return the loss of finding each view's image by one other view of every image, in nats a pair.

    h (views * N, width), float32: rows i, i + N, i + 2 N, ... are views of the same image, each in turn the
    prototype for the others. For a query q and prototypes p_1, ..., p_N, one view of each image, the logits
    are -|q - p_j|^2 / temperature: the prototypical network (Snell et al., NeurIPS 2017, equation 2) with one
    shot, an image as a class. A softmax is over different images: views of one image are never rivals.
    """
    n = len(h) // views
    h = h - h.mean(0)  # |p|^2 and q p would otherwise be large and cancel
    logits = (2 * h @ h.T - h.square().sum(-1)) / temperature  # without |q|^2: it is in every term
    row, view = torch.arange(len(h), device=h.device).unsqueeze(1), torch.arange(views, device=h.device)
    image = torch.where(row // n == view, -100, row % n)  # -100: a view is no prototype for itself
    return F.cross_entropy(logits.view(-1, n), image.flatten(), ignore_index=-100)


def lda(h, count):
    """Find the directions in which images differ most, in proportion to what differs in views of an image.

    Linear discriminant analysis (Fisher, 1936) with every image as a class; ours, not the paper's. h (V, N,
    width): V views of N images -> their mean (width,), directions (width, count), the best first. With W the
    covariance of the views of an image, plus half its mean variance on the diagonal against noise, and B the
    covariance of the images' means, the columns p maximise p'Bp / p'Wp and have p'Wp = 1. Raises UserError if
    the features do not vary.
    """
    h = h.double()
    means = h.mean(0)
    spread = (h - means).flatten(0, 1)
    within = spread.T @ spread / ((len(h) - 1) * len(means))
    if not within.any():
        raise UserError("--lda: the same features for every view found; did the encoder's training collapse?")
    within += 0.5 * within.diagonal().mean() * torch.eye(len(within), dtype=h.dtype)
    root = torch.linalg.cholesky(within)
    half = torch.linalg.solve_triangular(root, means.T.cov(), upper=False)
    whitened = torch.linalg.solve_triangular(root, half.T, upper=False)  # B where W is the identity
    best = torch.linalg.eigh(whitened).eigenvectors[:, -count:].flip(1)
    return means.mean(0).float(), torch.linalg.solve_triangular(root.T, best, upper=True).float()


def load_model(path):
    """Load the weights of a trained encoder, in evaluation mode. Raises UserError."""
    checkpoint = load_checkpoint(path)
    try:
        model = Encoder(**checkpoint["sizes"])
        model.load_state_dict(checkpoint["model"])
    except (AttributeError, IndexError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: not a checkpoint of this experiment ({in_short(error)})") from None
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"{path}: weights that are NaN or infinite found, finite ones expected")
    return model.eval()
