"""torchrun: two processes on gloo do what one does, write what it writes, and end together."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from conftest import ROOT, run
from test_imgnet import make_source
from test_mimgnet_cli import save_features

SMALL = {
    "mimgnet": "--images-per-class 20 --hidden-size 16 --latent-size 4 --batch-size 4 --eval-episodes 20 "
    "--train-mc-sample-size 4 --test-mc-sample-size 4 --query 4 --test-shot 1 --train-iters 20 "
    "--freq-iters 10 --lr 1e-3 --device cpu",
    "simclr": "--hidden-size 4 --batch-size 8 --train-epochs 8 --freq-epochs 2 --eval-episodes 6 "
    "--device cpu --way 2 --query 1 --test-shot 1 --probe --constant-epochs 99",
}


def torchrun(folder, processes, script, *args):
    """The command line, and the rest that subprocess needs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    env = os.environ | {"PYTHONPATH": str(ROOT / folder)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return list(map(str, [*command, script, *args])), {"cwd": ROOT / folder, "env": env, **pipes}


def launch(*args):
    command, options = torchrun(*args)
    return subprocess.run(command, timeout=200, **options)


def lines_of(program, text):
    """What it said for a user, without its bars and what torchrun says of its processes."""
    return re.findall(rf"{program}: error: .*", text)


# --- a step -----------------------------------------------------------------------------------------

STEP = """
import torch, main
from model import *
from parallel import *

def gradient(network):
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.requires_grad])

def alike(a, b, tolerance):
    assert (a - b).abs().max() <= tolerance * b.abs().max(), ((a - b).abs().max(), b.abs().max())

def same_everywhere(network):
    weights = torch.cat([p.detach().flatten() for p in network.parameters()])
    first = weights.clone()
    dist.broadcast(first, 0)
    assert weights.equal(first)
"""
SETS = """
from dataloader import draw_sets
images = torch.rand(90, *SHAPE, generator=torch.Generator().manual_seed(1))
flags = "--batch-size 4 --sample-size 6 --train-mc-sample-size 3 --decode-samples 2 --em-start images"
args = main.parse_args((flags + MORE).split())

def steps(count, training):
    torch.manual_seed(0)
    model, generator = GMVAE(*SIZES), torch.Generator().manual_seed(2)
    network = wrap(model.train(training))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(1, count + 1):
        x = share(draw_sets(images, 4, 6, generator))
        with share_of_draws():
            terms = main.train_step(network, optimizer, x, step, args, generator)
    return torch.stack(tuple(mean(*terms))).detach(), gradient(model), generator.get_state(), model

alone = steps(1, False)
with join("cpu", 4):
    together = steps(1, False)
    for a, b in zip(together[:2], alone):
        alike(a, b, 1e-4)
    assert together[2].equal(alone[2])
    same_everywhere(steps(20, True)[3])
"""
VIEWS = """
from functools import partial
from dataloader import training_views
images = torch.randint(256, (8, 84, 84, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
given = torch.randn(3 * 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

def own(x, views):
    return share(x.unflatten(0, (views, -1)), 1).flatten(0, 1)

def losses():
    for criterion, views in (nt_xent, 2), (partial(prototypical, views=3), 3):
        h = own(given[: views * 8], views).clone().requires_grad_()
        loss = criterion(gather(h, views), temperature=0.7)
        loss.backward()
        yield loss.detach(), h.grad / world(), views

def steps(count, training, criterion, views):
    torch.manual_seed(0)
    encoder = Encoder(4).train(training)
    projection = projection_head(4) if views == 2 else torch.nn.Identity()
    model, generator = torch.nn.Sequential(encoder, projection), torch.Generator().manual_seed(2)
    network, optimizer = wrap(model), torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(count):
        x = training_views(share(images), generator, 64, views)
        loss = main.train_step(network, optimizer, x, 1e-3, 0.7, criterion, views)
    return loss.detach(), gradient(model), x, generator.get_state(), model

kinds = (nt_xent, 2), (partial(prototypical, views=3), 3)
alone = [steps(1, False, *kind) for kind in kinds]
known = list(losses())
with join("cpu", 8):
    for (loss, grad, views), (loss_alone, grad_alone, _) in zip(losses(), known):
        alike(loss, loss_alone, 1e-14)
        alike(grad, own(grad_alone, views), 1e-13)
    for kind, before in zip(kinds, alone):
        after = steps(1, False, *kind)
        assert after[2].equal(own(before[2], kind[1])) and after[3].equal(before[3])
        alike(after[0], before[0], 1e-5)
        alike(after[1], before[1], 1e-4)
        same_everywhere(steps(20, True, *kind)[4])
"""
SCRIPTS = {
    "omniglot": 'SHAPE, SIZES, MORE = (28, 28, 1), (8, 6), " --target canonical --warp elastic"' + SETS,
    "mimgnet": 'SHAPE, SIZES, MORE = (16,), (16, 8, 6), ""' + SETS,
    "simclr": VIEWS,
}


@pytest.mark.parametrize("folder", SCRIPTS)
def test_a_step_of_two_processes_is_that_of_one(folder, tmp_path):
    """Images, views and draws bit by bit, loss and gradient but for rounding, batch norm frozen; and after
    20 steps of training the weights are the same in both, bit by bit."""
    (tmp_path / "step.py").write_text(STEP + SCRIPTS[folder])
    done = launch(folder, 2, tmp_path / "step.py")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


# --- the programs -----------------------------------------------------------------------------------

HASHED = """
import sys, zlib, main
wrap, part, kept = main.wrap, main.part, []

def say(stop):
    weights = b"".join(p.detach().numpy().tobytes() for p in kept[0].parameters())
    print(f"weights {zlib.crc32(weights)}", file=sys.stderr, flush=True)
    part(stop)

main.wrap, main.part = lambda model: kept.append(model) or wrap(model), say
main.main()
"""


@pytest.fixture(scope="module")
def data_dirs(tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    for name in ("features", "source"):
        (place / name).mkdir()
    save_features(place / "features")
    make_source(place / "source")
    return {"mimgnet": place / "features", "simclr": place / "source"}


def flags_of(folder, data_dirs, save_dir):
    features = ["--feature-save-dir", save_dir / "features"] if folder == "simclr" else []
    return ["--data-dir", data_dirs[folder], "--save-dir", save_dir, *features, *SMALL[folder].split()]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("folder", ["mimgnet", "simclr"])  # omniglot's loop is mimgnet's
def test_a_run_of_two_processes_leaves_the_same_files(folder, data_dirs, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    result = run(folder, *flags_of(folder, data_dirs, one))
    assert result.returncode == 0, result.stderr
    (tmp_path / "hashed.py").write_text(HASHED)
    done = launch(folder, 2, tmp_path / "hashed.py", *flags_of(folder, data_dirs, two))
    assert done.returncode == 0, done.stderr
    found = re.findall("weights [0-9]+", done.stderr)
    assert len(found) == 2 and len(set(found)) == 1
    left = [sorted(p.relative_to(at) for p in at.rglob("*") if "events" not in p.name) for at in (one, two)]
    assert left[0] == left[1] and len(list((two / "tb_log").iterdir())) == 1
    a, b = metrics(one), metrics(two)
    assert [line["step"] for line in a] == [line["step"] for line in b]
    if folder == "mimgnet":  # no batch norm
        for before, after in zip(a, b):
            assert after["reconstruction"] == pytest.approx(before["reconstruction"], rel=1e-4)
    config = json.loads((two / "config.json").read_text())
    assert config["device"].startswith("2 x ") and done.stdout.count("2 x ") == 1

    longer = ["--train-epochs", 10] if folder == "simclr" else ["--train-iters", 30]
    again = run(folder, *flags_of(folder, data_dirs, two), "--resume", *longer)
    assert again.returncode == 0, again.stderr
    assert metrics(two)[: len(b)] == b and metrics(two)[-1]["step"] > b[-1]["step"]


def test_a_batch_that_does_not_divide_is_refused_in_one_line(data_dirs, tmp_path):
    done = launch("mimgnet", 3, "main.py", *flags_of("mimgnet", data_dirs, tmp_path / "run"))
    (line,) = lines_of("main.py", done.stderr)
    assert line.endswith("--batch-size: 4 found, a multiple of the 3 processes expected")
    assert done.returncode and re.search(r"exitcode\s*: 2 ", done.stderr)
    assert not (tmp_path / "run").exists()


def test_a_mistake_of_all_is_said_once(data_dirs, tmp_path):
    flags = flags_of("mimgnet", data_dirs, tmp_path / "run")
    done = launch("mimgnet", 2, "main.py", *flags, "--data-dir", tmp_path / "nowhere")
    (line,) = lines_of("main.py", done.stderr)
    assert "nowhere" in line and done.returncode


def test_one_of_several_tests_a_checkpoint(data_dirs, tmp_path):
    """And the others end."""
    flags = flags_of("mimgnet", data_dirs, tmp_path / "run")
    assert run("mimgnet", *flags).returncode == 0
    flags = ["--data-dir", data_dirs["mimgnet"], "--save-dir", tmp_path / "test", "--images-per-class", 20]
    flags += ["--eval-only", "--checkpoint", tmp_path / "run", "--query", 4, "--test-shot", 1]
    done = launch("mimgnet", 2, "main.py", *flags, "--eval-episodes", 20)
    assert done.returncode == 0 and done.stdout.count("5way1shot") == 1, done.stderr


# --- an end before the end --------------------------------------------------------------------------


def started(folder, data_dirs, save_dir):
    """A run of two processes that has saved: (torchrun, the processes' ids in their order)."""
    flags = [*flags_of(folder, data_dirs, save_dir), "--train-iters", 10**6]
    command, options = torchrun(folder, 2, "main.py", *flags)
    process, deadline = subprocess.Popen(command, **options), time.monotonic() + 100
    while not (save_dir / "last.pt").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    ids = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    if len(ids) != 2:
        process.terminate()
        pytest.fail(f"{len(ids)} processes started: {process.communicate()[1]}")
    return process, [int(of) for of in ids]


def resumes(data_dirs, save_dir):
    step = torch.load(save_dir / "last.pt", weights_only=True)["step"]
    flags = [*flags_of("mimgnet", data_dirs, save_dir), "--resume", "--train-iters", step + 5]
    result = run("mimgnet", *flags)
    assert result.returncode == 0, result.stderr
    return step


def test_a_killed_process_ends_the_run(data_dirs, tmp_path):
    process, ids = started("mimgnet", data_dirs, tmp_path / "run")
    os.kill(ids[1], signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    (line,) = lines_of("main.py", said)
    assert "another process of the run ended" in line and line.endswith("--resume continues from last.pt")
    assert process.returncode and re.search(r"exitcode\s*: 2 ", said)
    resumes(data_dirs, tmp_path / "run")


@pytest.mark.parametrize("who", ["torchrun", "one process"])
def test_a_signal_stops_all_at_the_same_step(who, data_dirs, tmp_path):
    process, ids = started("mimgnet", data_dirs, tmp_path / "run")
    os.kill(process.pid if who == "torchrun" else ids[1], signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    (step,) = re.findall("stopped after step ([0-9]+); --resume continues", said)
    assert process.returncode and not lines_of("main.py", said)
    assert resumes(data_dirs, tmp_path / "run") == int(step)
