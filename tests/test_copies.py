"""Experiment folders share text, not imports: the copies are held equal here."""

import pytest
import torch

from conftest import ROOT, load

EXPERIMENTS = ("omniglot", "mimgnet")


def test_the_mixture_is_the_same_file():
    assert (ROOT / "mimgnet/mixture.py").read_bytes() == (ROOT / "omniglot/mixture.py").read_bytes()


def test_set_attention_is_the_same_text():
    first, second = ((ROOT / folder / "model.py").read_text() for folder in EXPERIMENTS)
    start = first.index("class SetAttention")
    text = first[start : first.index("\nclass ", start)]
    assert "def forward" in text and "self.out(h).relu()" in text and text in second


@pytest.mark.parametrize("folder", ["mimgnet", "simclr"])
def test_runtime_is_the_same_file(folder):
    assert (ROOT / folder / "runtime.py").read_bytes() == (ROOT / "omniglot/runtime.py").read_bytes()


@pytest.mark.parametrize("flags", ["--fix-pi", "--em-start images", "--unsupervised-em-iters 1", "--way 2", "--train-mc-sample-size 3"])
@pytest.mark.parametrize("folder", EXPERIMENTS)
def test_a_flag_of_the_mixture_reaches_the_step(folder, flags):
    main, model = load(folder, "main"), load(folder, "model")
    x = torch.rand(2, 20, *((28, 28, 1) if folder == "omniglot" else (32,)), generator=torch.Generator().manual_seed(1))
    terms = []
    for given in ([], flags.split()):
        args = main.parse_args(["--train-mc-sample-size", "2", *given])
        torch.manual_seed(0)
        network = model.GMVAE(**({} if folder == "omniglot" else {"feature_size": 32}), hidden_size=8, latent_size=6)
        optimizer = torch.optim.Adam(network.parameters())
        terms.append(main.train_step(network, optimizer, x, 1, args, torch.Generator().manual_seed(0))[1].item())
    assert abs(terms[0] - terms[1]) > 1e-4


def test_the_baseline_is_tested_on_the_same_episodes():
    """Logistic regression on SimCLR's features and Meta-GMVAE on them: the same images, support and query."""
    images, drawn = torch.zeros(20, 80, 4), []
    for folder in ("simclr", "mimgnet"):
        drawn.append(load(folder, "dataloader").draw_episodes(images, 5, 5, 15, 100, load(folder, "main").TEST_SEED))
    assert drawn[0].equal(drawn[1])
