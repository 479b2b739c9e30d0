"""The method written out slowly from its equations: the oracle of the tests and the baseline of bench.py.

Plain eager PyTorch in the dtype of its inputs, torch.distributions for every density, everything materialised;
nothing is shared with the experiments' own mathematics. One set or one episode at a time: no batch dimension.
"""

import torch
from torch.distributions import Bernoulli, Independent, Normal


def component_log_joint(z, pi, mu, var):
    """log pi_k + log N(z_i; mu_k, diag var_k): z (N, D), pi (K), mu and var (K, D) -> (N, K)."""
    density = Independent(Normal(mu, var.sqrt()), 1).log_prob(z.unsqueeze(1))
    return pi.log() + density


def e_step(z, pi, mu, var):
    """r_ik = pi_k N(z_i) / sum_j pi_j N_j(z_i) -> (N, K)."""
    joint = component_log_joint(z, pi, mu, var)
    return (joint - joint.logsumexp(1, keepdim=True)).exp()


def m_step(z, resp):
    """N_k, mu_k = sum_i r_ik z_i / N_k, pi_k = N_k / sum N -> pi (K), mu (K, D)."""
    weight = resp.sum(0)
    mu = (resp.unsqueeze(-1) * z.unsqueeze(1)).sum(0) / weight.unsqueeze(-1)
    return weight / weight.sum(), mu


def fit_prior(z, mu, iters, fix_pi=False):
    """Unsupervised EM with identity covariance from the starting means mu (K, D) -> pi, mu."""
    uniform = pi = z.new_full((len(mu),), 1 / len(mu))
    for _ in range(iters):
        pi, mu = m_step(z, e_step(z, pi, mu, torch.ones_like(mu)))
        pi = uniform if fix_pi else pi
    return pi, mu


def log_likelihood(z, pi, mu):
    """log p_psi(z_i) with identity covariance -> (N)."""
    return component_log_joint(z, pi, mu, torch.ones_like(mu)).logsumexp(1)


def adapt(support, query, iters, learned_e_step):
    """Semi-supervised EM: support (K, n, D) with fixed labels, query (N, D) -> mu, var (K, D)."""
    K, n, D = support.shape
    pi = support.new_full((K,), 1 / K)
    mu, var = support.mean(1), torch.ones_like(support[:, 0])
    labels = torch.eye(K, dtype=support.dtype).repeat_interleave(n, 0)
    z = torch.cat([support.flatten(0, 1), query])
    for _ in range(iters):
        resp = torch.cat([labels, e_step(query, pi, mu, var if learned_e_step else torch.ones_like(var))])
        _, mu = m_step(z, resp)
        squares = (z.unsqueeze(1) - mu).square()  # (K n + N, K, D)
        var = (resp.unsqueeze(-1) * squares).sum(0) / resp.sum(0).unsqueeze(-1)
    return mu, var


def classify(support, query, iters, learned_e_step):
    """Class probabilities of query images: support (K, n, D), query (Q, S, D) -> (Q, K)."""
    Q, S, D = query.shape
    mu, var = adapt(support, query.flatten(0, 1), iters, learned_e_step)
    pi = mu.new_full((len(mu),), 1 / len(mu))
    return e_step(query.flatten(0, 1), pi, mu, var).view(Q, S, -1).mean(1)


def log_posterior(z, mean, log_var):
    """log q(z|x) of the samples: z (M, S, D), mean and log_var (M, D) -> (M, S)."""
    scale = (0.5 * log_var).exp().unsqueeze(1)
    return Independent(Normal(mean.unsqueeze(1), scale), 1).log_prob(z)


def bernoulli_reconstruction(logits, x):
    """-log p(x|z), summed over pixels: logits (M, S, pixels), x (M, pixels) in [0, 1] -> (M, S), in nats."""
    target = x.unsqueeze(1).expand_as(logits)
    return -Independent(Bernoulli(logits=logits, validate_args=False), 1).log_prob(target)
