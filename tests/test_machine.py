"""machine.py: what the programs themselves do not show."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, load

machine = load("omniglot", "machine")


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


@pytest.mark.parametrize(
    "said, expected",
    [("a\nb", "a"), ("Errors:\n\tsize mismatch\nb", "size mismatch"), ("a:", "a:"), ("", "ValueError")],
)
def test_an_error_in_short(said, expected):
    assert machine.in_short(ValueError(said)) == expected


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


def test_auto_is_bf16_where_it_is_fast(monkeypatch):
    for flags, fast in (("avx512f avx512_bf16", True), ("avx512f avx2", False)):
        monkeypatch.setattr(machine, "cpu_facts", lambda: f"flags : {flags}")
        assert machine.use_bf16("auto", torch.device("cpu")) == fast
