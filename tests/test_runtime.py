"""runtime.py: what the programs themselves do not show."""

import shutil
import subprocess

import pytest
import torch

from conftest import bomb, load

runtime = load("omniglot", "runtime")


def test_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    config = runtime.describe_run({"seed": 0}, torch.device("cpu"), "fp32", {"train": torch.zeros(2, 3)})
    assert config["git_commit"] is None and config["args"] == {"seed": 0}
    assert config["data"]["train"]["shape"] == [2, 3]


def test_the_commit_says_if_it_has_the_experiment_and_its_changes(tmp_path, monkeypatch):
    def commit_of(folder):
        monkeypatch.setattr(runtime, "HERE", tmp_path / folder)
        return runtime.describe_run({}, torch.device("cpu"), "fp32", {})["git_commit"]

    (tmp_path / "published").mkdir()
    (tmp_path / "published/main.py").write_text("1")
    for command in ("init -q", "add .", "-c user.name=a -c user.email=b commit -qm c"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    commit = commit_of("published")
    assert len(commit) == 40
    shutil.copytree(tmp_path / "published", tmp_path / "mine")
    assert commit_of("published") == commit and commit_of("mine") == f"{commit}-untracked"
    (tmp_path / "published/main.py").write_text("2")
    assert commit_of("published") == f"{commit}-dirty"


def test_a_checksum_is_of_the_values_not_of_their_order_in_memory():
    def described(x):
        return runtime.describe_run({}, torch.device("cpu"), "fp32", {"train": x})["data"]

    x = torch.arange(6.0).view(2, 3)
    assert described(x) == described(x.T.contiguous().T) != described(x + 1)


def test_a_moving_average_is_what_last_pt_stands_for(tmp_path):
    model = load("omniglot", "model")
    network, average = (model.GMVAE(4, 4) for _ in range(2))
    state = {"sizes": network.sizes, "model": network.state_dict(), "average": average.state_dict()}
    for expected in (average, network):
        runtime.save_checkpoint(tmp_path / "last.pt", state)
        found = model.load_model(tmp_path / "last.pt")
        assert found.decoder[0].weight.equal(expected.decoder[0].weight) and not found.training
        state.pop("average", None)


def test_a_checkpoint_that_would_run_code_is_not_loaded(tmp_path):
    torch.save({"model": bomb(tmp_path / "exploded")}, tmp_path / "last.pt")
    with pytest.raises(runtime.UserError, match="last.pt: not a readable checkpoint"):
        runtime.load_checkpoint(tmp_path / "last.pt")
    assert not (tmp_path / "exploded").exists()


def test_a_run_differs_in_one_line():
    before = {"args": {"lr": 1, "way": 5, "seed": 0}, "precision": "fp32", "data": {"train": 1, "test": 2}}
    after = {
        "args": {"lr": 2, "way": 20, "seed": 0, "new": 3},
        "precision": "bf16",
        "data": {"train": 2, "test": 3},
    }
    said = "--lr: 2 found, 1 expected; --data-dir: train data of 2 found, 1 expected; "
    said += "--precision: bf16 found, fp32 expected"
    assert runtime.differences(after, before, {"way"}) == said and not runtime.differences(after, after, ())


def test_what_stands_in_the_way_of_config_json(tmp_path):
    (tmp_path / "file").write_text("")
    assert runtime.read_config(tmp_path / "file") == {}
    (tmp_path / "config.json").mkdir()
    with pytest.raises(runtime.UserError, match="config.json: not readable"):
        runtime.read_config(tmp_path)
    (tmp_path / "config.json").rmdir()
    (tmp_path / "config.json").write_text('{"args": {}, "precision": "fp32", "data": [1]}')
    with pytest.raises(runtime.UserError, match="config.json: not readable"):
        runtime.read_config(tmp_path)


def test_a_log_counts_its_steps():
    drawn, log = [], runtime.Log(None, ("a",), [], 7)
    log.add_scalar = lambda *how: drawn.append(how)
    for value in (1.0, 2.0, 3.0):
        log.add(torch.tensor(value))
    assert log.flush(10) == {"a": 3.0} and drawn == [("train/a", 1, 8), ("train/a", 2, 9), ("train/a", 3, 10)]


def test_a_weight_that_is_not_finite():
    """Where a ReLU has made the NaN 0, the loss does not show it."""
    log = runtime.Log(None, ("a",), [torch.tensor(torch.nan)], 0)
    log.add(torch.tensor(2.0))
    with pytest.raises(runtime.UserError, match="step 1: a weight is not finite"):
        log.flush(1)


def test_curves_that_cannot_be_written_end_no_run(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    log = runtime.Log(tmp_path, ("a",), [], 0)
    log.add(torch.tensor(2.0))
    assert log.flush(1) == {"a": 2.0}
