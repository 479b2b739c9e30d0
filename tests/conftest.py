"""What the tests share: modules of the folders, their programs as a user runs them, a tiny data set."""

import atexit
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest

from folders import ROOT, load  # noqa: F401

shared_data = ROOT.parent / "shared" / "data"
needs_shared_data = pytest.mark.skipif(
    not shared_data.is_dir(), reason="the real data sets are not at ../shared/data"
)

# Read when torch is imported: two test processes share the cores; threads beyond the cores mostly wait.
os.environ["OMP_NUM_THREADS"] = "1"


@functools.cache
def starter():
    """The process that forks for `run`, in one thread, for threads do not survive a fork."""
    command = [sys.executable, Path(__file__).with_name("started.py")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.communicate)  # ends it
    return process


def run(folder, *args, script="main.py", timeout=400, env=None):
    """Run `python <script> <args>` in a folder as a user does: CompletedProcess, with stdout and stderr."""
    args = [*map(str, args)]
    if env or sys.platform != "linux":  # elsewhere a fork is not safe
        pipes = {"capture_output": True, "text": True, "timeout": timeout}
        env = os.environ | (env or {})
        return subprocess.run([sys.executable, script, *args], cwd=ROOT / folder, env=env, **pipes)
    with NamedTemporaryFile("r") as out, NamedTemporaryFile("r") as err:
        asked = {"folder": str(ROOT / folder), "script": script, "args": args}
        asked |= {"out": out.name, "err": err.name, "timeout": timeout}
        print(json.dumps(asked), file=starter().stdin, flush=True)
        status = int(starter().stdout.readline())
        return subprocess.CompletedProcess(args, status, out.read(), err.read())


def fails(result, *words):
    """Assert that a program ended as for a user's mistake: status 2 and one line that has all `words`.

    Progress bars may stand before the line, but not on it.
    """
    lines = [line for line in result.stderr.splitlines() if line.strip() and not re.search(r"\d+%\|", line)]
    assert result.returncode == 2, f"exit status {result.returncode}\n{result.stderr}"
    assert "Traceback" not in result.stderr, result.stderr
    assert len(lines) == 1, result.stderr
    for word in words:
        assert str(word) in lines[0], f"{word!r} not in {lines[0]!r}"


def metrics(folder):
    """List the lines of a run's metrics.jsonl, without the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def written(folder):
    """Return {name: bytes} of everything in a folder, hidden files included."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def bomb(path):
    """Make an object that, when it is unpickled, makes a file."""

    class Bomb:
        def __reduce__(self):
            return open, (str(path), "w")

    return Bomb()


@pytest.fixture(scope="session")
def glyphs_dir(tmp_path_factory):
    """A folder with a tiny glyph data set: train, val and test of 60, 25 and 25 classes of 20 drawings."""
    folder = tmp_path_factory.mktemp("glyphs")
    sizes = "--train", 60, "--val", 25, "--test", 25
    result = run("data/glyphs", "--out", folder, *sizes, script="prepare.py")
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="session")
def omniglot_dir(tmp_path_factory):
    """A folder with the real Omniglot, prepared; for tests marked `needs_shared_data`."""
    folder = tmp_path_factory.mktemp("omniglot")
    result = run("data/omniglot", "--source", shared_data / "omniglot", "--out", folder, script="prepare.py")
    assert result.returncode == 0, result.stderr
    return folder
