"""The Omniglot network, its loss and its evaluation."""

import copy

import pytest
import torch

import plain
from conftest import load

model = load("omniglot", "model")
layers = load("omniglot", "layers")
main = load("omniglot", "main")
evaluate = load("omniglot", "evaluate")
dataloader = load("omniglot", "dataloader")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return model.GMVAE(hidden_size=8, latent_size=6)


def test_parameter_count():
    assert sum(p.numel() for p in model.GMVAE().parameters()) == 988_929


@pytest.fixture
def in_float64(monkeypatch):
    """Draws in float64, and leaves the network's casts to float32 undone: they would cost the oracle its
    precision."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("fix_pi", [False, True])
def test_loss_terms_and_their_gradients(network, fix_pi, in_float64):
    """The whole training objective against the equations, on the same noise and the same starting samples."""
    B, M, S, K, iters = 2, 10, 3, 4, 5
    ours, oracle = copy.deepcopy(network).double().train(), plain.ImageGMVAE(hidden_size=8, latent_size=6)
    oracle.load_state_dict(ours.state_dict())
    x = torch.rand(B, M, 28, 28, 1)
    terms = ours(x, S, K, iters, fix_pi, torch.Generator().manual_seed(3))
    g = torch.Generator().manual_seed(3)  # the draws of forward again, in its order
    noise, first = (
        torch.randn(B, M, S, 6, generator=g),
        plain.starting_samples(torch.rand(B, M, S, generator=g), K),
    )
    expected = plain.loss_terms(oracle, x, noise, first, iters, fix_pi)
    torch.testing.assert_close(terms, expected)
    trained = [name for name, p in ours.named_parameters() if p.requires_grad]
    unused = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    for term, other in zip(terms, expected):
        gradient, theirs = (
            torch.autograd.grad(value, [network.get_parameter(name) for name in trained], **unused)
            for value, network in ((term, ours), (other, oracle))
        )
        torch.testing.assert_close(gradient, theirs, atol=1e-8, rtol=1e-6)
    for name, buffer in oracle.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], buffer)  # batch norm saw the same


@pytest.mark.parametrize("reading", ["unit", "learned", "k-means"])
@pytest.mark.parametrize("shot", [1, 3])
def test_predictions_against_the_equations(network, shot, reading):
    """The cache of features and the batched EM of `evaluate` against whole episodes, plainly."""
    ours, oracle = network.eval(), plain.ImageGMVAE(hidden_size=8, latent_size=6).eval()
    oracle.load_state_dict(ours.state_dict())
    images = torch.rand(6, 8, 28, 28, 1, generator=torch.Generator().manual_seed(1))
    episodes = dataloader.draw_episodes(images, 4, shot, 5, 7, seed=0)
    accuracy = evaluate.evaluate(ours, evaluate.encode_all(ours, images), episodes, shot, 5, 10, reading)
    noise = plain.episode_noise(evaluate.NOISE_POOL, 7, 4, shot, shot + 5, 5, 6)
    with torch.no_grad():
        probabilities = plain.predict_episodes(
            oracle, images.flatten(0, 1)[episodes], shot, noise, 10, reading
        )
    right = probabilities.argmax(-1).view(7, 4, 5) == torch.arange(4).view(4, 1)
    torch.testing.assert_close(accuracy, 100 * right.float().mean((1, 2)))
    assert accuracy.unique().numel() > 1


def test_without_set_attention_every_image_is_alone(network):
    alone = copy.deepcopy(network).eval()
    alone.sizes = network.sizes | {"set_attention": False}
    h = torch.randn(2, 5, 32)
    for found, expected in zip(alone.posterior(h), network.eval().posterior(h.view(10, 1, 32))):
        torch.testing.assert_close(found, expected.view(2, 5, -1))
    assert not torch.allclose(alone.posterior(h)[0], network.posterior(h)[0])


@pytest.mark.parametrize(
    "channels, kernel, height, width",
    [
        (1, 4, 14, 14),
        (1, 4, 1, 3),
        (1, 4, 2, 1),
        (1, 4, 2, 2),
        (3, 4, 2, 2),
        (3, 4, 7, 7),
        (3, 4, 2, 3),
        (3, 3, 2, 2),
    ],
)
def test_a_transposed_convolution(channels, kernel, height, width):
    """Written as matrix products to one channel and from 2x2 pixels, a library's elsewhere."""
    layer = layers.ConvTranspose(5, channels, kernel).double()
    x = torch.randn(3, 5, height, width, dtype=torch.float64, requires_grad=True)
    found, expected = (
        layer(x),
        torch.nn.functional.conv_transpose2d(x, layer.weight, layer.bias, stride=2, padding=1),
    )
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad(y, [x, *layer.parameters()], grad) for y in (found, expected))):
        torch.testing.assert_close(a, b)


def test_a_bias_before_batch_norm_is_frozen_at_zero():
    """It changes nothing: a block with a bias of any size gives the same, and its gradient is zero."""
    block = torch.nn.Sequential(*model.up_block(3, 4)).double()
    exact = torch.nn.Sequential(
        torch.nn.ConvTranspose2d(3, 3, 4, 2, 1), torch.nn.BatchNorm2d(3), torch.nn.ReLU()
    ).double()
    exact.load_state_dict(block.state_dict())
    torch.nn.init.constant_(exact[0].bias, 2)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    found, expected = block(x), exact(x)
    torch.testing.assert_close(found, expected)
    expected.square().sum().backward()
    torch.testing.assert_close(exact[0].bias.grad, torch.zeros(3, dtype=torch.float64))
    frozen = {name for name, p in model.GMVAE(8, 6).named_parameters() if not p.requires_grad}
    assert frozen == {
        *(f"encoder.{i}.conv.bias" for i in range(4)), "decoder.7.bias", "decoder.10.bias",
        "decoder.13.bias",
    }  # fmt: skip
    assert not any(model.GMVAE(8, 6).get_parameter(name).any() for name in frozen)


def test_decoding_a_part_of_the_samples_is_unbiased(network, in_float64, monkeypatch):
    """Over many draws the gradient averages to that of all samples; batch norm in evaluation mode."""
    ours, x = copy.deepcopy(network).double().eval(), torch.rand(1, 6, 28, 28, 1)
    noise = torch.randn(1, 6, 4, 6)
    monkeypatch.setattr(torch, "randn", lambda *size, **options: noise)  # the same samples every time

    def terms(seed, decoded):
        reconstruction, kl = ours(x, 4, 3, 2, generator=torch.Generator().manual_seed(seed), decoded=decoded)
        return reconstruction, torch.autograd.grad(reconstruction, ours.decoder[0].weight)[0], kl

    whole, gradient, kl = terms(0, None)
    assert terms(0, 1)[2] == kl  # which keeps all samples
    values, gradients, _ = (torch.stack(part) for part in zip(*(terms(seed, 1) for seed in range(400))))
    assert values.std() > 0 and abs(values.mean() - whole) < 4 * values.std() / 20
    errors, single = (
        (found - gradient) / (gradients.std(0) / 20) for found in (gradients.mean(0), gradients[0])
    )
    assert errors.square().mean() < 4 < 50 < single.square().mean()  # in standard errors; one draw is far off


def test_decoding_all_samples_is_the_same_to_the_bit(network):
    x = torch.rand(2, 6, 28, 28, 1)
    first, second = (
        network.train()(x, 3, 2, 2, generator=torch.Generator().manual_seed(0), decoded=n) for n in (None, 3)
    )
    assert all(a.equal(b) for a, b in zip(first, second))


@pytest.mark.parametrize("reading", ["unit", "tied"])
def test_predict_from_images(network, reading):
    """A user's call from images against the equations, on the same noise; em_iters=0 looks at support means
    alone."""
    network, g = network.eval(), torch.Generator().manual_seed(3)
    support, query = torch.rand(4, 2, 28, 28, 1, generator=g), torch.rand(9, 28, 28, 1, generator=g)
    found = network.predict(support, query, samples=5, em_iters=10, reading=reading, seed=7)
    assert found.shape == (9, 4)
    noise = torch.randn(17, 5, 6, generator=torch.Generator().manual_seed(7))
    oracle = plain.ImageGMVAE(hidden_size=8, latent_size=6).eval()
    oracle.load_state_dict(network.state_dict())
    with torch.no_grad():
        mean, log_var = oracle.posterior(torch.cat([support.flatten(0, 1), query])[None])
        z = (mean.unsqueeze(-2) + (0.5 * log_var).exp().unsqueeze(-2) * noise)[0]
        expected = plain.classify(z[:8].view(4, 10, 6), z[8:], 10, reading)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert not torch.allclose(found, network.predict(support, query, samples=5, em_iters=0, seed=7))
    support = (255 * support).byte()  # bytes beside floats
    found = network.predict(support, query, samples=5, seed=7)
    torch.testing.assert_close(found, network.predict(support / 255, query, samples=5, seed=7))


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda x: x * 255, "values from 0.0 to 255"), (lambda x: 1 - x, "mean 0.9"),
        (lambda x: x - 1, "from -1"), (lambda x: x / x.mean(), "values from 0.0 to"),
        (lambda x: x.where(x > 0, torch.nan), "from nan"),
        (lambda x: (255 - 255 * x).byte(), "ink 255 on a ground of 0 expected"),
    ],
)  # fmt: skip
def test_predict_refuses_other_values_and_inverted_images(network, spoil, said):
    x = (torch.rand(6, 28, 28, 1, generator=torch.Generator().manual_seed(3)) > 0.9).float()
    for name, support, query in (("support", spoil(x[:2]), x[2:]), ("query", x[:2], spoil(x[2:]))):
        with pytest.raises(model.UserError, match=f"{name}: .*{said}"):
            network.eval().predict(support.view(2, 1, 28, 28, 1), query, samples=2)


def test_bf16_keeps_the_mixture_in_float32(network):
    network = copy.deepcopy(network)
    network.bf16 = True
    h = network.encode(torch.rand(6, 28, 28, 1))
    mean, log_var = network.posterior(h.view(2, 3, -1))
    assert h.dtype == torch.bfloat16 and mean.dtype == log_var.dtype == torch.float32
    assert network.decode(mean.flatten(0, 1)).dtype == torch.float32


# --- evaluation -----------------------------------------------------------------------------------


def distinct_features(classes=25, drawings=20, width=32, spread=0.3):
    g = torch.Generator().manual_seed(2)
    centres = torch.randn(classes, 1, width, generator=g)
    return (centres + spread * torch.randn(classes, drawings, width, generator=g)).flatten(0, 1)


def test_a_five_way_model_is_tested_at_any_way(network):
    """Trained with five components, evaluated with 2 and 20: nothing in the network is in the way."""
    network.eval()
    features, images = distinct_features(), torch.zeros(25, 20, 1)
    for way in (2, 20):
        episodes = dataloader.draw_episodes(images, way, 1, 5, 6, seed=0)
        accuracy = evaluate.evaluate(network, features, episodes, 1, 4, 5)
        assert accuracy.shape == (6,) and ((0 <= accuracy) & (accuracy <= 100)).all()


def test_an_episode_of_several_batches_scores_as_alone(network):
    network.eval()
    features, images = distinct_features(spread=0.8), torch.zeros(25, 20, 1)
    episodes = dataloader.draw_episodes(images, 5, 1, 15, 60, seed=0)  # 25 at once
    noise = plain.episode_noise(evaluate.NOISE_POOL, 60, 5, 1, 16, 8, 6)
    labels, alone = torch.arange(75) // 15, []
    for index, own in zip(episodes, noise):
        h, own = (torch.cat([x[:, :1].flatten(0, 1), x[:, 1:].flatten(0, 1)]) for x in (features[index], own))
        found = network.predict_encoded(h[None], 5, 1, own[None])[0].argmax(-1)
        alone.append(100 * (found == labels).float().mean())
    together = evaluate.evaluate(network, features, episodes, 1, 8, 10)
    torch.testing.assert_close(together, torch.stack(alone))
    assert together.unique().numel() > 1


@torch.no_grad()
def test_permutations_permute_the_predictions_and_nothing_else(network):
    """Of the support set, of the query set and of the class labels; each image keeps its own noise."""
    network.eval()
    way, shot, query = 4, 3, 5
    h = distinct_features(way, shot + query, spread=0.8).view(way, shot + query, 32)
    noise = torch.randn(way, shot + query, 6, 6, generator=torch.Generator().manual_seed(9))

    def predicted(members=slice(None), classes=slice(None)):
        """Return p (way, query, way) of the episode with its images or classes in another order."""
        parts = [x[classes][:, members] for x in (h, noise)]
        parts = [torch.cat([x[:, :shot].flatten(0, 1), x[:, shot:].flatten(0, 1)])[None] for x in parts]
        return network.predict_encoded(parts[0], way, shot, parts[1])[0].unflatten(0, (way, query))

    before = predicted()
    assert before.argmax(-1).unique().numel() > 1
    torch.testing.assert_close(predicted(members=[2, 0, 1, 3, 4, 5, 6, 7]), before)
    order, labels = [3, 1, 4, 0, 2], [2, 3, 0, 1]
    torch.testing.assert_close(predicted(members=[0, 1, 2, *(shot + i for i in order)]), before[:, order])
    torch.testing.assert_close(predicted(classes=labels), before[labels][..., labels])
