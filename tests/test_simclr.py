"""SimCLR: the loss, the network and the views against literal definitions."""

import math

import pytest
import torch
import torchvision.transforms.functional as TF
from sklearn.linear_model import LogisticRegression
from torchvision.transforms import ColorJitter, RandomResizedCrop

import plain
from conftest import load

data, main, model = (load("simclr", name) for name in ("dataloader", "main", "model"))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count, seed=0):
    """Random uint8 images with structure at every scale."""
    fine = torch.rand(count, 84, 84, 3, generator=generator(seed))
    coarse = (
        torch.rand(count, 4, 4, 3, generator=generator(seed + 1))
        .repeat_interleave(21, 1)
        .repeat_interleave(21, 2)
    )
    return (255 * (0.3 * fine + 0.7 * coarse)).byte()


def test_published_defaults():
    args = vars(main.parse_args([]))
    published = dict(
        batch_size=512, train_epochs=400, lr=1e-3, temperature=0.5, weight_decay=0.0, hidden_size=64, way=5,
        query=15,
        eval_episodes=1000, test_shot=[1, 5, 20, 50], export="last",
    )  # fmt: skip
    assert {name: args[name] for name in published} == published


# --- the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss, views, temperature", [
    ("nt_xent", 2, 0.5), ("prototypical", 2, 3.0), ("prototypical", 4, 3.0),
])  # fmt: skip
def test_a_loss_and_its_gradient_against_the_definition(loss, views, temperature):
    h = torch.randn(views * 5, 7, generator=generator(), dtype=torch.float64, requires_grad=True)
    how = {"temperature": temperature} | ({"views": views} if loss == "prototypical" else {})
    ours, expected = getattr(model, loss)(h, **how), getattr(plain, loss)(h, **how)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=0)
    gradients = [torch.autograd.grad(of, h)[0] for of in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    if loss == "prototypical":  # float32 suffices where the distances are small beside the features
        far = model.prototypical((h.detach() + 1000).float(), **how)
        assert far.item() == pytest.approx(expected.item(), rel=1e-3)


def test_views_of_an_image_are_no_rivals_of_each_other():
    n, views = 2, 4
    h = torch.zeros(views, n, 3)
    h[:, 1, 0] = 100  # the other image is far away
    assert model.prototypical(h.flatten(0, 1), views, 1.0) < 1e-6  # a rival at distance 0 would cost log 2
    h[:, :, 1] = 10 * torch.arange(views).unsqueeze(1)  # the second view is nearer to the first
    assert model.prototypical(h.flatten(0, 1), views, 1.0) < 1e-6


def test_parameter_counts():
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    encoder = model.Encoder()
    assert (
        count(encoder) == 150_144
        and count(encoder.blocks[0]) == 1_920
        and count(model.projection_head()) == 98_688
    )
    assert model.projection_head()(encoder(torch.randn(2, 3, 84, 84))).shape == (2, 128)


def test_bf16_gives_float32_features_close_to_the_others():
    x = torch.randn(8, 3, 84, 84, generator=generator())
    torch.manual_seed(0)
    encoder = model.Encoder(8)
    exact = encoder(x)
    encoder.bf16 = True
    rounded = encoder(x)
    assert rounded.dtype == torch.float32 and (exact - rounded).abs().max() < 0.1


# --- the views ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, low, high",
    [("brightness", 0.2, 1.8), ("contrast", 0.2, 1.8), ("saturation", 0.2, 1.8), ("hue", -0.2, 0.2)],
)
def test_colour_operations_are_torchvisions(name, low, high):
    x = images(12).permute(0, 3, 1, 2).float() / 255
    x[0], x[1, 1:] = 0.4, x[1, :1]  # one flat, one grey
    x[2, :, :40], x[2, :, 40:] = 0, 1
    factor = torch.linspace(low, high, len(x))
    ours, theirs = getattr(data, f"adjust_{name}")(x, factor), getattr(TF, f"adjust_{name}")
    for i, f in enumerate(factor.tolist()):
        assert torch.allclose(ours[i], theirs(x[i], f), atol=1e-5), (name, f)


@pytest.mark.parametrize("size", [84, 64])
def test_a_view_is_torchvisions_for_the_same_draws(size):
    """Crop, flip, the four operations in the image's own order, greyscale, on 64 independent draws at once;
    smaller views without antialiasing."""
    names = ["brightness", "contrast", "saturation", "hue"]
    x, draws = images(64), data.draw_views(64, generator(3))
    before = x.clone()
    views = data.make_views(x, *draws, size)
    assert views.shape == (64, 3, size, size)
    for i, (box, flip, factors, order, grey) in enumerate(zip(*draws)):
        left, top, width, height = map(int, box)
        y = TF.resized_crop(
            x[i].permute(2, 0, 1).float() / 255, top, left, height, width, [size, size], antialias=size == 84
        )
        y = TF.hflip(y) if flip else y
        for o in order.tolist():
            y = getattr(TF, f"adjust_{names[o]}")(y, factors[o].item()) if o >= 0 else y
        y = TF.rgb_to_grayscale(y, 3) if grey else y
        difference = (views[i] - y).abs()
        # A hue turns by a wide angle where a pixel is all but grey: there the last digits of the crop decide.
        assert difference.mean() < 1e-4 and difference.quantile(0.999) < 1e-2, i
    assert x.equal(before), "the stored images changed"
    assert draws[1].any() and draws[4].any() and (draws[3] < 0).any()


def ks_distance(a, b):
    """Largest difference of two samples' distribution functions."""
    a, b = a.double().sort().values, b.double().sort().values
    points = torch.cat([a, b])
    share = lambda s: torch.searchsorted(s, points, right=True) / len(s)  # noqa: E731
    return (share(a) - share(b)).abs().max().item()


@pytest.mark.parametrize("scale", [0.08, 0.2])
def test_crops_are_distributed_as_torchvisions(scale):
    n, blank = 6000, torch.empty(3, 84, 84)
    torch.manual_seed(0)
    draw = lambda: RandomResizedCrop.get_params(blank, [scale, 1.0], [3 / 4, 4 / 3])  # noqa: E731
    theirs = torch.tensor([draw() for _ in range(n)]).float()
    t_top, t_left, t_height, t_width = theirs.T
    left, top, width, height = data.draw_crops(n, generator(), scale).T
    critical = 1.95 * math.sqrt(2 / n)  # passed by chance with probability 1e-3
    for name, a, b in (
        ("area", width * height, t_width * t_height), ("ratio", width / height, t_width / t_height),
        ("width", width, t_width),
        ("left", left, t_left), ("top", top, t_top), ("right", left + width, t_left + t_width), ("bottom",
        top + height, t_top + t_height),
    ):  # fmt: skip
        assert ks_distance(a, b) < critical, name
    assert (
        (left >= 0).all() and (top >= 0).all() and (left + width <= 84).all() and (top + height <= 84).all()
    )
    assert scale - 0.01 < (width * height / 84**2).min() < scale + 0.02 and (width / height).max() < 1.45


@pytest.mark.parametrize("strength, hue", [(0.8, 0.2), (0.4, 0.1), (1.5, 0.5)])
def test_jitter_is_distributed_as_torchvisions(strength, hue):
    n, jitter = 6000, ColorJitter(strength, strength, strength, hue)
    ranges = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
    torch.manual_seed(0)
    theirs = [ColorJitter.get_params(*ranges) for _ in range(n)]
    factors, order = data.draw_jitter(n, generator(), strength, hue)
    for i, (low, high) in enumerate(ranges):
        assert ks_distance(factors[:, i], torch.tensor([draw[i + 1] for draw in theirs])) < 1.95 * math.sqrt(
            2 / n
        )
        assert factors[:, i].min() >= low and factors[:, i].max() <= high
    assert factors.T.corrcoef().fill_diagonal_(0).abs().max() < 0.06  # independent of one another
    assert (
        torch.stack([factors[:-1, 0], factors[1:, 0]]).corrcoef()[0, 1].abs() < 0.06
    )  # and of the next image's
    jittered = order[(order >= 0).all(-1)]
    assert ((order >= 0).all(-1) | (order < 0).all(-1)).all() and abs(len(jittered) / n - 0.8) < 0.02
    permutations, counts = jittered.unique(dim=0, return_counts=True)
    assert len(permutations) == 24 and (permutations.sort(-1).values == torch.arange(4)).all()
    expected = len(jittered) / 24
    assert ((counts - expected) ** 2 / expected).sum() < 49.7  # chi-squared, 23 degrees of freedom, 1e-3


def test_shares_of_flipped_and_grey_views():
    boxes, flip, factors, order, grey = data.draw_views(6000, generator())
    assert abs(flip.float().mean() - 0.5) < 0.025 and abs(grey.float().mean() - 0.2) < 0.02
    assert (
        torch.stack([flip.float(), grey.float(), (order[:, 0] >= 0).float(), boxes[:, 2]])
        .corrcoef()
        .fill_diagonal_(0)
        .abs()
        .max()
        < 0.05
    )


def test_the_two_views_of_an_image_differ_and_repeat_with_the_seed():
    x = images(40)
    views = data.training_views(x, generator(5))
    assert views.shape == (80, 3, 84, 84) and views.isfinite().all()
    assert all((views[i] - views[i + 40]).abs().mean() > 1e-3 for i in range(40))
    assert views.equal(data.training_views(x, generator(5))) and not views.equal(
        data.training_views(x, generator(6))
    )
    low, high = data.normalise(torch.zeros(1, 3, 1, 1)), data.normalise(torch.ones(1, 3, 1, 1))
    assert (views >= low - 1e-5).all() and (views <= high + 1e-5).all()


def test_four_views_come_in_order_and_are_independent():
    x, gentle = images(30), (0.2, 0.4, 0.1)
    views = data.training_views(x, generator(5), 64, 4, gentle)
    assert views.shape == (120, 3, 64, 64)
    draws = data.draw_views(120, generator(5), gentle)
    for v in range(4):  # rows v N to (v + 1) N: one view of every image, in the batch's order
        rows = slice(30 * v, 30 * v + 30)
        expected = data.normalise(data.make_views(x, *(part[rows] for part in draws), 64))
        assert torch.allclose(views[rows], expected, atol=1e-5)
    boxes, flip, factors, order, grey = data.draw_views(4 * 3000, generator(), gentle)
    area = boxes[:, 2] * boxes[:, 3] / 84**2
    assert 0.19 < area.min() < 0.21 and factors[:, 3].abs().max() <= 0.1
    assert 0.6 <= factors[:, :3].min() and factors[:, :3].max() <= 1.4
    for number in (area, factors[:, 0], factors[:, 3], flip.float(), grey.float()):
        assert number.view(4, -1).corrcoef().fill_diagonal_(0).abs().max() < 0.075  # four views of one image


def test_the_published_views_are_the_default():
    x = images(8)
    published = data.training_views(x, generator(), 84, 2, (0.08, 0.8, 0.2))
    assert data.training_views(x, generator()).equal(published)
    args = main.parse_args([])
    assert (args.loss, args.views, args.crop_scale, args.jitter, args.hue) == ("nt-xent", 2, 0.08, 0.8, 0.2)


def test_epochs_see_every_image_once_in_another_order():
    first, second = (data.epoch_order(torch.empty(50, 1), 0, epoch) for epoch in (0, 1))
    assert first.sort().values.equal(torch.arange(50)) and not first.equal(second)
    assert first.equal(data.epoch_order(torch.empty(50, 1), 0, 0)) and not first.equal(
        data.epoch_order(torch.empty(50, 1), 1, 0)
    )


# --- evaluation and schedule ----------------------------------------------------------------------


def test_learning_rate_is_constant_then_falls_to_zero():
    args = main.parse_args(["--train-epochs", "40"])
    assert all(main.learning_rate(e, args) == 1e-3 for e in (0, 3.7, 10))
    rates = [main.learning_rate(10 + i / 10, args) for i in range(301)]
    assert (
        all(a > b for a, b in zip(rates, rates[1:]))
        and rates[150] == pytest.approx(5e-4)
        and rates[-1] == pytest.approx(0, abs=1e-12)
    )
    assert main.learning_rate(2.9, main.parse_args(["--train-epochs", "3"])) == 1e-3
    args = main.parse_args(["--train-epochs", "12", "--constant-epochs", "0"])
    assert [main.learning_rate(e, args) for e in (0, 6, 12)] == pytest.approx([1e-3, 5e-4, 0])


def test_episode_accuracies_against_loops():
    features = torch.randn(6, 12, 5, generator=generator()) + 2 * torch.randn(6, 1, 5, generator=generator(1))
    episodes = data.draw_episodes(features, 4, 2, 3, 7, seed=1)
    assert (episodes // 12 == (episodes // 12)[:, :, :1]).all() and all(
        e.unique().numel() == 20 for e in episodes
    )
    flat = features.flatten(0, 1)
    accuracy = load("simclr", "fewshot").nearest_mean(flat, episodes, 2)
    for e, got in zip(episodes, accuracy):
        means = [flat[row[:2]].mean(0) for row in e]
        right = [
            min(range(4), key=lambda k: (flat[i] - means[k]).norm()) == c
            for c, row in enumerate(e)
            for i in row[2:]
        ]
        assert got == pytest.approx(100 * sum(right) / 12)
    by_regression = load("simclr", "fewshot").logistic_regression(flat, episodes, 2)
    support, queries = torch.arange(4).repeat_interleave(2), torch.arange(4).repeat_interleave(3)
    for e, got in zip(episodes, by_regression, strict=True):
        fitted = LogisticRegression(max_iter=1000).fit(flat[e[:, :2].flatten()], support)
        found = torch.from_numpy(fitted.predict(flat[e[:, 2:].flatten()]))
        assert got == pytest.approx(100 * (found == queries).float().mean().item())
    assert by_regression.min() < 100
    far = flat + 100 * torch.eye(6, 5).repeat_interleave(12, 0)
    assert (load("simclr", "fewshot").nearest_mean(far, episodes, 2) == 100).all() and (
        load("simclr", "fewshot").logistic_regression(far, episodes, 2) == 100
    ).all()
