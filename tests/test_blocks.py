"""The encoders' blocks in their forms for training on a CPU, against PyTorch's own layers."""

import copy

import pytest
import torch
from torch import nn

from conftest import load

# Of the two experiments with images: odd sizes are rounded down in SimCLR's pools, up in Omniglot's.
BLOCKS = {folder: load(folder, "model").ConvBlock for folder in ("simclr", "omniglot")}
SIZES = [
    ("simclr", 3, 64, 64), ("simclr", 3, 84, 84), ("simclr", 3, 10, 6), ("simclr", 3, 21, 21),
    ("simclr", 8, 42, 42), ("simclr", 8, 21, 5), ("omniglot", 1, 28, 28), ("omniglot", 1, 7, 7),
    ("omniglot", 8, 14, 14), ("omniglot", 8, 7, 7), ("omniglot", 8, 4, 5),
]  # fmt: skip


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def plain_block(folder):
    """Convolution, batch norm, ReLU, pool, as PyTorch has them."""
    up = folder == "omniglot"
    return lambda block, x: nn.functional.max_pool2d(block.norm(block.conv(x)).relu(), 2, ceil_mode=up)


def run_block(folder, forward, channels_in, x, dtype):
    """Output, gradients and running statistics of a block with weights that are the same every time."""
    torch.manual_seed(1)
    block = BLOCKS[folder](channels_in, 16).to(dtype)
    with torch.no_grad():
        block.norm.weight.normal_()  # of either sign
        block.norm.bias.normal_()
        block.conv.bias.normal_()  # a loaded encoder's may not be zero
    y = forward(block, x)
    (y * torch.randn(y.shape, generator=generator(3), dtype=dtype)).sum().backward()
    grads = block.conv.weight.grad, block.norm.weight.grad, block.norm.bias.grad
    return y, *grads, block.norm.running_mean, block.norm.running_var, block.norm.num_batches_tracked


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 3e-5)])
@pytest.mark.parametrize("folder, channels, height, width", SIZES)
def test_a_training_block_is_the_plain_one(folder, channels, height, width, dtype, tolerance):
    x = 0.3 + torch.randn(7, channels, height, width, generator=generator(), dtype=dtype)
    x = nn.functional.avg_pool2d(x, 3, 1, 1)  # smooth as images
    both = [x.clone().requires_grad_(channels == 8) for _ in range(2)]
    forwards = BLOCKS[folder].forward, plain_block(folder)
    ours, plain = (run_block(folder, f, channels, x, dtype) for f, x in zip(forwards, both))
    if channels == 8:
        ours, plain = (*ours, both[0].grad), (*plain, both[1].grad)
    for a, b in zip(ours, plain, strict=True):
        assert (a - b).double().norm() <= tolerance * b.double().norm()


@pytest.mark.parametrize("folder, channels, size", [("simclr", 3, 64), ("omniglot", 1, 28)])
def test_the_first_block_in_bf16_is_as_near_to_the_exact_one_as_the_plain_one(folder, channels, size):
    x = 0.3 + torch.randn(32, channels, size, size, generator=generator())
    x, plain = nn.functional.avg_pool2d(x, 3, 1, 1), plain_block(folder)

    def errors(forward):
        torch.manual_seed(1)
        block = BLOCKS[folder](channels, 16)
        exact = plain(copy.deepcopy(block).double(), x.double())
        with torch.autocast("cpu", torch.bfloat16):
            return (forward(block, x) - exact).norm() / exact.norm()

    assert errors(BLOCKS[folder].forward) < 1.5 * errors(plain) < 0.02


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 64, 32, 32), (5, 6, 21, 5), (2000, 4, 3, 2)])
def test_pool_relu_is_torchs_bit_for_bit(shape, dtype):
    x = torch.randn(shape, generator=generator()).to(dtype)  # in bf16 with equals among four pixels
    a, b = (x.clone(memory_format=torch.channels_last).requires_grad_() for _ in range(2))
    ours, theirs = load("simclr", "blocks").PoolReLU.apply(a), nn.functional.max_pool2d(b, 2).relu()
    grad = torch.randn(ours.shape, generator=generator(1)).to(dtype)
    ours.backward(grad), theirs.backward(grad)
    assert ours.equal(theirs) and a.grad.equal(b.grad)
