"""Meta-GMVAE for images: the Gaussian mixture fitted by EM, and the networks around it.

Symbols: z latents, pi mixture weights, mu means, var diagonal variances, resp responsibilities;
B sets (or episodes), M images of a set, S Monte-Carlo samples of an image, D latent size, K components.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

# --- the mixture (the same text in every experiment that has one) ---------------------------------

MIN_VAR = 1e-6  # a class whose samples coincide keeps a density
MIN_WEIGHT = 1e-12  # a component that lost all its samples keeps a finite log pi


def log_joint(z, pi, mu, var=None):
    """log pi_k N(z; mu_k, var_k) less its terms without k, as matrix products.

    z (B, N, D), pi (B, K), mu (B, K, D), var (B, K, D) or None for the identity -> (B, K, N).
    Without var the terms left out are -|z|^2/2 - D/2 log(2 pi); with var, only -D/2 log(2 pi).
    Nothing of size N x K x D is formed (paper, Gaussian-mixture prior; eq. of the E-step).
    """
    log_pi = pi.clamp_min(MIN_WEIGHT).log()
    if var is None:
        return mu @ z.mT + (log_pi - 0.5 * mu.square().sum(-1)).unsqueeze(-1)
    precision = 1 / var
    constant = log_pi - 0.5 * (mu.square() * precision - precision.log()).sum(-1)
    return (mu * precision) @ z.mT - 0.5 * precision @ z.square().mT + constant.unsqueeze(-1)


def e_step(z, pi, mu, var=None):
    """Responsibilities p(y=k | z) of every sample; shapes as in `log_joint` -> (B, K, N)."""
    return log_joint(z, pi, mu, var).softmax(-2)


def m_step(z, resp, mu):
    """Weights and means that maximise the expected likelihood: N_k = sum_i r_ik, mu_k = sum_i r_ik z_i / N_k.

    z (B, N, D), resp (B, K, N) -> pi (B, K), mu (B, K, D). A component without samples keeps its
    old mean, the argument mu, instead of 0/0.
    """
    weight = resp.sum(-1, keepdim=True)  # (B, K, 1)
    mu = torch.where(weight > MIN_WEIGHT, resp @ z / weight.clamp_min(MIN_WEIGHT), mu)
    return (weight / weight.sum(-2, keepdim=True)).squeeze(-1), mu


@torch.no_grad()
def fit_prior(z, components, iters, fix_pi=False, generator=None, start="samples"):
    """Unsupervised EM with identity covariance: the prior psi* = (pi, mu) of each set.

    z (B, M, S, D) -> pi (B, K), mu (B, K, D), fitted to the M S samples of each set. Starts from uniform pi and K random
    "samples" (released code), or samples of K "images" where there are as many; constants for the gradient (paper, section
    on the meta-training EM).
    """
    B, M, S, D = z.shape
    draw = torch.rand(B, M, S, device=z.device, generator=generator)
    if start == "images":  # none gives a second sample before each has given one
        draw = torch.where(draw < draw.amax(-1, keepdim=True), draw - 1, draw)
    first, z = draw.flatten(1).topk(components, dim=-1).indices, z.flatten(1, 2)
    mu = z.gather(1, first.unsqueeze(-1).expand(-1, -1, D))
    uniform = pi = z.new_full((B, components), 1 / components)
    for _ in range(iters):
        pi, mu = m_step(z, e_step(z, pi, mu), mu)
        if fix_pi:
            pi = uniform
    return pi, mu


def log_prior(z, pi, mu):
    """log p_psi(z) = log sum_k pi_k N(z; mu_k, I), in nats; z (B, N, D) -> (B, N)."""
    return log_joint(z, pi, mu).logsumexp(-2) - 0.5 * z.square().sum(-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)


@torch.no_grad()
def adapt(support, query, iters, reading="unit"):
    """Semi-supervised EM: mean and diagonal variance of every class of an episode.

    support (B, K, n, D): the n samples of each class, labels fixed; query (B, N, D): unlabeled samples.
    -> mu, var (B, K, D). pi stays uniform. Readings of the E-step: "unit" variance (released code), the variance
    "learned" so far (paper, figure 1), or "hard": unit variance, each sample wholly in its likeliest class (k-means).
    Without iterations: support means, variance 1.
    """
    B, K, n, D = support.shape
    pi = support.new_full((B, K), 1 / K)
    first, second = support.sum(2), support.square().sum(2)  # the support's share of every M-step
    mu, var, query2 = first / n, torch.ones_like(first), query.square()
    for step in range(iters):
        resp = e_step(query, pi, mu, var if reading == "learned" else None)
        if reading == "hard":
            resp = torch.zeros_like(resp).scatter_(-2, resp.argmax(-2, keepdim=True), 1)
        weight = n + resp.sum(-1, keepdim=True)
        mu = (first + resp @ query) / weight
        if reading == "learned" or step == iters - 1:
            var = ((second + resp @ query2) / weight - mu.square()).clamp_min(MIN_VAR)
    return mu, var


@torch.no_grad()
def predict(query, mu, var):
    """Class probabilities of query images, averaged over their S samples; pi uniform.

    query (B, Q, S, D), mu and var (B, K, D) -> (B, Q, K).
    """
    B, Q, S, D = query.shape
    resp = e_step(query.reshape(B, Q * S, D), mu.new_ones(mu.shape[:2]), mu, var)
    return resp.view(B, -1, Q, S).mean(-1).mT


@torch.no_grad()
def classify(support, query, iters, reading="unit"):
    """An episode from samples to class probabilities: `adapt`, then `predict`.

    support (B, K, shot, S, D), query (B, Q, S, D) -> (B, Q, K). The samples are first centred on a point
    among them, which changes no result but keeps E[z^2] - mu^2 far from cancelling in float32.
    """
    centre = support[:, :, 0, 0].mean(1)
    support, query = support - centre[:, None, None, None], query - centre[:, None, None]
    mu, var = adapt(support.flatten(2, 3), query.flatten(1, 2), iters, reading)
    return predict(query, mu, var)


def sample_posterior(mean, log_var, noise):
    """z = m + s * noise: mean, log_var (..., M, D), noise (..., M, S, D) -> (..., M, S, D)."""
    return ((0.5 * log_var).exp().unsqueeze(-2) * noise).add_(mean.unsqueeze(-2))


def log_posterior(log_var, noise):
    """log q(z|x) of z = m + s * noise, in nats, which needs the noise only; shapes as in `sample_posterior` -> (..., M, S)."""
    return -0.5 * (noise.square().sum(-1) + (log_var + math.log(2 * math.pi)).sum(-1, keepdim=True))


# --- the networks ---------------------------------------------------------------------------------


class SetAttention(nn.Module):
    """Self-attention over the members of a set, without layer norm: (B, M, width) -> the same.

    h = q + softmax(q k^T / sqrt(width)) v in 4 heads, or as many as divide the width; out = h + relu(W h). The
    residual adds the projected query and the scale is the full width's, not a head's, as in the released code.
    """

    def __init__(self, width, heads=4):
        super().__init__()
        self.heads = math.gcd(heads, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        B, M, width = x.shape
        q, k, v = self.qkv(x).view(B, M, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, M, width / heads)
        h = q + (q * width**-0.5 @ k.mT).softmax(-1) @ v  # sets are short: faster than torch's fused attention on a CPU
        h = h.transpose(1, 2).reshape(B, M, width)
        return h + self.out(h).relu()


class ConvBlock(nn.Module):
    """3x3 convolution, batch norm, 2x2 max-pool (ceil mode), ReLU.

    Max-pool and ReLU commute; pooling first leaves the ReLU and its gradient a quarter of the pixels.
    """

    def __init__(self, channels_in, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.max_pool2d(self.norm(self.conv(x)), 2, ceil_mode=True).relu()


class OneChannel(torch.autograd.Function):
    """Transposed convolution of kernel 4, stride 2 and padding 1 to a single channel: x (N, C, H, W), weight (C, 1, 4, 4) -> (N, 1, 2 H, 2 W).

    Forward as one matrix product, of every pixel with its 4x4 taps, and their sums: a library's, made for many channels,
    takes four times as long on a CPU. Backward is the library's.
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
        return torch.ops.aten.convolution_backward(grad, *ctx.saved_tensors, None, [2, 2], [1, 1], [1, 1], True, [0, 0], 1, [True, True, False])[:2]


def overlap(taps, dim):
    """Sums of the four taps (4, ..., n, ...) of each of n pixels along `dim` that fall on the same place: at even places, at odd ones (each n)."""
    even, odd, n = taps[1].clone(), taps[2].clone(), taps.shape[dim]
    even.narrow(dim, 1, n - 1).add_(taps[3].narrow(dim, 0, n - 1))  # of the pixel before
    odd.narrow(dim, 0, n - 1).add_(taps[0].narrow(dim, 1, n - 1))  # of the pixel after
    return even, odd


def dense(x, weight):
    """Transposed convolution of kernel 4, stride 2 and padding 1 of 2x2 pixels: x (N, C_in, 2, 2), weight (C_in, C, 4, 4) -> (N, C, 4, 4).

    One matrix product: of the 16 pixels that come out, each of the four that go in reaches nine.
    """
    reach = F.pad(weight, (1, 1, 1, 1)).unfold(2, 4, 2).unfold(3, 4, 2).flip(2, 3)  # (C_in, C, 2, 2, 4, 4): pixel in, pixel out
    matrix = reach.permute(0, 2, 3, 4, 5, 1).reshape(x[0].numel(), -1)
    return (x.flatten(1) @ matrix).view(len(x), 4, 4, -1).permute(0, 3, 1, 2)


class ConvTranspose(nn.ConvTranspose2d):
    """Transposed convolution of stride 2 and padding 1; its bias is added after it, or left to the `BatchNorm` that is.

    With the bias inside, oneDNN on a CPU takes twice the time, or ten times.
    """

    def __init__(self, channels_in, channels, kernel_size, add_bias=True):
        super().__init__(channels_in, channels, kernel_size, stride=2, padding=1)
        self.add_bias = add_bias

    def forward(self, x):
        if self.kernel_size == (4, 4) and self.out_channels == 1:
            y = OneChannel.apply(x, self.weight.to(x.dtype))
        elif self.kernel_size == (4, 4) and x.shape[2:] == (2, 2):
            y = dense(x, self.weight)
        else:
            y = F.conv_transpose2d(x, self.weight, None, self.stride, self.padding)
        return y.add_(self.bias.to(y.dtype).view(-1, 1, 1)) if self.add_bias else y


class BatchNorm(nn.BatchNorm2d):
    """Batch norm of x + bias, given x and the convolution whose bias it is.

    Normalising takes a bias away again; it moves the running mean and nothing else. A training step is spared two
    passes over the pixels, to add it and to sum its gradient, which is zero: the optimizer sees none, and the bias
    keeps its first value, where weight decay would shrink it.
    """

    def __init__(self, conv):
        super().__init__(conv.out_channels)
        self.convs = (conv,)  # in a tuple: as a submodule its parameters would be listed twice

    def forward(self, x):
        bias = self.convs[0].bias.detach()
        mean = self.running_mean - bias
        y = F.batch_norm(x, mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps)
        if self.training:
            self.running_mean.copy_(mean + bias)
            self.num_batches_tracked.add_(1)
        return y


def up_block(channels, kernel_size):
    """The layers of a decoder's block: transposed convolution, batch norm, ReLU."""
    conv = ConvTranspose(channels, channels, kernel_size, add_bias=False)
    return conv, BatchNorm(conv), nn.ReLU(inplace=True)


class GMVAE(nn.Module):
    """Encoder, set network and decoder for 28x28 images; 988,929 parameters at the defaults.

    Nothing here depends on the number of components. With bf16, encoder, set network and decoder run
    under autocast; everything the mixture sees is float32.
    """

    def __init__(self, hidden_size=64, latent_size=64, set_attention=True, bf16=False):
        super().__init__()
        c, width = hidden_size, 4 * hidden_size
        self.sizes, self.bf16 = {"hidden_size": hidden_size, "latent_size": latent_size, "set_attention": set_attention}, bf16
        self.encoder = nn.Sequential(ConvBlock(1, c), ConvBlock(c, c), ConvBlock(c, c), ConvBlock(c, c), nn.Flatten())
        self.set_network = nn.Sequential(SetAttention(width), SetAttention(width), nn.Linear(width, 2 * latent_size))
        self.decoder = nn.Sequential(
            nn.Linear(latent_size, width), nn.ELU(),
            nn.Linear(width, width), nn.ELU(),
            nn.Linear(width, width), nn.ELU(),
            nn.Unflatten(1, (c, 2, 2)),
            *up_block(c, 4),  # 4x4
            *up_block(c, 3),  # 7x7
            *up_block(c, 4),  # 14x14
            ConvTranspose(c, 1, 4),
        )  # fmt: skip
        self.to(memory_format=torch.channels_last)

    def autocast(self, x):
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16)

    def encode(self, x):
        """Images alone: (N, 28, 28, 1) float in [0, 1] -> features (N, 4 * hidden_size)."""
        with self.autocast(x):
            return self.encoder(x.permute(0, 3, 1, 2))

    def posterior(self, h):
        """q(z_i | x_i, X) of every member of a set: features (B, M, width) -> mean, log variance (B, M, D), float32.

        Without set attention q(z_i | x_i): every image is a set of its own.
        """
        sets = h if self.sizes["set_attention"] else h.flatten(0, 1).unsqueeze(1)
        with self.autocast(h):
            return self.set_network(sets).float().view(*h.shape[:2], -1).chunk(2, dim=-1)

    def decode(self, z):
        """Latents (N, D) -> Bernoulli logits of the pixels (N, 28, 28, 1), float32."""
        with self.autocast(z):
            return self.decoder(z).float().permute(0, 2, 3, 1)


def loss_terms(model, x, samples, components, em_iters, fix_pi=False, generator=None, start="samples"):
    """Both terms of the negative evidence lower bound, in nats an image; their sum is the objective.

    x (B, M, 28, 28, 1) float in [0, 1] -> (-E log p(x|z), E[log q(z|x,X) - log p_psi*(z)]), means over
    images and Monte-Carlo samples. psi* is fitted to the sets' own samples inside and carries no gradient.
    """
    B, M = x.shape[:2]
    mean, log_var = model.posterior(model.encode(x.flatten(0, 1)).view(B, M, -1))
    noise = torch.randn(B, M, samples, mean.shape[-1], device=x.device, generator=generator)
    z = sample_posterior(mean, log_var, noise)  # (B, M, S, D)
    pi, mu = fit_prior(z.detach(), components, em_iters, fix_pi, generator, start)
    kl = log_posterior(log_var, noise).mean() - log_prior(z.flatten(1, 2), pi, mu).mean()
    logits = model.decode(z.flatten(0, 2)).view(B * M, samples, -1)
    # Binary cross-entropy on logits is softplus(l) - x l; the second term needs no copy of x for every sample.
    bce = F.softplus(logits).sum() - (logits.sum(1) * x.view(B * M, -1)).sum()
    return bce / (B * M * samples), kl
