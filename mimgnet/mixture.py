"""The Gaussian mixture of Meta-GMVAE, fitted by EM (the same file in omniglot/ and mimgnet/).

Symbols: z latents, pi mixture weights, mu means, var diagonal variances, resp responsibilities;
B sets (or episodes), M images of a set, S Monte-Carlo samples of an image, N samples in all, D latent size,
K components.
"""

import math

import torch

READINGS = ("unit", "learned", "tied", "tied-full", "k-means")  # of the E-step of `adapt`
MIN_VAR = 1e-6  # of `adapt`: a class whose samples coincide keeps a density
MIN_WEIGHT = 1e-12  # a component that lost all its samples keeps a finite log pi
PRIOR_IMAGES, PRIOR_SPREAD = 100, 10  # of "tied-full", for `shared_covariance`; chosen on Mini-ImageNet


def log_joint(z, pi, mu, var=None):
    """Return log pi_k N(z; mu_k, var_k) without the terms that do not depend on k, by matrix products.

    z (B, N, D), pi (B, K), mu (B, K, D) -> (B, K, N). var: variances (B, K, D), one covariance of all
    components (B, 1, D, D), or None for the identity. The terms left out are -D/2 log(2 pi), with a
    covariance C (None: the identity) also -z'C^-1 z/2 - log det C/2.
    Nothing of size N x K x D is formed (paper, Gaussian-mixture prior; eq. of the E-step).
    """
    log_pi = pi.clamp_min(MIN_WEIGHT).log()
    if var is None or var.ndim == 4:
        direction = mu if var is None else torch.linalg.solve(var.squeeze(1), mu.mT).mT
        return direction @ z.mT + (log_pi - 0.5 * (direction * mu).sum(-1)).unsqueeze(-1)
    precision = 1 / var
    constant = log_pi - 0.5 * (mu.square() * precision - precision.log()).sum(-1)
    return (mu * precision) @ z.mT - 0.5 * precision @ z.square().mT + constant.unsqueeze(-1)


def e_step(z, pi, mu, var=None):
    """Return the responsibilities p(y=k | z) of every sample; shapes as in `log_joint` -> (B, K, N)."""
    return log_joint(z, pi, mu, var).softmax(-2)


def m_step(z, resp, mu):
    """Maximise the expected likelihood: N_k = sum_i r_ik, mu_k = sum_i r_ik z_i / N_k.

    z (B, N, D), resp (B, K, N) -> pi (B, K), mu (B, K, D). A component without samples keeps its
    old mean, the argument mu, instead of 0/0.
    """
    weight = resp.sum(-1, keepdim=True)  # (B, K, 1)
    mu = torch.where(weight > MIN_WEIGHT, resp @ z / weight.clamp_min(MIN_WEIGHT), mu)
    return (weight / weight.sum(-2, keepdim=True)).squeeze(-1), mu


@torch.no_grad()
def fit_prior(z, components, iters, fix_pi=False, generator=None, start="samples"):
    """Fit the prior psi* = (pi, mu) of each set by unsupervised EM with identity covariance.

    z (B, M, S, D) -> pi (B, K), mu (B, K, D), fitted to the M S samples of each set. EM starts from uniform
    pi and K random "samples" (released code), or samples of K different "images"; if a set has fewer than K
    images, it takes one sample of each before a second of any. psi* is a constant for the gradient (paper, EM
    while meta-training).
    """
    B, M, S, D = z.shape
    draw = torch.rand(B, M, S, device=z.device, generator=generator)
    if start == "images":  # an image's largest draw stays in [0, 1), its others become negative
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
    """Return log p_psi(z) = log sum_k pi_k N(z; mu_k, I), in nats; z (B, N, D) -> (B, N)."""
    # What `log_joint` leaves out; with diagonal variances it would be the second term alone.
    left_out = 0.5 * z.square().sum(-1) + 0.5 * z.shape[-1] * math.log(2 * math.pi)
    return log_joint(z, pi, mu).logsumexp(-2) - left_out


def shared_covariance(moment, weight, mu, samples):
    """Estimate one covariance of all classes: (B, 1, D, D).

    moment (B, D, D) is the sum of zz' over all samples, weight (B, K, 1) the samples of each class, mu (B, K,
    D) their means. The estimate is a posterior mean; its inverse Wishart prior (in the form of Fraley and
    Raftery, J. of Classification 2007, who take the mode) is as if PRIOR_IMAGES more images of `samples`
    samples had PRIOR_SPREAD times the mean variance of all samples, in every direction: an episode's few
    images alone would give too small variances.
    """
    count, prior = weight.sum(1, keepdim=True), PRIOR_IMAGES * samples
    centre = (weight * mu).sum(1, keepdim=True) / count
    variance = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] / count
    variance = (variance - centre.square().mean(-1, keepdim=True)).clamp_min(MIN_VAR)
    scatter = moment - (weight * mu).mT @ mu
    wide = prior * PRIOR_SPREAD * variance * torch.eye(mu.shape[-1], dtype=mu.dtype, device=mu.device)
    return ((scatter + wide) / (count + prior)).unsqueeze(1)


@torch.no_grad()
def adapt(support, query, iters, reading="unit", samples=1):
    """Fit mean and variance of every class of an episode by semi-supervised EM.

    support (B, K, n, D): the n samples of each class, labels fixed; query (B, N, D): unlabeled samples;
    `samples` of them are one image's. -> mu, var (B, K, D). pi stays uniform. Readings of the E-step: "unit"
    variance (released code), the variance "learned" so far (paper, figure 1), "tied", learned but shared by
    the classes (their mean, weighted by their samples), "tied-full", a shared covariance, for which var is
    (B, 1, D, D), or "k-means": unit variance, each sample assigned to its likeliest class. With iters=0 the
    result is the support means and variance 1, or the support's covariance.
    """
    assert reading in READINGS, reading  # a new one would pass for "unit"
    B, K, n, D = support.shape
    pi = support.new_full((B, K), 1 / K)
    first, second = support.sum(2), support.square().sum(2)  # the support's share of every M-step
    mu, var, query2 = first / n, torch.ones_like(first), query.square()
    if reading == "tied-full":
        labeled, every = support.flatten(1, 2), torch.cat([support.flatten(1, 2), query], 1)
        var = shared_covariance(labeled.mT @ labeled, torch.full_like(mu[..., :1], n), mu, samples)
        moment = every.mT @ every
    for step in range(iters):
        resp = e_step(query, pi, mu, None if reading in ("unit", "k-means") else var)
        if reading == "k-means":
            resp = torch.zeros_like(resp).scatter_(-2, resp.argmax(-2, keepdim=True), 1)
        weight = n + resp.sum(-1, keepdim=True)
        mu = (first + resp @ query) / weight
        if reading == "tied-full":
            var = shared_covariance(moment, weight, mu, samples)
        elif reading in ("learned", "tied") or step == iters - 1:
            var = ((second + resp @ query2) / weight - mu.square()).clamp_min(MIN_VAR)
        if reading == "tied":
            var = ((weight * var).sum(1, keepdim=True) / weight.sum(1, keepdim=True)).expand_as(mu)
    return mu, var


@torch.no_grad()
def predict(query, mu, var):
    """Return class probabilities of query images, averaged over their S samples; pi uniform.

    query (B, Q, S, D), mu and var as `adapt` returns them -> (B, Q, K).
    """
    B, Q, S, D = query.shape
    resp = e_step(query.reshape(B, Q * S, D), mu.new_ones(mu.shape[:2]), mu, var)
    return resp.view(B, -1, Q, S).mean(-1).mT


@torch.no_grad()
def classify(support, query, iters, reading="unit"):
    """Classify episodes, from samples to class probabilities: `adapt`, then `predict`.

    support (B, K, shot, S, D), query (B, Q, S, D) -> (B, Q, K). The samples are first centred on the
    mean of one sample per class; the result is the same, but E[z^2] - mu^2 does not cancel in float32.
    """
    centre = support[:, :, 0, 0].mean(1)
    support, query = support - centre[:, None, None, None], query - centre[:, None, None]
    mu, var = adapt(support.flatten(2, 3), query.flatten(1, 2), iters, reading, query.shape[2])
    return predict(query, mu, var)


def sample_posterior(mean, log_var, noise):
    """Draw z = m + s * noise: mean, log_var (..., M, D), noise (..., M, S, D) -> (..., M, S, D)."""
    return ((0.5 * log_var).exp().unsqueeze(-2) * noise).add_(mean.unsqueeze(-2))


def log_posterior(log_var, noise):
    """Return log q(z|x) of z = m + s * noise, in nats: shapes as in `sample_posterior` -> (..., M, S).

    The mean of the posterior cancels.
    """
    return -0.5 * (noise.square().sum(-1) + (log_var + math.log(2 * math.pi)).sum(-1, keepdim=True))
