"""The encoder's blocks in forms that are fast in training on a CPU; elsewhere PyTorch's own layers run.

The same file in omniglot/ and simclr/.
"""

import torch

ROWS = 4096  # 2x2 blocks at once: what one operation writes is still in a cache for the next one
# Floats are read as integers of the same size. A CPU is then much faster than in bf16; the maximum with 0 and
# products with 0 or 1 have the same bits. Of two negative floats the wrong one is kept; the ReLU makes it 0.
# The same holds for a NaN with its sign bit set: `Log.flush` checks the weights for that.
BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
CORNERS = (0, 0), (0, 1), (1, 0), (1, 1)


def frozen_bias(conv):
    """Freeze a convolution's bias at zero: the batch norm that follows would subtract it again."""
    conv.bias.requires_grad_(False).zero_()
    return conv


# --- 2x2 max-pool and ReLU: pixels a, b above c, d as BITS -------------------------------------------


def pixels(x):
    """List views (N, H // 2, W // 2, C) of the four pixels of every 2x2 block of x (N, H, W, C)."""
    h, w = x.shape[1] // 2, x.shape[2] // 2
    return [x[:, i : 2 * h : 2, j : 2 * w : 2] for i, j in CORNERS]


def pool(a, b, c, d, out, greater):
    """Write max(a, b, c, d, 0) into `out`; into `greater` 1 where b > a, d > c, below > above, or 0."""
    torch.gt(b, a, out=greater[0])
    torch.gt(d, c, out=greater[1])
    above, below = torch.maximum(a, b), torch.maximum(c, d)
    torch.gt(below, above, out=greater[2])
    torch.maximum(above, below, out=out).relu_()


def unpool(grad, greater, a, b, c, d):
    """Write the gradient of `pool`'s output to the pixel it came from (the first of equal ones), 0 elsewhere.

    `grad` has to be 0 where the pool wrote 0.
    """
    torch.mul(grad, greater[2], out=c)
    torch.sub(grad, c, out=a)
    torch.mul(a, greater[0], out=b)
    torch.mul(c, greater[1], out=d)
    a.sub_(b)
    c.sub_(d)


class PoolReLU(torch.autograd.Function):
    """2x2 max-pool, odd sizes rounded down, and ReLU: x (N, C, H, W) -> (N, C, H // 2, W // 2)."""

    @staticmethod
    def forward(ctx, x):
        ctx.dtype = x.dtype
        x = x.permute(0, 2, 3, 1).contiguous().view(BITS[x.dtype])
        N, H, W, C = ctx.shape = x.shape
        out, greater = x.new_empty(N, H // 2, W // 2, C), x.new_empty(3, N, H // 2, W // 2, C)
        at_once = max(1, 4 * ROWS // (H * W))
        for images, y, *won in zip(*(t.split(at_once) for t in (x, out, *greater))):
            pool(*pixels(images), y, won)
        ctx.save_for_backward(out, greater)
        return out.view(ctx.dtype).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, grad):
        out, greater = ctx.saved_tensors
        grad = grad.permute(0, 2, 3, 1).contiguous().view(out.dtype)
        _, H, W, _ = ctx.shape
        dx = out.new_zeros(ctx.shape) if H % 2 or W % 2 else out.new_empty(ctx.shape)
        at_once = max(1, 4 * ROWS // (H * W))
        for images, g, y, *won in zip(*(t.split(at_once) for t in (dx, grad, out, *greater))):
            unpool(y.sign().mul_(g), won, *pixels(images))
        return dx.view(ctx.dtype).permute(0, 3, 1, 2)


# --- the first block --------------------------------------------------------------------------------


def unfold(x, patches):
    """Write the 4x4 pixels around every 2x2 block into `patches`, zero beyond the edge.

    x (N, C, H, W), H and W even -> patches (N * H / 2 * W / 2, 4 * 4 * C).
    """
    N, C, H, W = x.shape
    padded = patches.new_zeros(N, H + 2, W + 2, C)
    padded[:, 1:-1, 1:-1] = x.permute(0, 2, 3, 1)
    around = padded.unfold(1, 4, 2).unfold(2, 4, 2).permute(0, 1, 2, 4, 5, 3)
    patches.view(around.shape).copy_(around)


class FirstBlock(torch.autograd.Function):
    """3x3 convolution, batch norm, 2x2 max-pool and ReLU of images, which need no gradient.

    x (N, C, H, W), H and W even; weight (O, C, 3, 3) -> (N, O, H / 2, W / 2) of type `dtype`, and the mean
    (O,) and variance (O,) of the convolution.

    With few channels in and many out, most time goes into passes over the output. This block makes none at
    full size: a pixel of the convolution is y = w p, where p is its patch of 9 C numbers. So the mean is
    w E[p], the variance is w cov(p) w, the norm's scale goes into the weights, and the pool follows while the
    product is in a cache. Backward, let u = (y - mean) / std, and g be the gradient of gamma u + beta, zero
    at three pixels of four. The norm's backward gives the gradient of y; multiplied by p and summed over the
    pixels, it is

        dw = gamma / std (sum(g p) - sum(g) E[p] - sum(g u) w cov(p) / std)
        sum(g u) = (w sum(g p) - mean sum(g)) / std
    """

    @staticmethod
    def forward(ctx, x, weight, gamma, beta, eps, dtype):
        (N, C, H, W), O, n = x.shape, len(weight), x.numel() // x.shape[1]
        exact = torch.promote_types(dtype, torch.float32)
        patches = torch.empty(n // 4, 16 * C, dtype=dtype)
        first, second = torch.zeros(16 * C, dtype=exact), torch.zeros(16 * C, 16 * C, dtype=exact)
        at_once = max(1, 4 * ROWS // (H * W))
        for images, part in zip(x.split(at_once), patches.split(at_once * H * W // 4)):
            unfold(images, part)
            part = part.to(exact)
            first += part.sum(0)
            second.addmm_(part.T, part)
        first, second = first.view(4, 4, C), second.view(4, 4, C, 4, 4, C)
        near = [(slice(i, i + 3), slice(j, j + 3)) for i, j in CORNERS]  # the 3x3 around a pixel, in the 4x4
        mean_p = sum(first[s] for s in near).flatten() / n
        pairs = sum(second[(*s, slice(None), *s)] for s in near).reshape(9 * C, 9 * C)
        cov_p = pairs / n - mean_p.outer(mean_p)

        w = weight.permute(0, 2, 3, 1).reshape(O, 9 * C).to(exact)
        mean, w_cov = w @ mean_p, w @ cov_p
        var = (w_cov * w).sum(1).clamp_min(0)
        scale = gamma * (var + eps).rsqrt()
        kernel = torch.zeros(3, 4, C, 2, O, dtype=exact)  # maps to two pixels, side by side
        for j in range(2):
            kernel[:, j : j + 3, :, j] = (w.T * scale).view(3, 3, C, O)
        kernel = kernel.view(12 * C, 2 * O).to(dtype)
        shift = (beta - mean * scale).to(dtype).repeat(2)
        out = torch.empty(n // 4, O, dtype=dtype).view(BITS[dtype])
        greater, y = out.new_empty(3, *out.shape), torch.empty(ROWS, 2, 2 * O, dtype=dtype)
        for p, top, *won in zip(*(t.split(ROWS) for t in (patches, out, *greater))):
            y = y[: len(p)]
            for i in range(2):
                torch.addmm(shift, p.unflatten(1, (4, -1))[:, i : i + 3].flatten(1), kernel, out=y[:, i])
            pool(*y.view(out.dtype).view(-1, 4, O).unbind(1), top, won)
        ctx.save_for_backward(patches, out, greater, w, w_cov, mean_p, mean, var, gamma)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return out.view(dtype).view(N, H // 2, W // 2, O).permute(0, 3, 1, 2), mean, var

    @staticmethod
    def backward(ctx, grad, *_):
        patches, out, greater, w, w_cov, mean_p, mean, var, gamma = ctx.saved_tensors
        C, O, rstd = patches.shape[1] // 16, len(w), (var + ctx.eps).rsqrt()
        sum_g, sums = torch.zeros_like(mean), w.new_zeros(12 * C, 2 * O)
        grad = grad.permute(0, 2, 3, 1).reshape(-1, O)
        dy = grad.new_empty(min(ROWS, len(out)), 4, O)
        for p, g, y, *won in zip(*(t.split(ROWS) for t in (patches, grad, out, *greater))):
            p, dy, g = p.unflatten(1, (4, -1)), dy[: len(p)], y.sign().mul_(g.view(out.dtype))
            unpool(g, won, *dy.view(out.dtype).unbind(1))
            for i in range(2):
                sums += p[:, i : i + 3].flatten(1).T @ dy[:, 2 * i : 2 * i + 2].flatten(1)
            sum_g += g.view(grad.dtype).sum(0, dtype=w.dtype)
        sums = sums.view(3, 4, C, 2, O)
        sum_gp = sum(sums[:, j : j + 3, :, j] for j in range(2)).reshape(9 * C, O).T
        sum_gu = ((w * sum_gp).sum(1) - mean * sum_g) * rstd
        dw = sum_gp - sum_g.outer(mean_p) - (sum_gu * rstd).unsqueeze(1) * w_cov
        dw = (gamma * rstd).unsqueeze(1) * dw
        return None, dw.view(O, 3, 3, C).permute(0, 3, 1, 2), sum_gu, sum_g, None, None


def remember(norm, mean, var, count):
    """Update a batch norm's running statistics with those of a batch of `count` values per channel."""
    norm.num_batches_tracked += 1
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
    norm.running_var.lerp_((var * (count / (count - 1))).to(norm.running_var.dtype), norm.momentum)


def first_block(x, conv, norm):
    """Run images (N, C, H, W) through `FirstBlock`, in bf16 under autocast, and update running statistics."""
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype
    with torch.autocast("cpu", enabled=False):
        out, mean, var = FirstBlock.apply(x, conv.weight, norm.weight, norm.bias, norm.eps, dtype)
        remember(norm, mean + conv.bias, var, x.numel() // x.shape[1])
    return out
