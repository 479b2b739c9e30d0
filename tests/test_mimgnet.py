"""Mini-ImageNet's experiment: its loss against the equations, that it learns, and how it draws from the
features."""

import numpy as np
import pytest
import torch

import plain
from conftest import ROOT, load

main, model, dataloader = (load("mimgnet", name) for name in ("main", "model", "dataloader"))


def clusters(seed, classes, per_class, width=32, noise=1.0, rank=6):
    """Features like a ReLU encoder's, (classes, per_class, width): classes differ in a few directions, the
    same in every split."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.randn(rank, width, generator=torch.Generator().manual_seed(99)) / 2
    centre = torch.randn(classes, 1, rank, generator=g) + 0.2 * torch.randn(
        classes, per_class, rank, generator=g
    )
    return (centre @ directions + 1 + noise * torch.randn(classes, per_class, width, generator=g)).relu()


# --- the mathematics ------------------------------------------------------------------------------


@pytest.mark.parametrize("iters,fix_pi", [(0, False), (3, False), (10, True)])
def test_loss_terms_and_gradients(iters, fix_pi):
    torch.manual_seed(0)
    B, M, S, K, D = 3, 5, 8, 4, 6
    network = model.GMVAE(32, hidden_size=24, latent_size=D)
    x = clusters(0, B, M)
    terms = network(x, S, K, iters, fix_pi, torch.Generator().manual_seed(5))
    sum(terms).backward()

    g = torch.Generator().manual_seed(5)  # the same draws, in the order the loss makes them
    noise = torch.randn(B, M, S, D, generator=g).double()
    first = plain.starting_samples(torch.rand(B, M, S, generator=g), K)
    oracle = plain.FeatureGMVAE(32, hidden_size=24, latent_size=D).double()
    oracle.load_state_dict(network.state_dict())
    expected = plain.loss_terms(oracle, x.double(), noise, first, iters, fix_pi)
    sum(expected).backward()
    for term, value in zip(terms, expected):
        torch.testing.assert_close(term.double(), value, rtol=1e-5, atol=1e-5)
    for p, q in zip(network.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reading", ["unit", "tied"])
def test_predict_from_features(reading):
    torch.manual_seed(0)
    network, oracle = model.GMVAE(32, 24, 6).eval(), plain.FeatureGMVAE(32, 24, 6)
    oracle.load_state_dict(network.state_dict())
    support, query = clusters(1, 4, 2), clusters(1, 4, 3).flatten(0, 1)
    found = network.predict(support, query, samples=5, reading=reading, seed=7)
    noise = torch.randn(20, 5, 6, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        mean, log_var = oracle.posterior(torch.cat([support.flatten(0, 1), query])[None])
        z = (mean.unsqueeze(-2) + (0.5 * log_var).exp().unsqueeze(-2) * noise)[0]
        expected = plain.classify(z[:8].view(4, 10, 6), z[8:], 10, reading)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert found.std() > 0.01


def test_a_part_of_the_samples_is_decoded_to_a_mean_too():
    torch.manual_seed(0)
    network, x = model.GMVAE(32, 24, 6), clusters(0, 3, 5)
    sizes = 64, 4, 1  # samples, components, EM iterations
    some, every = (
        network(x, *sizes, generator=torch.Generator().manual_seed(0), decoded=count)[0].item()
        for count in (16, None)
    )
    assert some != every and some == pytest.approx(every, rel=0.1)


def test_networks_follow_the_method():
    """Decoder 32 -> 512 -> 512 -> 256 and two attention blocks of width 256 at the defaults; no component
    count in the state."""
    network = model.GMVAE(256)
    shapes = [tuple(layer.weight.shape) for layer in network.decoder if hasattr(layer, "weight")]
    assert shapes == [(512, 32), (512, 512), (256, 512)]
    attention, decoder = 4 * (256 * 256 + 256), 32 * 512 + 512 + 512 * 512 + 512 + 512 * 256 + 256
    assert sum(p.numel() for p in network.parameters()) == 2 * attention + 256 * 64 + 64 + decoder
    assert network.decode(torch.randn(7, 32)).min() == 0
    assert network.sizes == {
        "feature_size": 256,
        "hidden_size": 512,
        "latent_size": 32,
        "set_attention": True,
        "signed": False,
    }
    assert model.GMVAE(256, signed=True).decode(torch.randn(7, 32)).min() < 0


def test_bf16_stays_close_and_the_mixture_float32():
    torch.manual_seed(0)
    network, x = model.GMVAE(32, 24, 6), clusters(0, 3, 5)
    exact = network(x, 8, 4, 10, generator=torch.Generator().manual_seed(0))
    network.bf16 = True
    assert all(part.dtype == torch.float32 for part in network.posterior(x))
    close = network(x, 8, 4, 10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(close[0], exact[0], rtol=0.02, atol=0)
    torch.testing.assert_close(close[1], exact[1], rtol=0.1, atol=0.1)


def test_published_defaults():
    args = vars(main.parse_args([]))
    published = dict(
        batch_size=16, sample_size=5, train_iters=15000, freq_iters=1000, latent_size=32, hidden_size=512,
        train_mc_sample_size=256, test_mc_sample_size=256, way=5, shot=1, query=15, lr=1e-4,
        weight_decay=5e-2,
        unsupervised_em_iters=10, semisupervised_em_iters=10, fix_pi=False, em_start="samples",
        eval_episodes=1000, test_shot=[1, 5, 20, 50], test_way=[5],
        e_step="unit", kl_warmup_iters=0, kl_weight=1.0, lr_schedule="constant", ema_decay=0.0,
    )  # fmt: skip
    assert {name: args[name] for name in published} == published


def test_the_published_recipe_is_the_default():
    recipe = ROOT / "mimgnet/recipes/published.txt"
    assert main.parse_args([f"@{recipe}"]) == main.parse_args([])


def test_nan_is_no_accuracy():
    network = model.GMVAE(32, 16, 4).eval()
    images = 1e30 * clusters(0, 6, 20)  # finite, but not what the set network makes of them
    episodes = dataloader.draw_episodes(images, 5, 1, 5, 4, seed=0)
    with pytest.raises(load("mimgnet", "machine").UserError, match="NaN"):
        load("mimgnet", "evaluate").evaluate(network, images.flatten(0, 1), episodes, 1, 2, 3)


def test_it_learns():
    """From chance to far above it on new classes, at ways never trained, in a few hundred steps."""
    flags = (
        "--lr 1e-3 --train-mc-sample-size 4 --test-mc-sample-size 8 --eval-episodes 100 --kl-warmup-iters 200"
    )
    args = main.parse_args(flags.split())
    train, val = (clusters(seed, classes, 40, width=64, noise=1.5) for seed, classes in ((0, 60), (1, 20)))
    torch.manual_seed(0)
    network = model.GMVAE(64, 64, 8)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), lr=args.lr, weight_decay=args.weight_decay)

    def accuracy(way, shot):
        return main.evaluate_split(network, val, [way], [shot], 1, args)[f"{way}way{shot}shot"].mean()

    assert accuracy(5, 1) < 35
    network.train()
    for step in range(1, 301):
        main.train_step(
            network, optimizer, dataloader.draw_sets(train.flatten(0, 1), 16, 5, generator), step, args,
            generator,
        )  # fmt: skip
    assert accuracy(5, 1) > 75 and accuracy(5, 5) > 80
    assert accuracy(20, 1) > 40 and accuracy(2, 1) > 85


# --- the data -------------------------------------------------------------------------------------


def test_load_split_keeps_classes_together(tmp_path):
    features = np.arange(6 * 5 * 4, dtype=np.float64).reshape(30, 4)
    np.save(tmp_path / "val_features.npy", features)
    images = dataloader.load_split(tmp_path, "val", 5)
    assert images.shape == (6, 5, 4) and images.dtype == torch.float32
    assert images.flatten(0, 1).numpy().tolist() == features.tolist()


def save(folder, split, features, labels):
    np.save(folder / f"{split}_features.npy", np.asarray(features, np.float32))
    np.save(folder / f"{split}_labels.npy", labels)


@pytest.mark.parametrize("said", [5, 10, 600])
def test_labels_beside_the_features_decide_the_classes(tmp_path, said):
    """Shuffled, or images before classes: a class's images come together in their order, whatever the flag
    says."""
    features = np.arange(120).reshape(30, 4)
    for order in (
        np.random.default_rng(0).permutation(30),
        np.arange(30).reshape(6, 5).T.flatten(),
        np.arange(30)[::-1],
    ):
        save(tmp_path, "val", features[order], (order // 5).astype(np.uint8))
        images = dataloader.load_split(tmp_path, "val", said)
        assert images.shape == (6, 5, 4)
        classes = images[:, 0, 0].long() // 20
        assert classes.tolist() == list(dict.fromkeys(order // 5))  # in order of first appearance
        for i, c in enumerate(classes.tolist()):
            assert images[i].tolist() == features[[j for j in order if j // 5 == c]].tolist()


def test_labels_in_order_change_nothing(tmp_path):
    features = np.arange(120, dtype=np.float32).reshape(30, 4)
    save(tmp_path, "test", features, np.arange(30) // 5 * -7)
    assert dataloader.load_split(tmp_path, "test", 5).flatten(0, 1).numpy().tolist() == features.tolist()


@pytest.mark.parametrize(
    "labels, words",
    [
        (np.repeat([0, 1, 2, 3], [3, 7, 3, 7]), "classes of 3 to 7 images"),
        (np.arange(19) // 5, "int64 of shape (19,), expected an integer for each of the 20 images"),
        (np.arange(20) / 5, "float64"),
        (np.eye(4, dtype=int).repeat(5, 0), "(20, 4)"),
    ],
)
def test_labels_that_cannot_be_used(tmp_path, labels, words):
    save(tmp_path, "val", np.ones((20, 4)), labels)
    with pytest.raises(dataloader.UserError) as caught:
        dataloader.load_split(tmp_path, "val", 5)
    assert (
        "val_labels.npy" in str(caught.value) and words in str(caught.value) and "\n" not in str(caught.value)
    )


def test_damaged_labels(tmp_path):
    save(tmp_path, "val", np.ones((20, 4)), [])
    (tmp_path / "val_labels.npy").write_bytes(b"0\n1\n")
    with pytest.raises(dataloader.UserError, match="val_labels.npy: not a readable"):
        dataloader.load_split(tmp_path, "val", 5)


def test_training_never_reads_labels(tmp_path):
    features = np.arange(92, dtype=np.float32).reshape(23, 4)
    save(tmp_path, "train", features, ["any", "text"])
    for said in (5, 23):
        assert (
            dataloader.load_split(tmp_path, "train", said).flatten(0, 1).numpy().tolist() == features.tolist()
        )


def test_draw_sets_has_no_image_twice():
    images = torch.arange(40.0).unsqueeze(1)
    sets = dataloader.draw_sets(images, 4, 10, torch.Generator().manual_seed(0))
    assert sets.shape == (4, 10, 1) and sets.unique().numel() == 40


def test_episodes_are_the_same_every_time_and_of_distinct_images():
    images = torch.empty(7, 20, 4)
    episodes = dataloader.draw_episodes(images, 5, 2, 6, 50, seed=3)
    assert episodes.equal(dataloader.draw_episodes(images, 5, 2, 6, 50, seed=3))
    assert episodes.shape == (50, 5, 8)
    classes = episodes // 20
    assert (classes == classes[..., :1]).all()
    assert all(row.unique().numel() == 5 for row in classes[..., 0])
    assert all(row.unique().numel() == 40 for row in episodes.flatten(1))
