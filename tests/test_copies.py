"""Experiment folders share text, not imports: the copies are held equal here."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from conftest import ROOT, load

EXPERIMENTS = ("omniglot", "mimgnet")


@pytest.mark.parametrize("name", ["mixture.py", "evaluate.py"])
def test_the_mixture_and_its_evaluation_are_the_same_files(name):
    assert (ROOT / "mimgnet" / name).read_bytes() == (ROOT / "omniglot" / name).read_bytes()


@pytest.mark.parametrize("folder", ["mimgnet", "simclr"])
def test_machine_runtime_and_parallel_are_the_same_files(folder):
    for name in ("machine.py", "runtime.py", "parallel.py"):
        assert (ROOT / folder / name).read_bytes() == (ROOT / "omniglot" / name).read_bytes()


def test_the_blocks_of_both_image_encoders_are_the_same_file():
    assert (ROOT / "simclr/blocks.py").read_bytes() == (ROOT / "omniglot/blocks.py").read_bytes()


@pytest.mark.parametrize(
    "file, name",
    [
        ("model.py", "class SetAttention"), ("model.py", "def load_model"), ("model.py", "    def posterior"),
        ("model.py", "    def predict_encoded"),
        ("main.py", "def learning_rate"), ("main.py", "def kl_weight"),
    ],
)  # fmt: skip
def test_what_both_experiments_share_is_the_same_text(file, name):
    texts = []
    for folder in EXPERIMENTS:
        text = (ROOT / folder / file).read_text()
        start = text.index(name)
        indent = " " * (len(name) - len(name.lstrip()))
        texts.append(re.split(rf"\n{indent}(?=\S)", text[start + len(indent) :])[0])
    assert texts[0] == texts[1] and len(texts[0].splitlines()) > 4


def test_both_training_loops_are_the_same_text():
    texts = [(ROOT / folder / "main.py").read_text() for folder in EXPERIMENTS]
    before, loop = ("    optimizer = ", '"], time.monotonic()'), ("    log_every = ", "\n\ndef weights_for")
    for start, end in (before, loop):
        one, other = (text[text.index(start) : text.index(end)] for text in texts)
        assert one == other and len(one.splitlines()) > 15


def test_files_stay_short_and_narrow():
    """Not of a copied folder: its main.py may grow."""
    folders = ("omniglot/*.py", "mimgnet/*.py", "simclr/*.py", "data/*.py", "results/*.py", "tests/*.py")
    command = ["git", "ls-files", "bench.py", *folders]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert files or not (ROOT / ".git").exists()
    for name in files:
        lines = (ROOT / name).read_text().splitlines()
        assert max(map(len, lines), default=0) <= 110, name
        most = {"main.py": 300, "runtime.py": 200}.get(Path(name).name, 400)
        assert len(lines) <= most or name.startswith("tests/"), name


def test_the_baseline_is_tested_on_the_same_episodes():
    """Logistic regression on SimCLR's features and Meta-GMVAE on them: the same images, support and query."""
    images, drawn = torch.zeros(20, 80, 4), []
    for folder in ("simclr", "mimgnet"):
        drawn.append(
            load(folder, "dataloader").draw_episodes(
                images, 5, 5, 15, 100, load(folder, "export" if folder == "simclr" else "evaluate").TEST_SEED
            )
        )
    assert drawn[0].equal(drawn[1])
