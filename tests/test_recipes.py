"""Omniglot's flags: the published defaults, recipes, schedules and what is drawn from."""

import pytest
import torch

from conftest import ROOT, load

main = load("omniglot", "main")


def test_published_defaults():
    args = vars(main.parse_args([]))
    published = dict(
        batch_size=4, sample_size=200, train_iters=60000, freq_iters=1000, latent_size=64, hidden_size=64,
        no_set_attention=False,
        train_mc_sample_size=32, test_mc_sample_size=32, way=5, query=15, lr=1e-3, weight_decay=1e-6,
        unsupervised_em_iters=10, semisupervised_em_iters=10, fix_pi=False, em_start="samples",
        eval_episodes=1000, test_shot=[1, 5], test_way=[5],
        e_step="unit", decode_samples=None, target="drawing", warp="none", kl_warmup_iters=0, kl_weight=1.0,
        lr_schedule="constant", ema_decay=0.0,
    )  # fmt: skip
    assert {name: args[name] for name in published} == published


@pytest.mark.parametrize(
    "recipe, length", [("published-5way", 60000), ("published-20way", 60000), ("canonical", 8000)]
)
def test_recipes(recipe, length, monkeypatch):
    """A file of flags with reasons; flags after it override it; the published ones change what the paper says
    and no more."""
    monkeypatch.chdir(ROOT / "omniglot")
    args, default = main.parse_args([f"@recipes/{recipe}.txt"]), vars(main.parse_args([]))
    assert args.train_iters == length
    assert main.parse_args([f"@recipes/{recipe}.txt", "--train-iters", "7"]).train_iters == 7
    if recipe != "canonical":
        changed = {"way": 20, "sample_size": 300, "test_way": [20]} if "20way" in recipe else {}
        assert vars(args) == default | changed


@pytest.mark.parametrize("how", ["affine", "elastic"])
def test_views(how):
    """The target is the drawing itself, or the drawing (not its warped view) without its pose."""
    pose, x = load("omniglot", "pose"), torch.rand(2, 3, 28, 28, 1)
    draws = [torch.Generator().manual_seed(0) for _ in range(3)]
    seen, target = main.views(x, draws[0], main.parse_args([]))
    assert seen is x and target is x
    args = main.parse_args(f"--target canonical --target-shape 0 --warp {how}".split())
    seen, target = main.views(x, draws[1], args)
    flat = x.flatten(0, 1)
    assert seen.flatten(0, 1).equal(pose.warp(flat, how, draws[2]))
    assert target.flatten(0, 1).equal(pose.canonical(flat, pose.pose(flat, 0)))


def test_decoding_more_samples_than_there_are(capsys):
    with pytest.raises(SystemExit) as end:
        main.parse_args("--train-mc-sample-size 2 --decode-samples 3".split())
    assert end.value.code == 2 and "--decode-samples: 3 found, at most" in capsys.readouterr().err


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # as argparse opens it since Python 3.12
def test_a_recipe_that_is_not_text(errors, tmp_path, capsys, monkeypatch):
    path = tmp_path / "recipe.txt"
    monkeypatch.setattr("argparse.open", lambda name, **_: open(name, errors=errors), raising=False)
    path.write_text("--lr 0.1", encoding="utf-16")
    with pytest.raises(SystemExit) as end:
        main.parse_args([f"@{path}"])
    assert end.value.code == 2 and "a file of flags in UTF-8 expected" in capsys.readouterr().err


def test_published_schedules_are_constant():
    args = main.parse_args([])
    assert [main.learning_rate(step, args) for step in (1, 30000, 60000)] == [1e-3] * 3
    assert [main.kl_weight(step, args) for step in (1, 30000, 60000)] == [1.0] * 3


def test_schedules():
    args = main.parse_args(
        "--train-iters 100 --lr 0.1 --lr-schedule cosine --kl-warmup-iters 50 --kl-weight 0.5".split()
    )
    rates = [main.learning_rate(step, args) for step in range(1, 101)]
    assert rates[0] == 0.1 and rates == sorted(rates, reverse=True) and 0 < rates[-1] < 1e-4
    assert abs(rates[50] - 0.05) < 1e-12
    weights = [main.kl_weight(step, args) for step in range(0, 101)]
    assert (
        weights[0] == pytest.approx(0.01)
        and weights[25] == pytest.approx(0.255)
        and weights[50:] == [0.5] * 51
    )
