"""SimCLR: the loss, the network and the views against literal definitions; the program as a user runs it."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch import nn
from torchvision.transforms import ColorJitter, RandomResizedCrop

import conftest
from conftest import ROOT, fails, load, needs_shared_data, shared_data
from test_imgnet import make_source

data, model = load("simclr", "dataloader"), load("simclr", "model")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # threads would only wait for each other over models this small
TINY = "--hidden-size 4 --batch-size 8 --train-epochs 3 --freq-epochs 2 --way 2 --query 1 --eval-episodes 6 --test-shot 1 2".split()


def run(folder, *args, **options):
    return conftest.run(folder, *args, env=ONE_THREAD, **options)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count, seed=0):
    """Random uint8 images with structure at every scale."""
    fine = torch.rand(count, 84, 84, 3, generator=generator(seed))
    coarse = torch.rand(count, 4, 4, 3, generator=generator(seed + 1)).repeat_interleave(21, 1).repeat_interleave(21, 2)
    return (255 * (0.3 * fine + 0.7 * coarse)).byte()


# --- the model ------------------------------------------------------------------------------------


def test_nt_xent_is_the_literal_definition():
    n, t = 5, 0.5
    z = torch.randn(2 * n, 7, generator=generator(), dtype=torch.float64)
    cosine = lambda a, b: a @ b / (a.norm() * b.norm())  # noqa: E731
    total = 0.0
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        others = sum((cosine(z[i], z[k]) / t).exp() for k in range(2 * n) if k != i)
        total -= ((cosine(z[i], z[j]) / t).exp() / others).log()
    assert model.nt_xent(z.float(), t).item() == pytest.approx(total.item() / (2 * n), rel=1e-5)


def test_nt_xent_has_the_literal_gradient():
    z = torch.randn(8, 3, generator=generator(), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: model.nt_xent(z, 0.3), z)


def test_parameter_counts():
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    encoder = model.Encoder()
    assert count(encoder) == 150_144 and count(encoder.blocks[0]) == 1_920 and count(model.projection_head()) == 98_688
    assert model.projection_head()(encoder(torch.randn(2, 3, 84, 84))).shape == (2, 128)


def test_encoder_is_conv_norm_relu_pool():
    encoder = model.Encoder(6).train()
    x = torch.randn(4, 3, 84, 84, generator=generator())
    h = x
    for block in list(encoder.blocks)[:-1]:
        h = nn.functional.max_pool2d(block.norm(block.conv(h)).relu(), 2)
    assert torch.allclose(encoder(x), h.flatten(1), atol=1e-5) and h.shape == (4, 6, 2, 2)


def test_bf16_gives_float32_features_close_to_the_others():
    x = torch.randn(8, 3, 84, 84, generator=generator())
    torch.manual_seed(0)
    encoder = model.Encoder(8)
    exact = encoder(x)
    encoder.bf16 = True
    rounded = encoder(x)
    assert rounded.dtype == torch.float32 and (exact - rounded).abs().max() < 0.1


# --- the views ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, low, high", [("brightness", 0.2, 1.8), ("contrast", 0.2, 1.8), ("saturation", 0.2, 1.8), ("hue", -0.2, 0.2)])
def test_colour_operations_are_torchvisions(name, low, high):
    x = images(12).permute(0, 3, 1, 2).float() / 255
    x[0], x[1, 1:] = 0.4, x[1, :1]  # one flat, one grey
    x[2, :, :40], x[2, :, 40:] = 0, 1
    factor = torch.linspace(low, high, len(x))
    ours, theirs = getattr(data, f"adjust_{name}")(x, factor), getattr(TF, f"adjust_{name}")
    for i, f in enumerate(factor.tolist()):
        assert torch.allclose(ours[i], theirs(x[i], f), atol=1e-5), (name, f)


def test_a_view_is_torchvisions_for_the_same_draws():
    """Crop, flip, the four operations in the image's own order, greyscale, on 64 independent draws at once."""
    names = ["brightness", "contrast", "saturation", "hue"]
    x, draws = images(64), data.draw_views(64, generator(3))
    before = x.clone()
    views = data.make_views(x, *draws)
    for i, (box, flip, factors, order, grey) in enumerate(zip(*draws)):
        left, top, width, height = map(int, box)
        y = TF.resized_crop(x[i].permute(2, 0, 1).float() / 255, top, left, height, width, [84, 84], antialias=True)
        y = TF.hflip(y) if flip else y
        for o in order.tolist():
            y = getattr(TF, f"adjust_{names[o]}")(y, factors[o].item()) if o >= 0 else y
        y = TF.rgb_to_grayscale(y, 3) if grey else y
        difference = (views[i] - y).abs()
        # A hue turns by a wide angle where a pixel is all but grey: there the last digits of the crop decide.
        assert difference.mean() < 1e-4 and difference.quantile(0.999) < 1e-2, i
    assert x.equal(before), "the stored images changed"
    assert draws[1].any() and draws[4].any() and (draws[3] < 0).any()


def ks_distance(a, b):
    """Largest difference of two samples' distribution functions."""
    a, b = a.double().sort().values, b.double().sort().values
    points = torch.cat([a, b])
    share = lambda s: torch.searchsorted(s, points, right=True) / len(s)  # noqa: E731
    return (share(a) - share(b)).abs().max().item()


def test_crops_are_distributed_as_torchvisions():
    n, blank = 6000, torch.empty(3, 84, 84)
    torch.manual_seed(0)
    theirs = torch.tensor([RandomResizedCrop.get_params(blank, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]).float()
    t_top, t_left, t_height, t_width = theirs.T
    left, top, width, height = data.draw_crops(n, generator()).T
    critical = 1.95 * math.sqrt(2 / n)  # passed by chance with probability 1e-3
    for name, a, b in (
        ("area", width * height, t_width * t_height), ("ratio", width / height, t_width / t_height), ("width", width, t_width),
        ("left", left, t_left), ("top", top, t_top), ("right", left + width, t_left + t_width), ("bottom", top + height, t_top + t_height),
    ):  # fmt: skip
        assert ks_distance(a, b) < critical, name
    assert (left >= 0).all() and (top >= 0).all() and (left + width <= 84).all() and (top + height <= 84).all()
    assert (width * height / 84**2).min() > 0.07 and (width / height).max() < 1.45


def test_jitter_is_distributed_as_torchvisions():
    n, ranges = 6000, ([0.2, 1.8], [0.2, 1.8], [0.2, 1.8], [-0.2, 0.2])
    torch.manual_seed(0)
    theirs = [ColorJitter.get_params(*ranges) for _ in range(n)]
    factors, order = data.draw_jitter(n, generator())
    for i, (low, high) in enumerate(ranges):
        assert ks_distance(factors[:, i], torch.tensor([draw[i + 1] for draw in theirs])) < 1.95 * math.sqrt(2 / n)
        assert factors[:, i].min() >= low and factors[:, i].max() <= high
    assert factors.T.corrcoef().fill_diagonal_(0).abs().max() < 0.06  # independent of one another
    assert torch.stack([factors[:-1, 0], factors[1:, 0]]).corrcoef()[0, 1].abs() < 0.06  # and of the next image's
    jittered = order[(order >= 0).all(-1)]
    assert ((order >= 0).all(-1) | (order < 0).all(-1)).all() and abs(len(jittered) / n - 0.8) < 0.02
    permutations, counts = jittered.unique(dim=0, return_counts=True)
    assert len(permutations) == 24 and (permutations.sort(-1).values == torch.arange(4)).all()
    expected = len(jittered) / 24
    assert ((counts - expected) ** 2 / expected).sum() < 49.7  # chi-squared, 23 degrees of freedom, 1e-3


def test_shares_of_flipped_and_grey_views():
    boxes, flip, factors, order, grey = data.draw_views(6000, generator())
    assert abs(flip.float().mean() - 0.5) < 0.025 and abs(grey.float().mean() - 0.2) < 0.02
    assert torch.stack([flip.float(), grey.float(), (order[:, 0] >= 0).float(), boxes[:, 2]]).corrcoef().fill_diagonal_(0).abs().max() < 0.05


def test_the_two_views_of_an_image_differ_and_repeat_with_the_seed():
    x = images(40)
    views = data.training_views(x, generator(5))
    assert views.shape == (80, 3, 84, 84) and views.isfinite().all()
    assert all((views[i] - views[i + 40]).abs().mean() > 1e-3 for i in range(40))
    assert views.equal(data.training_views(x, generator(5))) and not views.equal(data.training_views(x, generator(6)))
    low, high = data.normalise(torch.zeros(1, 3, 1, 1)), data.normalise(torch.ones(1, 3, 1, 1))
    assert (views >= low - 1e-5).all() and (views <= high + 1e-5).all()


def test_epochs_see_every_image_once_in_another_order():
    first, second = (data.epoch_order(torch.empty(50, 1), 0, epoch) for epoch in (0, 1))
    assert first.sort().values.equal(torch.arange(50)) and not first.equal(second)
    assert first.equal(data.epoch_order(torch.empty(50, 1), 0, 0)) and not first.equal(data.epoch_order(torch.empty(50, 1), 1, 0))


# --- evaluation and schedule ----------------------------------------------------------------------


def test_learning_rate_is_constant_then_falls_to_zero():
    main = load("simclr", "main")
    args = main.parse_args(["--train-epochs", "40"])
    assert all(main.learning_rate(e, args) == 1e-3 for e in (0, 3.7, 10))
    rates = [main.learning_rate(10 + i / 10, args) for i in range(301)]
    assert all(a > b for a, b in zip(rates, rates[1:])) and rates[150] == pytest.approx(5e-4) and rates[-1] == pytest.approx(0, abs=1e-12)
    assert main.learning_rate(2.9, main.parse_args(["--train-epochs", "3"])) == 1e-3


def test_episode_accuracies_against_loops():
    main = load("simclr", "main")
    features = torch.randn(6, 12, 5, generator=generator()) + 2 * torch.randn(6, 1, 5, generator=generator(1))
    episodes = data.draw_episodes(features, 4, 2, 3, 7, seed=1)
    assert (episodes // 12 == (episodes // 12)[:, :, :1]).all() and all(e.unique().numel() == 20 for e in episodes)
    flat = features.flatten(0, 1)
    accuracy = main.nearest_mean(flat, episodes, 2)
    for e, got in zip(episodes, accuracy):
        means = [flat[row[:2]].mean(0) for row in e]
        right = [min(range(4), key=lambda k: (flat[i] - means[k]).norm()) == c for c, row in enumerate(e) for i in row[2:]]
        assert got == pytest.approx(100 * sum(right) / 12)
    by_regression = main.logistic_regression(flat, episodes, 2)
    assert by_regression.shape == (7,) and abs(by_regression.mean() - accuracy.mean()) < 20
    far = flat + 100 * torch.eye(6, 5).repeat_interleave(12, 0)
    assert (main.nearest_mean(far, episodes, 2) == 100).all() and (main.logistic_regression(far, episodes, 2) == 100).all()


# --- the program ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simclr") / "source"
    make_source(folder)
    return folder


@pytest.fixture(scope="module")
def data_dir(source_dir):
    out = source_dir.parent / "prepared"
    result = run("data/imgnet", "--source", source_dir, "--out", out, script="prepare.py")
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="module")
def whole_run(data_dir, tmp_path_factory):
    """A finished tiny run with its probe: (its folder, its features' folder, its flags)."""
    place = tmp_path_factory.mktemp("run")
    result = run("simclr", "--data-dir", data_dir, "--save-dir", place / "whole", "--feature-save-dir", place / "features", "--probe", *TINY)
    assert result.returncode == 0, result.stderr
    return place / "whole", place / "features", ["--data-dir", data_dir, *TINY]


def metrics(folder):
    """metrics.jsonl without the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def read_features(folder):
    return {split: np.load(folder / f"{split}_features.npy", allow_pickle=False) for split in ("train", "val", "test")}


def assert_same_run(a, features_a, b, features_b):
    assert metrics(a) == metrics(b)
    for name in ("last.pt", "best.pt", "encoder.pt"):
        ours, theirs = (torch.load(folder / name, weights_only=True)["model"] for folder in (a, b))
        assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours), name
    for split, array in read_features(features_a).items():
        assert (array == read_features(features_b)[split]).all(), split


def test_a_run_leaves_its_files(whole_run):
    folder, features, _ = whole_run
    assert {path.name for path in folder.iterdir()} == {"config.json", "metrics.jsonl", "last.pt", "best.pt", "encoder.pt", "test.json", "tb_log"}
    assert {path.name for path in features.iterdir()} == {"train_features.npy", "val_features.npy", "test_features.npy", "features.json"}
    arrays = read_features(features)
    assert {split: array.shape for split, array in arrays.items()} == {"train": (24, 16), "val": (18, 16), "test": (12, 16)}
    assert all(array.dtype == np.float32 and np.isfinite(array).all() and array.std() > 0 for array in arrays.values())
    lines = metrics(folder)
    assert [(line["epoch"], line["step"]) for line in lines] == [(2, 6), (3, 9)] and all(0 < line["nt_xent"] < 20 for line in lines)
    assert lines[0].keys() == {"epoch", "step", "nt_xent", "2way1shot", "2way5shot"}
    scores = json.loads((folder / "test.json").read_text())
    assert scores.keys() == {"2way1shot", "2way2shot"}
    assert all(0 <= s["accuracy"] <= 100 and s["ci95"] >= 0 and s["episodes"] == 6 for s in scores.values())
    assert any("events" in path.name for path in (folder / "tb_log").iterdir())


def test_features_are_the_encoders_output_in_order(whole_run, data_dir):
    folder, features, _ = whole_run
    encoder = model.Encoder(4)
    encoder.load_state_dict(torch.load(folder / "last.pt", weights_only=True)["model"])
    encoder.eval()
    for split, array in read_features(features).items():
        for i, image in enumerate(np.load(data_dir / f"{split}.npy")):
            x = torch.from_numpy(image).permute(2, 0, 1) / 255
            expected = encoder(TF.normalize(x, data.MEAN, data.STD).unsqueeze(0))
            assert np.allclose(array[i], expected.detach(), atol=1e-4)


def test_export_only_repeats_the_features(whole_run, tmp_path):
    folder, features, flags = whole_run
    place = ["--save-dir", tmp_path / "s", "--feature-save-dir", tmp_path / "f"]
    result = run("simclr", *flags, *place, "--export-only", "--checkpoint", folder / "encoder.pt", "--probe")
    assert result.returncode == 0, result.stderr
    for split, array in read_features(features).items():
        assert (array == read_features(tmp_path / "f")[split]).all()
    assert (tmp_path / "s/test.json").read_text() == (folder / "test.json").read_text()
    said = json.loads((features / "features.json").read_text())
    assert said == json.loads((tmp_path / "f/features.json").read_text())
    assert said == {"train_epochs": 3, "images_per_class": {split: 6 for split in ("train", "val", "test")}}
    result = run("simclr", *flags, "--export-only", "--export", "best", "--save-dir", folder, "--feature-save-dir", tmp_path / "best")
    assert result.returncode == 0, result.stderr
    best, final = (torch.load(folder / name, weights_only=True)["model"] for name in ("best.pt", "last.pt"))
    same = all(best[key].equal(final[key]) for key in best)
    assert (read_features(tmp_path / "best")["test"] == read_features(features)["test"]).all() == same


# Ends itself, as a power cut would, right after the checkpoint of step 5: in the middle of the second epoch.
DIES = """
import os, signal, main
main.SAVE_SECONDS, save = 0, main.save_checkpoint
def save_and_die(path, checkpoint):
    save(path, checkpoint)
    if path.name == "last.pt" and checkpoint["step"] == 5:
        os.kill(os.getpid(), signal.SIGKILL)
main.save_checkpoint = save_and_die
main.main()
"""


def test_kill_and_resume_end_as_if_never_interrupted(whole_run, tmp_path):
    folder, features, flags = whole_run
    flags = [*flags, "--save-dir", tmp_path / "s", "--feature-save-dir", tmp_path / "f"]
    command = [sys.executable, "-c", DIES, *map(str, flags)]
    killed = subprocess.run(command, cwd=ROOT / "simclr", env=os.environ | ONE_THREAD, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL and torch.load(tmp_path / "s/last.pt", weights_only=True)["step"] == 5
    result = run("simclr", *flags, "--resume")
    assert result.returncode == 0, result.stderr
    assert_same_run(folder, features, tmp_path / "s", tmp_path / "f")


def test_a_polite_stop_leaves_a_checkpoint(whole_run, tmp_path):
    folder, features, flags = whole_run
    flags = [*flags, "--save-dir", tmp_path / "s", "--feature-save-dir", tmp_path / "f"]
    command = [sys.executable, "main.py", *map(str, flags)]
    process = subprocess.Popen(command, cwd=ROOT / "simclr", env=os.environ | ONE_THREAD, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "s/tb_log").exists() and process.poll() is None:
        time.sleep(0.005)
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    if process.returncode != 0:  # the run may have ended before the signal came
        assert process.returncode == 128 + signal.SIGTERM and "--resume continues" in errors and "Traceback" not in errors
        assert (tmp_path / "s/last.pt").exists()
    assert run("simclr", *flags, "--resume").returncode == 0
    assert_same_run(folder, features, tmp_path / "s", tmp_path / "f")


def test_the_original_layout_is_prepared_first(whole_run, source_dir, tmp_path):
    folder, features, _ = whole_run
    result = run("simclr", "--data-dir", source_dir, *TINY, "--save-dir", tmp_path / "s", "--feature-save-dir", tmp_path / "f")
    assert result.returncode == 0, result.stderr
    assert_same_run(folder, features, tmp_path / "s", tmp_path / "f")
    assert (tmp_path / "s/data/classes.json").exists()


def test_a_copy_of_the_folder_runs_alone(data_dir, source_dir, tmp_path):
    copy = tmp_path / "mine"
    copy.mkdir()
    for path in (ROOT / "simclr").glob("*.py"):
        (copy / path.name).write_text(path.read_text())
    result = run(copy, "--data-dir", data_dir, "--save-dir", tmp_path / "s", "--feature-save-dir", tmp_path / "f", "--debug", "--way", 2, "--query", 1)
    assert result.returncode == 0, result.stderr
    fails(run(copy, "--data-dir", source_dir, "--save-dir", tmp_path / "s2"), "data/imgnet/prepare.py", source_dir)


def test_contact_sheet(data_dir, tmp_path):
    result = run("simclr", "--data-dir", data_dir, "--contact-sheet", tmp_path / "sheet.png", "--save-dir", tmp_path / "s")
    assert result.returncode == 0, result.stderr
    picture = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert picture.shape == (4 * 84, 10 * 84, 3) and not (tmp_path / "s").exists()
    assert (picture[:84, :84] == np.load(data_dir / "train.npy")[0]).all()


# --- what a user can get wrong --------------------------------------------------------------------


def fails_here(capsys, monkeypatch, words, *args):
    """As `fails`, in this process: the import of torch would be most of a run."""
    main = load("simclr", "main")
    monkeypatch.setattr(sys, "argv", ["main.py", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        main.main()
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1, lines
    assert all(str(word) in lines[0] for word in words), lines[0]


@pytest.mark.parametrize("words, flags", [
    (["--device", "nonsense"], ["--device", "nonsense"]),
    (["--batch-size", "1 found"], ["--batch-size", 1]),
    (["--lr", "-1"], ["--lr=-1"]),
    (["--temperature"], ["--temperature", 0]),
    (["--checkpoint goes with --export-only"], ["--checkpoint", "x.pt"]),
    (["--export", "middle"], ["--export", "middle"]),
    (["24 images found, at least --batch-size 25"], ["--batch-size", 25]),
    (["val.npy: 6 images a class, expected at least 7"], ["--query", 2]),
    (["val.npy: 3 classes, expected at least 4"], ["--way", 4]),
    (["test.npy: 6 images a class, expected at least 51"], ["--probe", "--test-shot", 1, 50]),
    (["x.pt: not found"], ["--export-only", "--checkpoint", "x.pt"]),
    (["last.pt: not found"], ["--export-only"]),
])  # fmt: skip
def test_wrong_flags(capsys, monkeypatch, data_dir, tmp_path, words, flags):
    fails_here(capsys, monkeypatch, words, "--data-dir", data_dir, *TINY, "--save-dir", tmp_path / "s", "--feature-save-dir", tmp_path / "f", *flags)
    assert not (tmp_path / "f").exists() and not (tmp_path / "s/last.pt").exists()


def test_wrong_data(capsys, monkeypatch, data_dir, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    arrays = {path.stem: np.load(path) for path in data_dir.glob("*.npy")}
    labels = arrays["train_labels"]
    for name, bad, words in (
        ("train", None, ["train.npy: not found", "prepare.py"]),
        ("val", arrays["val"][..., 0], ["val.npy: shape (18, 84, 84)"]),
        ("train", arrays["train"].astype(np.float32), ["train.npy: dtype float32"]),
        ("test", np.array([{"a": 1}]), ["test.npy: not a readable .npy array"]),
        ("train_labels", None, ["train_labels.npy: not found"]),
        ("train_labels", labels[:-1], ["train_labels.npy: int64 of shape (23,)", "24 images"]),
        ("train_labels", labels + 0.5, ["train_labels.npy: float64"]),
        ("train_labels", np.roll(labels, 1), ["4 classes in 5 runs"]),
        ("train_labels", np.maximum(labels, 1), ["classes of 6 to 12 images"]),
    ):
        for other, array in arrays.items():
            np.save(folder / f"{other}.npy", array)
        (folder / f"{name}.npy").unlink()
        if bad is not None:
            np.save(folder / f"{name}.npy", bad)
        fails_here(capsys, monkeypatch, words, "--data-dir", folder, *TINY, "--save-dir", tmp_path / "s")
        assert not (tmp_path / "s").exists()


def test_folders_and_checkpoints_that_are_taken_or_foreign(capsys, monkeypatch, whole_run, tmp_path):
    folder, features, flags = whole_run
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    place = [*flags, "--save-dir", folder, "--feature-save-dir", tmp_path / "f"]
    fails_here(capsys, monkeypatch, ["holds another run", "--resume"], *place)
    fails_here(capsys, monkeypatch, ["--lr: 0.1 found, 0.001 expected"], *place, "--resume", "--lr", 0.1)
    fails_here(capsys, monkeypatch, ["holds a training run"], *place, "--export-only", "--checkpoint", folder / "best.pt")
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    foreign = tmp_path / "foreign.pt"
    for content, words in ((b"garbage", "not a readable checkpoint"), ({"model": {}, "sizes": {"latent_size": 3}}, "not a checkpoint of this experiment")):
        foreign.write_bytes(content) if isinstance(content, bytes) else torch.save(content, foreign)
        fails_here(capsys, monkeypatch, [foreign, words], *flags, "--save-dir", tmp_path / "s", "--export-only", "--checkpoint", foreign)


def test_errors_end_in_one_line_in_a_process_of_its_own(source_dir, tmp_path):
    fails(run("simclr", "--data-dir", tmp_path / "none", "--save-dir", tmp_path / "s"), "none/train.npy: not found")
    broken = tmp_path / "broken"
    broken.mkdir()
    for split in ("train", "val", "test"):
        (broken / f"{split}.csv").write_text((source_dir / f"{split}.csv").read_text())
    fails(run("simclr", "--data-dir", broken, "--save-dir", tmp_path / "s"), "train.csv: 24 of 24 images missing")
    assert not (tmp_path / "s").exists()


# --- real images ----------------------------------------------------------------------------------


@needs_shared_data
def test_the_chain_on_real_images(tmp_path):
    """A few hundred real images, as they lie in the zips: prepared, trained on for four steps, exported, probed."""
    source, members = tmp_path / "source", 20
    source.mkdir()
    archives = [zipfile.ZipFile(path) for path in sorted((shared_data / "imgnet").glob("*.zip"))]
    places = {name.split("/")[-1]: archive for archive in archives for name in archive.namelist()}
    with zipfile.ZipFile(source / "images.zip", "w") as out:
        for split in ("train", "val", "test"):
            lines = (shared_data / f"imgnet/{split}.csv").read_text().splitlines()
            rows = [line for c in range(5) for line in lines[1 + 600 * c : 1 + 600 * c + members]]
            (source / f"{split}.csv").write_text("\n".join([lines[0], *rows]) + "\n")
            for row in rows:
                name = "images/" + row.split(",")[0]
                out.writestr(name, places[name.split("/")[-1]].read(name))
    place = ["--save-dir", tmp_path / "s", "--feature-save-dir", tmp_path / "f"]
    result = run("simclr", "--data-dir", source, *place, "--debug", "--hidden-size", 16, "--probe", "--test-shot", 1, 5)
    assert result.returncode == 0, result.stderr
    assert {split: array.shape for split, array in read_features(tmp_path / "f").items()} == dict.fromkeys(("train", "val", "test"), (100, 64))
    assert json.loads((tmp_path / "s/test.json").read_text())["5way5shot"]["accuracy"] > 20  # chance
