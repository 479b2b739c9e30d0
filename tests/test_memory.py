"""The memory that a program keeps: `keep_memory` of machine.py."""

import platform
import subprocess
import sys

import pytest

from conftest import ROOT

HEAP = """
import torch
from pathlib import Path
from machine import keep_memory

def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) // 256  # MiB

keep_memory()
weight, small = torch.zeros(1, requires_grad=True), torch.ones(50 * 2**18)  # 50 MiB
optimizer = torch.optim.SGD([weight], lr=1)
optimizer.step()
first = held()
large = torch.ones(first * 2**18)  # as much again: twice what it held
del large
kept = held()
optimizer.step()
print(first, kept, held())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed pages")
def test_freed_pages_are_kept_up_to_a_bound():
    done = subprocess.run([sys.executable, "-c", HEAP], cwd=ROOT / "omniglot", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, kept, left = map(int, done.stdout.split())
    assert kept > 1.9 * first and left < 1.2 * first
