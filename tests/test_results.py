"""What is committed under results/: the tables agree with it, its commands are ones, its checkpoints score what it says."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, load, needs_shared_data, run

RUNS = sorted(path.parent for path in (ROOT / "results").glob("*-*/test.json"))
OMNIGLOT = [path for path in RUNS if path.name.startswith("omniglot-")]


def test_tables_agree_with_results():
    check = subprocess.run([sys.executable, "results/table.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


@pytest.mark.parametrize("name", ["README.md", "results/README.md"])
def test_the_commands_are_understood(name):
    """Every `python main.py` in a README, with the flags of the folder that the last `cd` before it went to."""
    text = (ROOT / name).read_text().replace("\\\n", "")
    found, folder = 0, None
    for entered, flags in re.findall(r"\bcd (\w+)|python main\.py ([^\n`#)]*)", text):
        folder = entered or folder
        if flags and "--help" not in flags:
            load(folder, "main").parse_args(shlex.split(flags))  # leaves with status 2 if it is not
            found += 1
    assert found >= 5


def test_the_ablations_are_flags():
    sys.path.insert(0, str(ROOT / "results"))
    import ablations

    parse = load("omniglot", "main").parse_args
    for flags in [ablations.WAYS, *ablations.TEST]:
        parse(flags.split())
    short = vars(parse(ablations.SHORT.split()))
    for name, flags in ablations.TRAIN.items():
        changed = {key for key, value in vars(parse([*ablations.SHORT.split(), *flags.split()])).items() if value != short[key]}
        assert len(changed) == (1 if flags else 0), name


@pytest.mark.parametrize("folder", RUNS, ids=lambda path: path.name)
def test_a_run_says_how_it_was_made(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["command"].startswith("python main.py") and config["device"] and config["versions"]["torch"]
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == config["args"]["train_iters"]
    checkpoints = list(folder.glob("*best.pt"))
    assert checkpoints
    for checkpoint in checkpoints:
        assert torch.load(checkpoint, weights_only=True).keys() == {"model", "sizes", "step", "validation"}


@needs_shared_data
@pytest.mark.parametrize("folder", OMNIGLOT, ids=lambda path: path.name)
def test_its_checkpoint_scores_what_it_says(folder, omniglot_dir, tmp_path):
    """The one-shot cell again, from the checkpoint: the same episodes, so only rounding may differ."""
    config = json.loads((folder / "config.json").read_text())["args"]
    flags = ["--way", config["way"], "--test-shot", 1, "--eval-only", "--checkpoint", folder / "1shot_best.pt"]
    result = run("omniglot", "--data-dir", omniglot_dir, "--save-dir", tmp_path / "eval", *flags, timeout=300)
    assert result.returncode == 0, result.stderr
    (name, again), = json.loads((tmp_path / "eval/test.json").read_text()).items()
    said = json.loads((folder / "test.json").read_text())[name]
    assert again["episodes"] == said["episodes"] and abs(again["accuracy"] - said["accuracy"]) < 0.05
