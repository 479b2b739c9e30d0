"""machine.py and runtime.py: what the programs themselves do not show."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, load

machine, runtime = load("omniglot", "machine"), load("omniglot", "runtime")


def test_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    config = runtime.describe_run({"seed": 0}, torch.device("cpu"), "fp32", {"train": torch.zeros(2, 3)})
    assert config["git_commit"] is None and config["args"] == {"seed": 0}
    assert config["data"]["train"]["shape"] == [2, 3]


def test_a_checksum_is_of_the_values_not_of_their_order_in_memory():
    def described(x):
        return runtime.describe_run({}, torch.device("cpu"), "fp32", {"train": x})["data"]

    x = torch.arange(6.0).view(2, 3)
    assert described(x) == described(x.T.contiguous().T) != described(x + 1)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    machine.write(tmp_path / "file", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(machine.UserError, match="file: not written .No space left"):
        machine.write(tmp_path / "file", "new")
    with pytest.raises(machine.UserError, match="x: not written .Not a directory"):
        machine.write(tmp_path / "file/x", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_only_what_a_user_can_put_right_is_said_in_one_line(capfd):
    no_memory = [
        RuntimeError("can't allocate memory: a flag"),
        torch.OutOfMemoryError("CUDA out of memory. a flag"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED: a flag"),
        MemoryError("a flag"),
    ]
    for error in (machine.UserError("a flag"), *no_memory):
        with pytest.raises(SystemExit, match="2"), machine.program():
            raise error
        (line,) = capfd.readouterr().err.splitlines()
        assert (
            "error: " in line and "a flag" in line and ("not enough memory" in line) == (error in no_memory)
        )
    for error in (RuntimeError("shapes"), FileNotFoundError("a file of somebody's own code")):
        with pytest.raises(type(error)), machine.program():
            raise error


def test_float32_is_not_rounded_on_a_gpu():
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    with machine.program():
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


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
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "exploded"), "w")

    torch.save({"model": Bomb()}, tmp_path / "last.pt")
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


def test_a_line_of_a_recipe(capsys):
    parse = machine.Parser().convert_arg_line_to_args
    assert parse("--save-dir runs/try#2  # a reason") == ["--save-dir", "runs/try#2"]
    assert parse("# a line") == parse("") == [] and parse("--out 'a b'") == ["--out", "a b"]
    with pytest.raises(SystemExit, match="2"):
        parse("--save-dir runs/bob's")
    assert "runs/bob's: No closing quotation found" in capsys.readouterr().err


def test_a_folder_that_is_not_utf_8_is_refused(capsys):
    """TensorBoard's writer encodes its path."""
    with pytest.raises(SystemExit, match="2"):
        load("omniglot", "main").parse_args(["--save-dir", os.fsdecode(b"r\xff")])
    assert "--save-dir" in capsys.readouterr().err


def test_a_home_that_is_nobodys_is_a_name(tmp_path):
    assert str(machine.user_path("~nobody-here/x")) == "~nobody-here/x"


def test_what_stands_in_the_way_of_config_json(tmp_path):
    (tmp_path / "file").write_text("")
    assert runtime.read_config(tmp_path / "file") == {}
    (tmp_path / "config.json").mkdir()
    with pytest.raises(machine.UserError, match="config.json: not readable"):
        runtime.read_config(tmp_path)
    (tmp_path / "config.json").rmdir()
    (tmp_path / "config.json").write_text('{"args": {}, "precision": "fp32", "data": [1]}')
    with pytest.raises(machine.UserError, match="config.json: not readable"):
        runtime.read_config(tmp_path)


def test_a_device_that_runs_no_kernel(monkeypatch):
    def fail(_):
        raise RuntimeError("no kernel image is available\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(torch.Tensor, "sum", fail)
    with pytest.raises(machine.UserError, match="--device: cpu found, .* .no kernel image is available.$"):
        machine.choose_device("cpu")


def test_mps_trains_in_float32():
    device = torch.device("mps")
    assert "MPS" in machine.device_name(device) and not machine.use_bf16("auto", device)
    with pytest.raises(machine.UserError, match="--precision: bf16 found, fp32 expected"):
        machine.use_bf16("bf16", device)


def test_signals_are_caught_in_training_only(capfd):
    before = signal.getsignal(signal.SIGTERM)
    with machine.catch_stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert (
            stop == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        )  # a second one ends it
    assert signal.getsignal(signal.SIGTERM) == before
    assert "stopping" in capfd.readouterr().err


HEARD = """
import sys
from machine import program
from tqdm import tqdm
with program():
    for _ in tqdm(range(3), mininterval=0):
        print("±" * 10000, flush=True)
        print("±" * 10000, file=sys.stderr, flush=True)
    sys.exit(7)
"""


@pytest.mark.parametrize(
    "how", ["2>&-", ">&-", "2>&- >&-", "2>/dev/full", ">/dev/full", "2> >(true)", "> >(true)"]
)
def test_output_that_nobody_reads_ends_no_run(how):
    """Closed, on a full disk, or a pipe whose reader has gone."""
    command = ["bash", "-c", f'"$0" -c "$1" {how}', sys.executable, HEARD]
    done = subprocess.run(command, cwd=ROOT / "omniglot", capture_output=True, text=True)
    assert done.returncode == 7 and "Traceback" not in done.stderr, done.stderr


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


def test_auto_is_bf16_where_it_is_fast(monkeypatch):
    for flags, fast in (("avx512f avx512_bf16", True), ("avx512f avx2", False)):
        monkeypatch.setattr(machine, "cpu_facts", lambda: f"flags : {flags}")
        assert machine.use_bf16("auto", torch.device("cpu")) == fast
