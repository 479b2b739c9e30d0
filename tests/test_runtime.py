"""runtime.py: what the programs themselves do not show."""

import argparse
import os
import platform
import signal
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, load

runtime = load("omniglot", "runtime")

HEAP = """
import torch
from pathlib import Path
from runtime import Heap, keep_memory

def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) // 256  # MiB

keep_memory()
heap, small = Heap(), torch.ones(50 * 2**18)  # 50 MiB
heap.tidy()
first = held()
large = torch.ones(first * 2**18)  # as much again: twice what it held
del large
kept = held()
heap.tidy()
print(first, kept, held())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed pages")
def test_freed_pages_are_kept_up_to_a_bound():
    done = subprocess.run([sys.executable, "-c", HEAP], cwd=ROOT / "omniglot", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, kept, left = map(int, done.stdout.split())
    assert kept > 1.9 * first and left < 1.2 * first


def test_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    args = argparse.Namespace(seed=0)
    config = runtime.describe_run(args, torch.device("cpu"), False, {"train": torch.zeros(2, 3)})
    assert config["git_commit"] is None and config["args"] == {"seed": 0} and config["data"]["train"]["shape"] == [2, 3]


def test_a_checksum_is_of_the_values_not_of_their_order_in_memory():
    x = torch.arange(6.0).view(2, 3)
    describe = lambda x: runtime.describe_run(argparse.Namespace(), torch.device("cpu"), False, {"train": x})["data"]  # noqa: E731
    assert describe(x) == describe(x.T.contiguous().T) != describe(x + 1)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    runtime.write_text(tmp_path / "file", "old")

    def half(temporary):
        temporary.write_text("half")
        raise RuntimeError("no space left")

    with pytest.raises(RuntimeError):
        runtime.write_atomically(tmp_path / "file", half)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a full disk is played by /dev/full")
def test_a_full_disk_is_said_in_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(runtime, "write_atomically", lambda path, write: write("/dev/full"))
    with pytest.raises(SystemExit, match="2"), runtime.one_line_errors():
        runtime.save_checkpoint(tmp_path / "last.pt", {"tensor": torch.zeros(10**6)})
    (line,) = capfd.readouterr().err.splitlines()
    assert "error: " in line and ("last.pt: not written" in line or "No space left" in line)


def test_only_what_a_user_can_put_right_is_said_in_one_line(capfd):
    no_memory = [RuntimeError("can't allocate memory: a flag"), torch.OutOfMemoryError("CUDA out of memory. a flag"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED: a flag")]
    for error in (runtime.UserError("a flag"), FileNotFoundError("a flag"), *no_memory):
        with pytest.raises(SystemExit, match="2"), runtime.one_line_errors():
            raise error
        (line,) = capfd.readouterr().err.splitlines()
        assert "error: " in line and "a flag" in line and ("not enough memory" in line) == (error in no_memory)
    with pytest.raises(RuntimeError, match="shapes"), runtime.one_line_errors():
        raise RuntimeError("shapes")


def test_a_moving_average_is_what_last_pt_stands_for(tmp_path):
    network = lambda: torch.nn.Linear(2, 1)  # noqa: E731
    model, average = network(), network()
    runtime.save_checkpoint(tmp_path / "last.pt", {"sizes": {}, "model": model.state_dict(), "average": average.state_dict()})
    assert runtime.load_model(tmp_path / "last.pt", network).weight.equal(average.weight)
    runtime.save_checkpoint(tmp_path / "last.pt", {"sizes": {}, "model": model.state_dict()})
    assert runtime.load_model(tmp_path / "last.pt", network).weight.equal(model.weight)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_weights_are_read_without_what_a_wrapper_puts_before_their_names(tmp_path, prefix):
    network = lambda: torch.nn.Linear(2, 1)  # noqa: E731
    model, path = network(), tmp_path / "some.pt"
    torch.save({"sizes": {}, "model": {prefix + name: value for name, value in model.state_dict().items()}}, path)
    assert runtime.load_model(path, network).weight.equal(model.weight)
    torch.save({"sizes": {}, "model": {f"other.{name}": value for name, value in model.state_dict().items()}}, path)
    with pytest.raises(runtime.UserError, match="some.pt: not a checkpoint of this experiment"):
        runtime.load_model(path, network)


def test_a_folder_that_is_not_utf_8_is_refused(tmp_path):
    """TensorBoard's writer encodes its path."""
    with pytest.raises(runtime.UserError, match="--save-dir: .* found, a name in UTF-8 expected"):
        runtime.open_folder(tmp_path / os.fsdecode(b"r\xff"), {}, False, set())
    assert not list(tmp_path.iterdir())


def test_signals_are_caught_in_training_only(capfd):
    before = signal.getsignal(signal.SIGTERM)
    with runtime.catch_stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # a second one ends it
    assert signal.getsignal(signal.SIGTERM) == before
    assert "stopping" in capfd.readouterr().err


HEARD = """
import sys
from runtime import print_in_any_encoding
print_in_any_encoding()
from tqdm import tqdm
for _ in tqdm(range(3), mininterval=0):
    print("±" * 10000, flush=True)
    print("±" * 10000, file=sys.stderr, flush=True)
sys.exit(7)
"""


@pytest.mark.parametrize("how", ["2>&-", ">&-", "2>&- >&-", "2>/dev/full", ">/dev/full", "2> >(true)", "> >(true)"])
def test_output_that_nobody_reads_ends_no_run(how):
    """Closed, on a full disk, or a pipe whose reader has gone."""
    command = ["bash", "-c", f'"$0" -c "$1" {how}', sys.executable, HEARD]
    done = subprocess.run(command, cwd=ROOT / "omniglot", capture_output=True, text=True)
    assert done.returncode == 7 and "Traceback" not in done.stderr, done.stderr
