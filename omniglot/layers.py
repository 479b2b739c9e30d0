"""The decoder's transposed convolutions in forms that are fast on a CPU; elsewhere PyTorch's own layer
runs."""

import torch
import torch.nn.functional as F
from torch import nn


class ConvTranspose(nn.ConvTranspose2d):
    """Transposed convolution, stride 2, padding 1: x (N, channels_in, H, W) -> (N, channels, ..., ...).

    With a bias oneDNN takes two to ten times as long on a CPU: the bias is added afterwards, unless it is
    frozen at zero (`frozen_bias`).
    """

    def __init__(self, channels_in, channels, kernel_size):
        super().__init__(channels_in, channels, kernel_size, stride=2, padding=1)

    def forward(self, x):
        if x.device.type != "cpu":
            return super().forward(x)
        if self.kernel_size == (4, 4) and self.out_channels == 1:
            y = OneChannel.apply(x, self.weight.to(x.dtype))
        elif self.kernel_size == (4, 4) and x.shape[2:] == (2, 2):
            y = dense(x, self.weight)
        else:
            y = F.conv_transpose2d(x, self.weight, None, self.stride, self.padding)
        return y.add_(self.bias.to(y.dtype).view(-1, 1, 1)) if self.bias.requires_grad else y


class OneChannel(torch.autograd.Function):
    """Transposed convolution with kernel 4, stride 2 and padding 1, to a single channel.

    x (N, C, H, W), weight (C, 1, 4, 4) -> (N, 1, 2 H, 2 W).

    Forward is one matrix product, of every pixel with the 4x4 taps, and sums of the results: the library's
    forward, made for many channels, takes four times as long on a CPU. Backward is the library's.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        N, C, H, W = x.shape
        taps = (weight.view(C, 16).mT @ x.permute(0, 2, 3, 1).reshape(-1, C).mT).view(4, 4, N, H, W)
        y = x.new_empty(N, 1, 2 * H, 2 * W)
        pixels = y.view(N, H, 2, W, 2)
        for i, rows in enumerate(overlap(taps, -2)):
            for j, sums in enumerate(overlap(rows, -1)):
                pixels[:, :, i, :, j] = sums
        return y

    @staticmethod
    def backward(ctx, grad):
        # stride, padding, dilation, transposed, output padding, groups
        geometry = [2, 2], [1, 1], [1, 1], True, [0, 0], 1
        return torch.ops.aten.convolution_backward(
            grad, *ctx.saved_tensors, None, *geometry, [True, True, False]
        )[:2]


def overlap(taps, dim):
    """Sum the taps that fall on the same output pixel.

    taps (4, ..., n, ...), four for each of n pixels along `dim` -> n sums at even places, n at odd places.
    """
    even, odd, n = taps[1].clone(), taps[2].clone(), taps.shape[dim]
    even.narrow(dim, 1, n - 1).add_(taps[3].narrow(dim, 0, n - 1))  # of the pixel before
    odd.narrow(dim, 0, n - 1).add_(taps[0].narrow(dim, 1, n - 1))  # of the pixel after
    return even, odd


def dense(x, weight):
    """Apply a transposed convolution with kernel 4, stride 2 and padding 1 to 2x2 pixels.

    x (N, C_in, 2, 2), weight (C_in, C, 4, 4) -> (N, C, 4, 4).

    It is one matrix product: each of the 4 input pixels reaches 9 of the 16 output pixels.
    """
    # reach (C_in, C, 2, 2, 4, 4): channel in, channel out, pixel in, pixel out
    reach = F.pad(weight, (1, 1, 1, 1)).unfold(2, 4, 2).unfold(3, 4, 2).flip(2, 3)
    matrix = reach.permute(0, 2, 3, 4, 5, 1).reshape(x[0].numel(), -1)
    return (x.flatten(1) @ matrix).view(len(x), 4, 4, -1).permute(0, 3, 1, 2)
