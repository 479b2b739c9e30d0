"""omniglot/figures.py: its files, and what the drawings and the plane are made of."""

import json
import shutil
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import plain
from conftest import fails, load, run

model = load("omniglot", "model")
figures = load("omniglot", "figures")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    network = model.GMVAE(hidden_size=8, latent_size=8)
    path = tmp_path_factory.mktemp("figures") / "5shot_best.pt"
    torch.save({"model": network.state_dict(), "sizes": network.sizes}, path)
    cells = '"5way1shot": {"accuracy": 50.0, "ci95": 1.0, "episodes": 9}'
    lines = [
        f'{{"step": {step}, "seconds": 1, "reconstruction": 200.0, "kl": 10.0, {cells}}}\n'
        for step in (10, 20)
    ]
    (path.parent / "metrics.jsonl").write_text("".join(lines))
    return path


def test_three_small_pictures(checkpoint, glyphs_dir, tmp_path):
    result = run(
        "omniglot", "--checkpoint", checkpoint, "--data-dir", glyphs_dir, "--out", tmp_path,
        script="figures.py",
    )  # fmt: skip
    assert result.returncode == 0 and result.stderr == "", result.stderr
    for name in ("components.png", "latents.png", "curves.png"):
        path = tmp_path / name
        assert str(path) in result.stdout and path.stat().st_size < 200_000
        assert Image.open(path).convert("L").getextrema()[0] < 200  # something is drawn


def test_a_model_of_canonical_drawings(checkpoint, glyphs_dir, tmp_path):
    weights = shutil.copy(checkpoint, tmp_path)
    flags, widths = ["--checkpoint", weights, "--data-dir", glyphs_dir], []
    canonical = {"target": "canonical", "target_shape": 0.25, "e_step": "learned"}
    for config in ([], {"args": canonical, "precision": "fp32"}):  # first that of something else
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert run("omniglot", *flags, script="figures.py").returncode == 0
        widths.append(Image.open(tmp_path / "components.png").width)
    assert widths[1] > 1.8 * widths[0]  # four panels, not two


def test_the_flags_and_the_e_step_of_the_run_reach_the_figures(checkpoint, glyphs_dir, tmp_path, monkeypatch):
    weights, seen, fit = shutil.copy(checkpoint, tmp_path), [], figures.fit_episode
    config = {"args": {"e_step": "tied"}, "precision": "fp32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(figures, "fit_episode", lambda *how: seen.append((how[3], fit(*how))) or seen[-1][1])
    for episode in "01":
        argv = ["", "--checkpoint", weights, "--data-dir", str(glyphs_dir), "--episode", episode]
        monkeypatch.setattr("sys.argv", argv)
        figures.main()
    (reading, (first, *_)), (_, (other, *_)) = seen
    assert reading == "tied" and not first.equal(other)


def test_components_are_drawn_from_their_variances(tmp_path):
    decoded, var = [], 4 * torch.ones(3, 8)

    class Network:
        def decode(self, z):
            decoded.append(z)
            return torch.zeros(len(z), 28, 28, 1)

    figures.components(Network(), torch.zeros(3, 17, 28, 28), torch.zeros(3, 8), var, tmp_path / "a.png")
    assert decoded[0].std().item() == pytest.approx(2, rel=0.15)


def test_errors(checkpoint, glyphs_dir, tmp_path):
    fails(
        run("omniglot", "--checkpoint", tmp_path / "none.pt", "--data-dir", glyphs_dir, script="figures.py"),
        "none.pt",
        "not found",
    )
    fails(
        run("omniglot", "--checkpoint", checkpoint, "--data-dir", tmp_path, script="figures.py"),
        "test.npy",
        "not found",
    )
    fails(
        run(
            "omniglot", "--checkpoint", checkpoint, "--data-dir", glyphs_dir, "--shot", 6, script="figures.py"
        ),
        "20 drawings",
        "21",
    )
    fails(
        run(
            "omniglot", "--checkpoint", checkpoint, "--data-dir", glyphs_dir, "--way", 1, script="figures.py"
        ),
        "--way",
        "1 found",
        "at least 2",
    )
    flags = ["--checkpoint", checkpoint, "--data-dir", glyphs_dir, "--out", checkpoint]
    fails(run("omniglot", *flags, script="figures.py"), "--out", "a folder to write to expected")
    (tmp_path / "5shot_best.pt").write_bytes(checkpoint.read_bytes())
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe")
    flags = ["--checkpoint", tmp_path / "5shot_best.pt", "--data-dir", glyphs_dir, "--out", tmp_path]
    fails(run("omniglot", *flags, script="figures.py"), "metrics.jsonl: not readable")


def test_figures_of_other_data_say_so(checkpoint, glyphs_dir, tmp_path):
    shutil.copy(checkpoint, tmp_path)
    data = {"test": {"shape": [25, 20, 28, 28, 1], "crc32": zlib.crc32(np.load(glyphs_dir / "test.npy"))}}
    for crc32 in (data["test"]["crc32"], 5):
        data["test"]["crc32"] = crc32
        config = {"args": {}, "precision": "fp32", "data": data}
        (tmp_path / "config.json").write_text(json.dumps(config))
        flags = ["--checkpoint", tmp_path / checkpoint.name, "--data-dir", glyphs_dir]
        result = run("omniglot", *flags, script="figures.py")
        assert result.returncode == 0, result.stderr
        assert (f"other test data than those of the run in {tmp_path}" in result.stdout) == (crc32 == 5)


def test_an_episode_is_adapted_as_in_the_test(checkpoint, glyphs_dir, monkeypatch):
    """From support means to the class means and variances of the equations."""
    args = figures.parse_args(
        ["--checkpoint", str(checkpoint), "--way", "3", "--shot", "2", "--samples", "4"]
    )
    network, drawn = model.load_model(checkpoint), []
    monkeypatch.setattr(
        figures, "sample_posterior", lambda *parts: drawn.append(model.sample_posterior(*parts)) or drawn[0]
    )
    images = load("omniglot", "dataloader").load_split(glyphs_dir, "test")
    x, mean, before, mu, var = figures.fit_episode(network, images, args)
    assert (
        x.shape == (3, 17, 28, 28)
        and mean.shape == (3, 17, 8)
        and before.shape == mu.shape == var.shape == (3, 8)
    )
    z = drawn[0].double().unflatten(1, (3, 17))  # (1, way, members, S, D)
    support, query = z[:, :, :2].flatten(2, 3), z[:, :, 2:].flatten(1, 3)
    for found, expected in zip(
        (before, mu, var), (support.mean(2), *plain.adapt(support, query, 10, "unit"))
    ):
        torch.testing.assert_close(found.double(), expected[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, mu, rtol=1e-3)
    *_, mu, var = figures.fit_episode(network, images, args, "tied-full")
    expected, covariance = plain.adapt_tied_full(support[0], query[0], 10, samples=4)
    torch.testing.assert_close(mu.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(var.double(), covariance.diagonal().expand(3, 8), rtol=1e-4, atol=1e-5)
