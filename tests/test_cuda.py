"""The programs on a GPU, where there is one."""

import json
import signal

import pytest
import torch

from conftest import load, run
from pairs import COMPILED, PAIRS, difference
from test_omniglot_cli import STOPPED
from test_simclr_cli import PROTOTYPICAL, TINY
from test_simclr_cli import STOPPED as SIMCLR_STOPPED
from test_simclr_cli import data_dir, source_dir  # noqa: F401

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICE = "cuda"

SMALL = "--hidden-size 16 --latent-size 8 --batch-size 2 --sample-size 20 --train-mc-sample-size 2"
SMALL = [*SMALL.split(), "--ema-decay", "0.9"]


@pytest.fixture(autouse=True)
def in_float32():
    """As in the programs."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("folder", ["omniglot", "mimgnet"])
def test_a_training_step_never_waits_for_the_gpu(folder):
    main, model, dataloader = (load(folder, name) for name in ("main", "model", "dataloader"))
    args = main.parse_args(SMALL)
    images = (
        torch.rand(200, 28, 28, 1, device=DEVICE)
        if folder == "omniglot"
        else torch.rand(200, 32, device=DEVICE)
    )
    sizes = ({} if folder == "omniglot" else {"feature_size": 32}) | {"hidden_size": 16, "latent_size": 8}
    network, average = (model.GMVAE(**sizes, bf16=True).to(DEVICE) for _ in range(2))
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    generator = torch.Generator(DEVICE).manual_seed(0)
    try:
        for step in range(1, 5):
            x = dataloader.draw_sets(images, args.batch_size, args.sample_size, generator)
            terms = main.train_step(network, optimizer, x, step, args, generator)
            main.update_average(average, network, step, args)
            torch.cuda.set_sync_debug_mode(
                "error"
            )  # from the second step on: the first loads and chooses kernels
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(terms).isfinite().all()
    assert not average.decoder[0].weight.equal(network.decoder[0].weight)


def test_a_simclr_step_never_waits_for_the_gpu():
    main, model, dataloader = (load("simclr", name) for name in ("main", "model", "dataloader"))
    encoder, projection = model.Encoder(8, bf16=True).to(DEVICE), model.projection_head(8).to(DEVICE)
    network = torch.nn.Sequential(encoder, projection)
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    images = torch.randint(256, (32, 84, 84, 3), dtype=torch.uint8, device=DEVICE)
    generator = torch.Generator().manual_seed(0)
    try:
        for _ in range(3):
            views = dataloader.training_views(images, generator)
            loss = main.train_step(network, optimizer, views, 1e-3, 0.5, main.nt_xent, 2)
            torch.cuda.set_sync_debug_mode("error")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_step_computes_the_same_when_it_is_replayed(name):
    build, *settings = PAIRS[name]
    pair = build(*settings, True, torch.device(DEVICE), False)
    for _ in range(pair.warm_up + 2):
        ours, other = (parts["step"][0]() for parts in (pair.ours, pair.plain))
        assert difference(ours, other) < 1e-3


def test_the_same_views_as_on_the_cpu():
    dataloader = load("simclr", "dataloader")
    images = torch.randint(256, (8, 84, 84, 3), dtype=torch.uint8)
    here, there = (
        dataloader.training_views(x, torch.Generator().manual_seed(0)) for x in (images, images.to(DEVICE))
    )
    assert (here - there.cpu()).abs().mean() < 1e-4


def test_a_run_resumed_on_the_gpu_and_tested_on_the_cpu(glyphs_dir, tmp_path):
    flags = ["--data-dir", glyphs_dir, *SMALL, "--train-iters", 40, "--freq-iters", 20, "--eval-episodes", 20]
    on_gpu = [*flags, "--device", DEVICE, "--save-dir", tmp_path / "run"]
    result = run("omniglot", STOPPED.format(int(signal.SIGTERM)), *on_gpu, script="-c")  # after step 30
    assert result.returncode == 128 + signal.SIGTERM, result.stderr
    result = run("omniglot", *on_gpu, "--resume")
    assert result.returncode == 0, result.stderr
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == 40
    result = run(
        "omniglot", *flags, "--device", "cpu", "--eval-only", "--checkpoint", tmp_path / "run", "--save-dir",
        tmp_path / "eval",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    there, here = (json.loads((tmp_path / name / "test.json").read_text()) for name in ("run", "eval"))
    assert all(abs(there[cell]["accuracy"] - here[cell]["accuracy"]) < 0.5 for cell in here)


def test_a_simclr_run_with_neighbours_resumed_on_the_gpu(data_dir, tmp_path):  # noqa: F811
    flags = ["--data-dir", data_dir, *TINY, *PROTOTYPICAL, "--device", DEVICE, "--save-dir", tmp_path / "s"]
    flags += ["--feature-save-dir", tmp_path / "f"]
    result = run("simclr", SIMCLR_STOPPED, *flags, script="-c")
    assert result.returncode == 128 + signal.SIGTERM, result.stderr
    result = run("simclr", *flags, "--resume")
    assert result.returncode == 0, result.stderr
    assert torch.load(tmp_path / "s/last.pt", weights_only=True)["step"] == 9
