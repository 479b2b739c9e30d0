"""The mixture's mathematics against the equations in float64, and what must hold for any input."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

import plain
from conftest import load

mixture = load("omniglot", "mixture")


def random_mixture(seed, B=3, N=40, D=6, K=4, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(B, N, D, generator=g, dtype=dtype)
    pi = torch.rand(B, K, generator=g, dtype=dtype).softmax(-1)
    mu = 2 * torch.randn(B, K, D, generator=g, dtype=dtype)
    var = torch.rand(B, K, D, generator=g, dtype=dtype) + 0.1
    return z, pi, mu, var


@pytest.mark.parametrize("learned", [False, True])
def test_e_step(learned):
    z, pi, mu, var = random_mixture(0)
    resp = mixture.e_step(z, pi, mu, var if learned else None)
    for b in range(len(z)):
        expected = plain.e_step(z[b], pi[b], mu[b], var[b] if learned else torch.ones_like(var[b]))
        torch.testing.assert_close(resp[b].mT, expected)


def test_m_step():
    z, pi, mu, _ = random_mixture(1)
    resp = mixture.e_step(z, pi, mu)
    new_pi, new_mu = mixture.m_step(z, resp, mu)
    for b in range(len(z)):
        expected = plain.m_step(z[b], resp[b].mT)
        torch.testing.assert_close((new_pi[b], new_mu[b]), expected)


@pytest.mark.parametrize("start", ["samples", "images"])
@pytest.mark.parametrize("fix_pi", [False, True])
@pytest.mark.parametrize("iters", [0, 1, 10])
def test_fit_prior(iters, fix_pi, start):
    z = random_mixture(2)[0]
    pi, mu = mixture.fit_prior(
        z.unflatten(1, (8, 5)), 4, iters, fix_pi, torch.Generator().manual_seed(7), start
    )
    first = plain.starting_samples(torch.rand(3, 8, 5, generator=torch.Generator().manual_seed(7)), 4, start)
    for b in range(len(z)):
        assert len(z[b, first[b]].unique(dim=0)) == 4
        torch.testing.assert_close((pi[b], mu[b]), plain.fit_prior(z[b], z[b, first[b]], iters, fix_pi))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), M=st.integers(1, 9), S=st.integers(1, 5), data=st.data())
def test_em_starts_at_distinct_samples_or_images(seed, M, S, data):
    """K distinct samples; from "images", of as many images as there are: none twice before each has been
    taken once."""
    K = data.draw(st.integers(1, M * S))
    z = torch.arange(2 * M * S, dtype=torch.float64).view(2, M, S, 1)
    for start in ("samples", "images"):
        mu = mixture.fit_prior(z, K, 0, generator=torch.Generator().manual_seed(seed), start=start)[1]
        for found, images in zip(mu.squeeze(-1), z.squeeze(-1)):
            assert len(found.unique()) == K
            of = {int((images == sample).any(-1).nonzero()) for sample in found}
            assert len(of) == min(K, M) or start == "samples"


@pytest.mark.parametrize("start", ["samples", "images"])
def test_em_starts_anywhere(start):
    """Every sample of every image is as likely as any other."""
    z = torch.arange(12.0).view(1, 4, 3, 1).expand(3000, -1, -1, -1)
    mu = mixture.fit_prior(z, 2, 0, generator=torch.Generator().manual_seed(0), start=start)[1]
    times = torch.bincount(mu.flatten().long(), minlength=12)
    assert (times - 500).abs().max() < 100  # 4.5 standard deviations


def test_log_prior():
    z, pi, mu, _ = random_mixture(3)
    value = mixture.log_prior(z, pi, mu)
    for b in range(len(z)):
        torch.testing.assert_close(value[b], plain.log_likelihood(z[b], pi[b], mu[b]))


@pytest.mark.parametrize("reading", ["unit", "learned", "tied", "tied-full", "k-means"])
@pytest.mark.parametrize("iters", [0, 1, 10])
def test_adapt_and_classify(iters, reading):
    g = torch.Generator().manual_seed(4)
    B, K, shot, Q, S, D = 2, 3, 2, 5, 4, 6
    support = torch.randn(B, K, shot, S, D, generator=g, dtype=torch.float64) + torch.arange(K).view(
        1, K, 1, 1, 1
    )
    query = torch.randn(B, Q, S, D, generator=g, dtype=torch.float64) + 1
    mu, var = mixture.adapt(support.flatten(2, 3), query.flatten(1, 2), iters, reading, S)
    probabilities = mixture.classify(support, query, iters, reading)
    for b in range(B):
        flat = support[b].flatten(1, 2), query[b].flatten(0, 1), iters
        if reading == "tied-full":
            torch.testing.assert_close((mu[b], var[b, 0]), plain.adapt_tied_full(*flat, S))
        else:
            torch.testing.assert_close((mu[b], var[b]), plain.adapt(*flat, reading))
        torch.testing.assert_close(
            probabilities[b], plain.classify(support[b].flatten(1, 2), query[b], iters, reading)
        )


def test_float32_stays_close_far_from_the_origin():
    """Centring keeps the variance E[z^2] - mu^2 exact where the plain float32 difference would be noise."""
    g = torch.Generator().manual_seed(5)
    offset = 300.0
    support = offset + torch.randn(1, 3, 1, 8, 4, generator=g) * 0.1 + 2 * torch.eye(3, 4).view(1, 3, 1, 1, 4)
    query = (
        offset
        + torch.randn(1, 9, 8, 4, generator=g) * 0.1
        + 2 * torch.eye(3, 4).repeat_interleave(3, 0).view(1, 9, 1, 4)
    )
    probabilities = mixture.classify(support, query, 10)
    expected = plain.classify(support[0].flatten(1, 2).double(), query[0].double(), 10, "unit")
    torch.testing.assert_close(probabilities[0].double(), expected, atol=1e-3, rtol=0)


def test_sample_posterior():
    g = torch.Generator().manual_seed(6)
    mean, log_var = torch.randn(2, 5, 3, generator=g, dtype=torch.float64).unbind(0)
    noise = torch.randn(5, 4, 3, generator=g, dtype=torch.float64)
    z = mixture.sample_posterior(mean, log_var, noise)
    torch.testing.assert_close(z, mean.unsqueeze(1) + (0.5 * log_var).exp().unsqueeze(1) * noise)
    torch.testing.assert_close(mixture.log_posterior(log_var, noise), plain.log_posterior(z, mean, log_var))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    N=st.integers(6, 60),
    D=st.integers(1, 8),
    K=st.integers(1, 6),
    scale=st.sampled_from([0.01, 1.0, 5.0]),
)
def test_likelihood_never_falls(seed, N, D, K, scale):
    g = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(1, N, D, generator=g, dtype=torch.float64)
    before = -float("inf")
    for iters in range(8):
        pi, mu = mixture.fit_prior(z.unsqueeze(2), K, iters, generator=torch.Generator().manual_seed(seed))
        after = mixture.log_prior(z, pi, mu).sum().item()
        assert after >= before - 1e-6 * abs(after)
        torch.testing.assert_close(pi.sum(), torch.tensor(1.0, dtype=z.dtype))
        before = after


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e4])
@pytest.mark.parametrize("reading", ["unit", "learned", "tied", "tied-full", "k-means"])
def test_degenerate_sets_stay_finite(scale, reading):
    """Identical points, tiny and huge spreads, components that lose every sample."""
    g = torch.Generator().manual_seed(8)
    z = scale * torch.randn(2, 50, 4, generator=g)
    pi, mu = mixture.fit_prior(z.unflatten(1, (10, 5)), 5, 20, generator=g)
    assert mu.isfinite().all() and pi.isfinite().all() and mixture.log_prior(z, pi, mu).isfinite().all()
    support, query = z[:, :12].view(2, 3, 2, 2, 4), z[:, 12:48].view(2, 12, 3, 4)
    probabilities = mixture.classify(support, query, 10, reading)
    assert probabilities.isfinite().all()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 12))


def test_empty_component_keeps_its_mean():
    z = torch.zeros(1, 10, 2)
    mu = torch.tensor([[[0.0, 0.0], [1e6, 1e6]]])
    resp = mixture.e_step(z, torch.tensor([[0.5, 0.5]]), mu)
    pi, new = mixture.m_step(z, resp, mu)
    assert new.equal(mu) and pi.tolist() == [[1.0, 0.0]]
    assert mixture.e_step(z, pi, new).isfinite().all()  # log pi = log 0 is kept finite


def test_gradient_of_log_prior_with_an_empty_component():
    z = torch.randn(1, 6, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mixture.log_prior(z, torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2, 2)).sum().backward()
    torch.testing.assert_close(z.grad, -z.detach())


def test_an_unknown_reading_is_refused():
    with pytest.raises(AssertionError, match="tied_full"):
        mixture.adapt(torch.zeros(1, 2, 1, 3), torch.zeros(1, 4, 3), 1, "tied_full")
