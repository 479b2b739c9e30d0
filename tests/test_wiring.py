"""What the flags say reaches training and test; what is kept, and on what it is chosen."""

import pytest
import torch

from conftest import load

SIZES = {"omniglot": (28, 28, 1), "mimgnet": (16,)}
BASE = "--hidden-size 8 --latent-size 6 --batch-size 2 --sample-size 8 --train-mc-sample-size 2 --query 4"
BASE += " --test-mc-sample-size 2 --eval-episodes 4 --train-iters 3 --freq-iters 3 --lr 1e-2"
WEIGHT = "set_network.2.weight"


def splits(folder, least=0.0):
    g = torch.Generator().manual_seed(0)
    return {name: least + torch.rand(6, 12, *SIZES[folder], generator=g) for name in ("train", "val", "test")}


def trained(folder, place, *flags, bf16=False, least=0.0):
    """Train for three steps, in this process; return what last.pt holds."""
    main = load(folder, "main")
    args = main.parse_args([*BASE.split(), *flags, "--save-dir", str(place)])
    place.mkdir(exist_ok=True)
    main.train(splits(folder, least), torch.device("cpu"), bf16, {}, [], args)
    return load(folder, "runtime").load_checkpoint(place / "last.pt")


FLAGS = [
    (folder, flags)
    for folder in SIZES
    for flags in (
        "--lr 1e-3", "--lr-schedule cosine", "--weight-decay 0.1", "--kl-weight 0.1", "--kl-warmup-iters 9",
        "--decode-samples 1", "--no-set-attention", "--fix-pi", "--em-start images",
        "--unsupervised-em-iters 1", "--way 2", "--train-mc-sample-size 3",
    )
]  # fmt: skip
FLAGS += [("omniglot", "--target canonical"), ("omniglot", "--warp affine")]


@pytest.mark.parametrize("folder, flags", FLAGS)
def test_a_flag_of_training_changes_the_weights(folder, flags, tmp_path):
    runs = ("a", []), ("b", flags.split())
    one, other = (trained(folder, tmp_path / name, *given)["model"] for name, given in runs)
    assert any(not one[name].equal(other[name]) for name in one)


def test_the_encoder_sees_the_warped_drawings():
    main, seen, weight = load("omniglot", "main"), [], torch.ones(1, requires_grad=True)
    args = main.parse_args(["--target", "canonical", "--warp", "elastic"])

    def network(x, *how):
        seen.extend((x, how[-1]))
        return weight.sum(), weight.sum()

    x = splits("omniglot")["train"]
    main.train_step(network, torch.optim.SGD([weight]), x, 1, args, torch.Generator().manual_seed(0))
    expected = main.views(x, torch.Generator().manual_seed(0), args)
    assert seen[0].equal(expected[0]) and seen[1].equal(expected[1]) and not seen[0].equal(x)


@pytest.mark.parametrize("folder", SIZES)
def test_precision_and_seed_reach_the_training(folder, tmp_path, monkeypatch):
    main, drawn = load(folder, "main"), []
    draw = main.draw_sets
    monkeypatch.setattr(main, "draw_sets", lambda *how: drawn.append(draw(*how)) or drawn[-1])
    exact, rounded = (trained(folder, tmp_path / str(of), bf16=of)["model"][WEIGHT] for of in (False, True))
    assert not exact.equal(rounded)
    start = [
        trained(folder, tmp_path / f"of{seed}", "--lr", "0", "--seed", seed)["model"][WEIGHT] for seed in "01"
    ]
    assert drawn[0].equal(drawn[6]) and not drawn[6].equal(drawn[9])  # the sets of the four trainings
    assert not start[0].equal(start[1])


@pytest.mark.parametrize("folder", SIZES)
def test_a_checkpoint_in_time_and_the_split_of_validations(folder, tmp_path, monkeypatch):
    main, saved, seen = load(folder, "main"), [], []
    save, validate = main.save_checkpoint, main.validate

    def record(path, checkpoint):
        saved.append((path.name, checkpoint["step"]))
        save(path, checkpoint)

    monkeypatch.setattr(main, "SAVE_SECONDS", 0)
    monkeypatch.setattr(main, "save_checkpoint", record)
    monkeypatch.setattr(main, "validate", lambda *how: seen.append(how[1]) or validate(*how))
    trained(folder, tmp_path / "a")
    assert [step for name, step in saved if name == "last.pt"] == [1, 2, 3]
    assert len(seen) == 1 and seen[0].equal(splits(folder)["val"])


def test_the_time_of_a_training_goes_on(tmp_path):
    checkpoint = trained("mimgnet", tmp_path / "a") | {"seconds": 1000.0}
    load("mimgnet", "runtime").save_checkpoint(tmp_path / "a/last.pt", checkpoint)
    checkpoint = trained("mimgnet", tmp_path / "a", "--train-iters", "4")
    assert checkpoint["history"][-1]["seconds"] >= 1000 and checkpoint["seconds"] > 1000


def test_features_below_zero_are_decoded_as_such(tmp_path):
    for least in (0.0, -0.5):
        checkpoint = trained("mimgnet", tmp_path / str(least), least=least)
        assert checkpoint["sizes"]["signed"] == (least < 0)


@pytest.mark.parametrize("folder", SIZES)
def test_the_moving_average(folder):
    """Of parameters and running statistics; the decay rises to --ema-decay."""
    main = load(folder, "main")
    args = main.parse_args(["--ema-decay", "0.5"])
    average, model = (torch.nn.BatchNorm1d(1) for _ in range(2))
    torch.nn.init.zeros_(average.weight), model.running_mean.fill_(2)
    for step, expected in ((1, 0.9), (100, 0.95)):  # 1 - 1 / 10, then half of the way
        main.update_average(average, model, step, args)
        assert [average.weight.item(), average.running_mean.item()] == pytest.approx([expected, 2 * expected])


def test_the_best_of_each_shot_is_kept(tmp_path, monkeypatch):
    main, network = load("omniglot", "main"), load("omniglot", "model").GMVAE(4, 4)
    args, history = main.parse_args(["--save-dir", str(tmp_path)]), []
    for step, scores in enumerate([(50, 90), (60, 80), (60, 85)], start=1):
        found = dict(zip(("5way1shot", "5way5shot"), torch.tensor(scores).float().unsqueeze(1)))
        monkeypatch.setattr(main, "evaluate_split", lambda *_: found)
        history.append(main.validate(network, None, step, history, args))
    kept = [torch.load(tmp_path / f"{shot}shot_best.pt", weights_only=True)["step"] for shot in (1, 5)]
    assert kept == [2, 1]  # the first of equals


def test_validation_has_the_shot_of_training(tmp_path):
    main = load("mimgnet", "main")
    args = main.parse_args([*BASE.split(), "--shot", "2", "--save-dir", str(tmp_path)])
    network = load("mimgnet", "model").GMVAE(hidden_size=8, latent_size=6, feature_size=16)
    assert main.validate(network, splits("mimgnet")["val"], 1, [], args).keys() == {"5way2shot"}


@pytest.mark.parametrize("folder", SIZES)
def test_a_flag_of_the_test_reaches_it(folder, tmp_path, monkeypatch):
    evaluation, model, seen = load(folder, "evaluate"), load(folder, "model"), []

    def record(network, features, episodes, *how):
        state = network.training, network.bf16, network.sizes["set_attention"]
        seen.append((*state, tuple(episodes.shape), *how))
        return torch.zeros(len(episodes))

    monkeypatch.setattr(evaluation, "evaluate", record)
    flags = "--query 4 --eval-episodes 7 --test-mc-sample-size 9 --semisupervised-em-iters 3 --e-step tied"
    flags += " --test-way 3 --no-set-attention --save-dir"
    args = load(folder, "main").parse_args([*flags.split(), str(tmp_path)])
    sizes = {"hidden_size": 8, "latent_size": 6} | ({"feature_size": 16} if folder == "mimgnet" else {})
    network = model.GMVAE(**sizes, bf16=True).train()
    evaluation.evaluate_split(network, splits(folder)["val"], [3], [2], 1, args)
    assert network.bf16
    torch.save({"model": network.state_dict(), "sizes": network.sizes}, tmp_path / "a.pt")
    evaluation.test({tmp_path / "a.pt": [2]}, splits(folder)["test"], args)
    how = (7, 3, 2 + 4), 2, 9, 3, "tied"
    assert seen == [(False, False, True, *how), (False, False, False, *how)]


def test_an_interval():
    accuracies = torch.tensor([0.0, 100.0, 100.0, 0.0])
    expected = {"accuracy": 50.0, "ci95": pytest.approx(1.96 * 50 / 2), "episodes": 4}
    assert load("omniglot", "evaluate").summary(accuracies) == expected
    fewshot, args = load("simclr", "fewshot"), load("simclr", "main").parse_args(["--query", "1"])
    features, seen = torch.rand(6, 3, 2), []
    found = fewshot.evaluate(features, lambda *how: seen.append(how[1]) or accuracies, [1], 7, args)
    assert found == {"5way1shot": expected}
    assert seen[0].equal(load("simclr", "dataloader").draw_episodes(features, 5, 1, 1, 1000, 7))


def test_standardised_features():
    g, standardise = torch.Generator().manual_seed(0), load("simclr", "fewshot").standardise
    train = torch.randn(5, 40, 3, generator=g) * torch.tensor([1, 5, 0]) + 7
    found = standardise(train, train)
    assert torch.allclose(found.flatten(0, 1).mean(0), torch.zeros(3), atol=1e-5)
    assert torch.allclose(found.flatten(0, 1).std(0), torch.tensor([1.0, 1, 0]), atol=1e-4)
    assert torch.allclose(standardise(train + 1, train)[..., 1], found[..., 1] + 0.2, atol=0.03)
