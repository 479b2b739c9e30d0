"""The method written out plainly from its equations: the oracle of the tests and the baseline of bench.py.

Eager PyTorch in the dtype of its inputs, every density by its definition, every tensor of size N x K x D
formed, the target repeated for every sample, EM recorded by autograd, no cache; nothing is shared with the
experiments but the names of the parameters, so that a state dict of theirs can be loaded. Leading dimensions
are sets or episodes.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

# --- the mixture ----------------------------------------------------------------------------------


def log_normal(z, mu, var):
    """log N(z; mu, diag var), summed over the last dimension."""
    return -0.5 * ((z - mu) ** 2 / var + var.log() + math.log(2 * math.pi)).sum(-1)


def component_log_joint(z, pi, mu, var):
    """log pi_k + log N(z_i; mu_k, diag var_k): z (..., N, D), pi (..., K), mu and var (..., K, D) -> (..., N,
    K)."""
    return pi.log().unsqueeze(-2) + log_normal(z.unsqueeze(-2), mu.unsqueeze(-3), var.unsqueeze(-3))


def e_step(z, pi, mu, var):
    """r_ik = pi_k N_k(z_i) / sum_j pi_j N_j(z_i) -> (..., N, K)."""
    joint = component_log_joint(z, pi, mu, var)
    return (joint - joint.logsumexp(-1, keepdim=True)).exp()


def m_step(z, resp):
    """N_k, mu_k = sum_i r_ik z_i / N_k, pi_k = N_k / sum N -> pi (..., K), mu (..., K, D)."""
    weight = resp.sum(-2)
    mu = (resp.unsqueeze(-1) * z.unsqueeze(-2)).sum(-3) / weight.unsqueeze(-1)
    return weight / weight.sum(-1, keepdim=True), mu


def starting_samples(draws, K, start="samples"):
    """Indices (B, K) of the samples that EM starts from, by uniform draws (B, M, S); from "images", each of
    another one, K at most M."""
    if start == "samples":
        return draws.flatten(1).topk(K).indices
    images = draws.amax(-1).topk(K).indices
    return images * draws.shape[-1] + draws.argmax(-1).gather(-1, images)


def fit_prior(z, mu, iters, fix_pi=False):
    """Unsupervised EM with identity covariance from the starting means mu (..., K, D) -> pi, mu."""
    uniform = pi = z.new_full(mu.shape[:-1], 1 / mu.shape[-2])
    for _ in range(iters):
        pi, mu = m_step(z, e_step(z, pi, mu, torch.ones_like(mu)))
        pi = uniform if fix_pi else pi
    return pi, mu


def log_likelihood(z, pi, mu):
    """log p_psi(z_i) with identity covariance -> (..., N)."""
    return component_log_joint(z, pi, mu, torch.ones_like(mu)).logsumexp(-1)


def adapt(support, query, iters, reading):
    """Semi-supervised EM: support (..., K, n, D) with fixed labels, query (..., N, D) -> mu, var (..., K,
    D)."""
    K, n = support.shape[-3:-1]
    pi = support.new_full(support.shape[:-2], 1 / K)
    mu, var = support.mean(-2), torch.ones_like(support[..., 0, :])
    labels = (
        torch.eye(K, dtype=support.dtype, device=support.device)
        .repeat_interleave(n, 0)
        .expand(*support.shape[:-3], -1, -1)
    )
    z = torch.cat([support.flatten(-3, -2), query], -2)
    for _ in range(iters):
        guess = e_step(query, pi, mu, var if reading in ("learned", "tied") else torch.ones_like(var))
        if reading == "k-means":
            guess = F.one_hot(guess.argmax(-1), K).to(guess)
        resp = torch.cat([labels, guess], -2)
        _, mu = m_step(z, resp)
        squares = (z.unsqueeze(-2) - mu.unsqueeze(-3)) ** 2  # (..., K n + N, K, D)
        var = (resp.unsqueeze(-1) * squares).sum(-3) / resp.sum(-2).unsqueeze(-1)
        if reading == "tied":  # one variance for all classes, of every sample around its own class's mean
            var = (
                ((resp.unsqueeze(-1) * squares).sum((-3, -2)) / resp.sum((-2, -1)).unsqueeze(-1))
                .unsqueeze(-2)
                .expand_as(mu)
            )
    return mu, var


def adapt_tied_full(support, query, iters, samples):
    """The same with one full covariance: support (K, n, D), query (N, D) -> mu (K, D), covariance (D, D).

    100 more images, of ten times the mean variance of all, are in every estimate; the first one is of the
    support alone.
    """
    K, n, D = support.shape
    given = torch.eye(K, dtype=support.dtype).repeat_interleave(n, 0)

    def covariance(z, resp, mu):
        spread = z.var(0, correction=0).mean()
        total = 100 * samples * 10 * spread * torch.eye(D, dtype=z.dtype)
        for i in range(len(z)):
            for k in range(K):
                total = total + resp[i, k] * torch.outer(z[i] - mu[k], z[i] - mu[k])
        return total / (len(z) + 100 * samples)

    mu = support.mean(1)
    cov = covariance(support.flatten(0, 1), given, mu)
    z = torch.cat([support.flatten(0, 1), query])
    for _ in range(iters):
        resp = torch.cat([given, posterior_of_class(query, mu, cov)])
        _, mu = m_step(z, resp)
        cov = covariance(z, resp, mu)
    return mu, cov


def posterior_of_class(z, mu, cov):
    """p(y=k | z) for Gaussian classes of one covariance, equally likely: z (N, D) -> (N, K)."""
    normal = torch.distributions.MultivariateNormal
    return torch.stack([normal(m, cov).log_prob(z) for m in mu], -1).softmax(-1)


def classify(support, query, iters, reading):
    """Class probabilities of query images: support (..., K, n, D), query (..., Q, S, D) -> (..., Q, K)."""
    if reading == "tied-full":
        mu, cov = adapt_tied_full(support, query.flatten(0, 1), iters, query.shape[1])
        return posterior_of_class(query.flatten(0, 1), mu, cov).unflatten(0, query.shape[:2]).mean(1)
    mu, var = adapt(support, query.flatten(-3, -2), iters, reading)
    pi = mu.new_full(mu.shape[:-1], 1 / mu.shape[-2])
    return e_step(query.flatten(-3, -2), pi, mu, var).unflatten(-2, query.shape[-3:-1]).mean(-2)


def log_posterior(z, mean, log_var):
    """log q(z|x) of the samples: z (..., M, S, D), mean and log_var (..., M, D) -> (..., M, S)."""
    return log_normal(z, mean.unsqueeze(-2), log_var.exp().unsqueeze(-2))


# --- the networks ---------------------------------------------------------------------------------


class SetAttention(nn.Module):
    """h = q + Attn(q, k, v), one head after the other; out = h + relu(W h)."""

    def __init__(self, width, heads=4):
        super().__init__()
        self.width, self.heads = width, heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (x @ w.T + b for w, b in zip(self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)))
        heads = zip(*(part.chunk(self.heads, -1) for part in (q, k, v)))
        attended = torch.cat(
            [torch.softmax(a @ b.mT / math.sqrt(self.width), -1) @ c for a, b, c in heads], -1
        )
        h = q + attended
        return h + F.relu(self.out(h))


class ConvBlock(nn.Module):
    """Convolution, batch norm, ReLU, max-pool: in the order of the method."""

    def __init__(self, channels_in, channels, ceil_mode):
        super().__init__()
        self.conv, self.norm, self.ceil_mode = (
            nn.Conv2d(channels_in, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            ceil_mode,
        )

    def forward(self, x):
        return F.max_pool2d(F.relu(self.norm(self.conv(x))), 2, ceil_mode=self.ceil_mode)


def set_network(width, latent_size):
    return nn.Sequential(SetAttention(width), SetAttention(width), nn.Linear(width, 2 * latent_size))


class ImageGMVAE(nn.Module):
    """Omniglot's encoder, set network and decoder."""

    def __init__(self, hidden_size=64, latent_size=64):
        super().__init__()
        c, width = hidden_size, 4 * hidden_size
        self.encoder = nn.Sequential(
            *(ConvBlock(1 if i == 0 else c, c, ceil_mode=True) for i in range(4)), nn.Flatten()
        )
        self.set_network = set_network(width, latent_size)
        mlp = [layer for i in range(3) for layer in (nn.Linear(width if i else latent_size, width), nn.ELU())]
        up = [
            layer
            for k in (4, 3, 4)
            for layer in (nn.ConvTranspose2d(c, c, k, 2, 1), nn.BatchNorm2d(c), nn.ReLU())
        ]
        self.decoder = nn.Sequential(*mlp, nn.Unflatten(1, (c, 2, 2)), *up, nn.ConvTranspose2d(c, 1, 4, 2, 1))

    def posterior(self, x):
        """Images of sets (B, M, 28, 28, 1) -> mean, log variance (B, M, D)."""
        h = self.encoder(x.flatten(0, 1).permute(0, 3, 1, 2)).view(*x.shape[:2], -1)
        return self.set_network(h).chunk(2, -1)

    def reconstruction(self, z, x):
        """-log p(x|z), cross-entropy summed over pixels: z (B, M, S, D), x (B, M, 28, 28, 1) -> (B, M, S)."""
        y = torch.sigmoid(self.decoder(z.flatten(0, 2))).view(*z.shape[:3], -1)
        target = x.flatten(2).unsqueeze(2).repeat(1, 1, z.shape[2], 1)
        return F.binary_cross_entropy(y, target, reduction="none").sum(-1)


class FeatureGMVAE(nn.Module):
    """Mini-ImageNet's set network and decoder."""

    def __init__(self, feature_size=256, hidden_size=512, latent_size=32):
        super().__init__()
        sizes = (latent_size, hidden_size, hidden_size, feature_size)
        self.set_network = set_network(feature_size, latent_size)
        self.decoder = nn.Sequential(
            *(layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.ReLU()))
        )

    def posterior(self, x):
        return self.set_network(x).chunk(2, -1)

    def reconstruction(self, z, x):
        """Squared error summed over features: z (B, M, S, D), x (B, M, width) -> (B, M, S)."""
        target = x.unsqueeze(2).repeat(1, 1, z.shape[2], 1)
        return ((self.decoder(z) - target) ** 2).sum(-1)


def loss_terms(network, x, noise, first, iters, fix_pi=False, decoded=None):
    """(-E log p(x|z), E[log q - log p_psi*]) from noise (B, M, S, D), starting samples first (B, K).

    decoded (B, M, n): the samples of each image that pass the decoder; None: all.
    """
    mean, log_var = network.posterior(x)
    z = mean.unsqueeze(2) + (0.5 * log_var).exp().unsqueeze(2) * noise  # (B, M, S, D)
    samples = z.flatten(1, 2)
    start = torch.stack([samples[b, first[b]] for b in range(len(x))])
    pi, mu = fit_prior(samples, start, iters, fix_pi)
    kl = log_posterior(z, mean, log_var).flatten(1) - log_likelihood(samples, pi.detach(), mu.detach())
    if decoded is not None:
        z = z.take_along_dim(decoded.unsqueeze(-1), 2)
    return network.reconstruction(z, x).mean(), kl.mean()


def episode_noise(pool, count, way, shot, members, S, D, most=None):
    """Return the noise of `evaluate`, (count, way, members, S, D): of consecutive images of a pool, the
    support's first; of the first `most` episodes, if it is given."""
    noise = torch.randn(pool, S, D, generator=torch.Generator().manual_seed(0))
    start = torch.randint(pool, (count, 1), generator=torch.Generator().manual_seed(1))
    found = []
    for first in start.flatten()[:most].tolist():
        own = noise.roll(-first, 0)[: way * members]
        support, query = (
            own[: way * shot].unflatten(0, (way, shot)),
            own[way * shot :].unflatten(0, (way, members - shot)),
        )
        found.append(torch.cat([support, query], 1))
    return torch.stack(found)


def predict_episodes(network, x, shot, noise, iters, reading="unit"):
    """Probabilities of queries: x (B, way, members, ...), noise (B, way, members, S, D) -> (B, Q, K)."""
    mean, log_var = network.posterior(x.flatten(1, 2))
    z = mean.unsqueeze(2) + (0.5 * log_var).exp().unsqueeze(2) * noise.flatten(1, 2)
    z = z.unflatten(1, x.shape[1:3])  # (B, way, members, S, D)
    return classify(z[:, :, :shot].flatten(2, 3), z[:, :, shot:].flatten(1, 2), iters, reading)


class Encoder(nn.Module):
    """SimCLR's Conv5."""

    def __init__(self, hidden_size=64):
        super().__init__()
        c = hidden_size
        self.blocks = nn.Sequential(
            ConvBlock(3, c, ceil_mode=False),
            *(ConvBlock(c, c, ceil_mode=False) for _ in range(4)),
            nn.Flatten(),
        )

    def forward(self, x):
        return self.blocks(x)


def nt_xent(z, temperature):
    """Mean over the 2 N views of -log exp(s_ij / t) / sum over k != i of exp(s_ik / t), s the cosine."""
    N = len(z) // 2
    z = F.normalize(z)
    similar = z @ z.mT / temperature  # (2 N, 2 N)
    others = ~torch.eye(2 * N, dtype=torch.bool, device=z.device)
    total = (similar.exp() * others).sum(1).log()
    positive = torch.cat([similar.diagonal(N), similar.diagonal(-N)])
    return (total - positive).mean()


def prototypical(h, views, temperature):
    """Mean over ordered pairs of views u, v and images i of -log softmax_j(-|h_ui - h_vj|^2 / t) at j = i."""
    groups = h.chunk(views)
    pairs = [(q, p) for v, p in enumerate(groups) for u, q in enumerate(groups) if u != v]
    logits = [-(q.unsqueeze(1) - p).square().sum(-1) / temperature for q, p in pairs]  # each (N, N)
    return -torch.stack([each.log_softmax(-1).diagonal() for each in logits]).mean()
