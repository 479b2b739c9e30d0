"""Meta-GMVAE for feature vectors: the Gaussian mixture fitted by EM, and the networks around it.

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


class GMVAE(nn.Module):
    """Set network and decoder for features of any width; no image encoder.

    Nothing here depends on the number of components. With bf16, set network and decoder run under
    autocast; everything the mixture sees is float32.
    """

    def __init__(self, feature_size, hidden_size=512, latent_size=32, set_attention=True, bf16=False):
        super().__init__()
        width = feature_size
        self.sizes = {"feature_size": feature_size, "hidden_size": hidden_size, "latent_size": latent_size, "set_attention": set_attention}
        self.bf16 = bf16
        self.set_network = nn.Sequential(SetAttention(width), SetAttention(width), nn.Linear(width, 2 * latent_size))
        self.decoder = nn.Sequential(
            nn.Linear(latent_size, hidden_size), nn.ReLU(),
            nn.Linear(hidden_size, hidden_size), nn.ReLU(),
            nn.Linear(hidden_size, width), nn.ReLU(),  # the features end in a ReLU as well
        )  # fmt: skip

    def autocast(self, x):
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16)

    def posterior(self, h):
        """q(z_i | x_i, X) of every member of a set: features (B, M, width) -> mean, log variance (B, M, D), float32.

        Without set attention q(z_i | x_i): every image is a set of its own.
        """
        sets = h if self.sizes["set_attention"] else h.flatten(0, 1).unsqueeze(1)
        with self.autocast(h):
            return self.set_network(sets).float().view(*h.shape[:2], -1).chunk(2, dim=-1)

    def decode(self, z):
        """Latents (N, D) -> reconstructed features (N, width), float32 >= 0."""
        with self.autocast(z):
            return self.decoder(z).float()


def loss_terms(model, x, samples, components, em_iters, fix_pi=False, generator=None, start="samples"):
    """Both terms of the negative evidence lower bound, an image; their sum is the objective.

    x (B, M, width) -> (-E log p(x|z), E[log q(z|x,X) - log p_psi*(z)]), means over images and Monte-Carlo
    samples. -log p(x|z) is the squared error summed over features (no 1/2, no constant: a Gaussian of variance
    1/2). psi* is fitted to the sets' own samples inside and carries no gradient.
    """
    B, M = x.shape[:2]
    mean, log_var = model.posterior(x)
    noise = torch.randn(B, M, samples, mean.shape[-1], device=x.device, generator=generator)
    z = sample_posterior(mean, log_var, noise)  # (B, M, S, D)
    pi, mu = fit_prior(z.detach(), components, em_iters, fix_pi, generator, start)
    kl = log_posterior(log_var, noise).mean() - log_prior(z.flatten(1, 2), pi, mu).mean()
    y = model.decode(z.flatten(0, 2)).view(B, M, samples, -1)
    squared_error = F.mse_loss(y, x.unsqueeze(2).expand_as(y), reduction="sum")
    return squared_error / (B * M * samples), kl
