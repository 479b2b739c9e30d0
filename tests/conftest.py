"""What the tests share: modules of the self-contained folders, their programs as a user runs them, a tiny
data set."""

import os
import re
import subprocess
import sys

import pytest
import torch

from folders import ROOT, load  # noqa: F401

shared_data = ROOT.parent / "shared" / "data"
needs_shared_data = pytest.mark.skipif(
    not shared_data.is_dir(), reason="the real data sets are not at ../shared/data"
)

torch.set_num_threads(1)  # two test processes share the cores; threads beyond the cores mostly wait


def run(folder, *args, script="main.py", timeout=400, env=None):
    """`python <script> <args>` in a folder, as a user runs it: CompletedProcess, stdout and stderr as
    text."""
    command = [sys.executable, script, *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(
        command, cwd=ROOT / folder, env=env, capture_output=True, text=True, timeout=timeout
    )


def fails(result, *words):
    """Asserts that a program ended as for a user's mistake: status 2 and one line that has all `words`.

    Progress bars may stand before the line, but not on it.
    """
    lines = [line for line in result.stderr.splitlines() if line.strip() and not re.search(r"\d+%\|", line)]
    assert result.returncode == 2, f"exit status {result.returncode}\n{result.stderr}"
    assert "Traceback" not in result.stderr, result.stderr
    assert len(lines) == 1, result.stderr
    for word in words:
        assert str(word) in lines[0], f"{word!r} not in {lines[0]!r}"


@pytest.fixture(scope="session")
def glyphs_dir(tmp_path_factory):
    """A folder with a tiny glyph data set: train, val and test of 60, 25 and 25 classes with 20 drawings
    each."""
    folder = tmp_path_factory.mktemp("glyphs")
    result = run(
        "data/glyphs", "--out", folder, "--train", 60, "--val", 25, "--test", 25, script="prepare.py"
    )
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="session")
def omniglot_dir(tmp_path_factory):
    """A folder with the real Omniglot as data/omniglot/prepare.py writes it; for tests marked
    `needs_shared_data`."""
    folder = tmp_path_factory.mktemp("omniglot")
    result = run("data/omniglot", "--source", shared_data / "omniglot", "--out", folder, script="prepare.py")
    assert result.returncode == 0, result.stderr
    return folder
