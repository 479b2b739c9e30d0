"""What is committed under results/: the tables agree with it, its commands are ones, its checkpoints score
what it says."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT, load, needs_shared_data, run, shared_data

OMNIGLOT, MIMGNET = (
    sorted(path.parent for path in (ROOT / "results").glob(f"{name}/*/seed*/test.json"))
    for name in ("omniglot", "mimgnet")
)
RUNS = OMNIGLOT + MIMGNET


def name_of(folder):
    """'omniglot/canonical/seed0' of a run's folder."""
    return folder.relative_to(ROOT / "results").as_posix()


def test_tables_agree_with_results():
    check = subprocess.run(
        [sys.executable, "results/table.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert check.returncode == 0, check.stderr


def test_a_cell_says_what_it_differs_by_or_that_it_was_not_run():
    """Of a run with the published flags and two seeds at 5 ways, and a single fast one at 20."""
    table, parse = load("results", "table"), load("omniglot", "main").parse_args

    def fake(flags, **accuracies):
        test = {cell: {"accuracy": accuracy, "ci95": 0.5} for cell, accuracy in accuracies.items()}
        made = {"args": vars(parse(flags.split())), "device": "a GPU", "seconds": 90.0}
        return made | {"test": test, "baselines": {}}

    runs = {
        "omniglot/5way": [
            fake("", **{"5way1shot": 94.0, "5way5shot": 97.0}),
            fake("--seed 1", **{"5way1shot": 95.0, "5way5shot": 97.0}),
        ],
        "omniglot/20way-fast": [
            fake(
                "--way 20 --sample-size 300 --kl-warmup-iters 9 --train-iters 50",
                **{"20way1shot": 80.0, "20way5shot": 90.0},
            )
        ],
    }
    missing, published, fast = table.rows("omniglot", runs)
    assert missing[1] == {"20way1shot": "not run", "20way5shot": "not run"}
    assert (
        published[0] == "published"
        and published[1]["5way1shot"] == "94.50 (-0.42)<br>94.00 ± 0.50, 95.00 ± 0.50"
        and "20way1shot" not in published[1]
    )
    assert (
        fast[0] == "fast"
        and fast[1]
        == {"20way1shot": "80.00 (-2.21)<br>80.00 ± 0.50", "20way5shot": "90.00 (-0.61)<br>90.00 ± 0.50"}
        and "50 steps in 2 min" in fast[2]
    )


@pytest.mark.parametrize(
    "name, least", [("README.md", 6), ("results/README.md", 12), ("results/bench/README.md", 2)]
)
def test_the_commands_are_understood(name, least, monkeypatch):
    """Every call of main.py, figures.py and bench.py in a README, by the parser of the folder it is in."""
    text = (ROOT / name).read_text().replace("\\\n", "")
    found, folder = 0, None
    for entered, script, flags in re.findall(r"\bcd (\w+)|python (main|figures|bench)\.py([^\n`#)]*)", text):
        folder = entered or folder
        if script and "--help" not in flags:
            monkeypatch.chdir(ROOT / (folder or "."))  # where @recipes are
            args = load("." if script == "bench" else folder, script).parse_args(
                shlex.split(flags)
            )  # leaves with status 2 if it is not
            if (folder, script) == ("omniglot", "main"):
                assert max(args.test_shot) + args.query <= 20, flags  # drawings of a character
            found += 1
    assert found >= least


def test_the_python_of_the_readme(tmp_path):
    """Five lines classify images with the shipped weights."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert len(code.splitlines()) <= 5
    given = "import torch\nsupport, query = torch.rand(5, 1, 28, 28, 1), torch.rand(75, 28, 28, 1)\n"
    asked = (
        code.replace("model.predict(", "found = model.predict(")
        + "print(found.shape, found.sum(1).allclose(torch.ones(75)))"
    )
    result = run("omniglot", given + asked, script="-c")
    assert result.stdout == "torch.Size([75, 5]) True\n", result.stderr


def test_the_ablations_are_flags():
    ablations = load("results", "ablations")
    parsers = {experiment: load(experiment, "main").parse_args for experiment in ("omniglot", "mimgnet")}
    for flags in [ablations.WAYS, *ablations.TEST]:
        parsers["omniglot"](flags.split())
    for experiment, trainings in ablations.TRAIN.items():
        base = ablations.BASE[experiment]
        for name, flags in trainings.items():
            before, after = (vars(parsers[experiment](text.split())) for text in (base, f"{base} {flags}"))
            assert sum(value != before[key] for key, value in after.items()) == (1 if flags else 0), name


def test_a_dimension_is_active_when_its_signal_is_above_its_noise():
    ablations = load("results", "ablations")
    log_var = torch.tensor([0.02, 0.5, 1.0, 4.0]).log().expand(1000, -1)
    scale = torch.tensor([1.0, 0.5, 0.0, 3.0])  # of the means: variance 1, 0.25, 0 and 9
    mean = 7 + scale * torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    assert ablations.active_dims(mean, log_var) == 2


def test_other_ways_are_of_the_runs_themselves():
    ablations = load("results", "ablations")
    for name, variants in ablations.tested().items():
        if name.startswith("omniglot/"):
            found, said = (
                variants[ablations.WAYS],
                json.loads((ROOT / "results" / name / "test.json").read_text()),
            )
            for cell in said:
                assert abs(found[cell]["accuracy"] - said[cell]["accuracy"]) < 0.05, (name, cell)


@needs_shared_data
def test_the_active_dimensions_are_those_of_the_checkpoints(omniglot_dir, tmp_path):
    for script in ("results", "omniglot"):
        shutil.copytree(
            ROOT / script,
            tmp_path / script,
            ignore=shutil.ignore_patterns("runs", "ablations", "mimgnet*", "bench"),
        )
    script = tmp_path / "results/ablations.py"
    result = subprocess.run(
        [sys.executable, script, "active", "--data-dir", omniglot_dir], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    found, said = (
        json.loads((place / "results/ablations/active.json").read_text()) for place in (tmp_path, ROOT)
    )
    assert found and all(said.get(name) == counts for name, counts in found.items()), (
        "to be written again by ablations.py active"
    )


@pytest.mark.parametrize("folder", RUNS, ids=name_of)
def test_a_run_says_how_it_was_made(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["command"].startswith("python main.py") and config["device"] and config["versions"]["torch"]
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == config["args"]["train_iters"]
    for checkpoint in folder.glob("*best.pt"):
        kept = torch.load(checkpoint, map_location="cpu", weights_only=True)
        numbers = sum(value.numel() for value in kept["model"].values())
        assert checkpoint.stat().st_size <= 2 * numbers + 5e4  # two bytes each: halved, and nothing besides
        assert kept.keys() >= {"model", "sizes", "step"} and kept.get("way", 5) == config["args"]["way"]


def test_halved_weights(tmp_path):
    halve, path = load("results", "halve"), tmp_path / "best.pt"
    weights = {"weight": torch.tensor([1.0, 1e-3, 60000.0]), "count": torch.tensor(70000)}
    torch.save({"model": weights, "step": 3}, path)
    for _ in range(2):
        halve.halve(path)
        found = torch.load(path, weights_only=True)
        assert (
            found["step"] == 3
            and found["model"]["weight"].equal(weights["weight"].half())
            and found["model"]["count"].equal(weights["count"])
        )
    torch.save({"model": {"weight": torch.tensor([70000.0])}}, path)
    with pytest.raises(halve.UserError, match="best.pt: weights beyond float16"):
        halve.halve(path)


def assert_same_test(folder, out):
    """The same cells from the same episodes, so that only rounding may differ."""
    said, again = (json.loads((place / "test.json").read_text()) for place in (folder, out))
    assert again and all(again[name]["episodes"] == said[name]["episodes"] for name in again)
    for name in again:
        assert abs(again[name]["accuracy"] - said[name]["accuracy"]) < 0.05, name


@needs_shared_data
@pytest.mark.parametrize("folder", [path for path in OMNIGLOT if list(path.glob("*best.pt"))], ids=name_of)
def test_its_checkpoints_score_what_it_says(folder, omniglot_dir, tmp_path):
    shots = [1, 5] if folder.parent.name == "5way-long" else [1]  # twenty ways take a minute for each
    flags = ["--eval-only", "--checkpoint", folder, "--test-shot", *shots]
    flags += ["--e-step", load("omniglot", "runtime").read_config(folder)["args"]["e_step"]]
    result = run("omniglot", "--data-dir", omniglot_dir, "--save-dir", tmp_path / "eval", *flags, timeout=300)
    assert result.returncode == 0, result.stderr
    assert_same_test(folder, tmp_path / "eval")


@needs_shared_data
@pytest.mark.parametrize(
    "name", sorted(name_of(path.parent) for path in (ROOT / "results").glob("simclr/*/seed*/encoder.pt"))
)
def test_the_encoder_makes_the_features_that_were_tested(name, tmp_path):
    """From the real test images through results/<name>/encoder.pt to one-shot accuracies on its features."""
    prepare = load("data/imgnet", "prepare")
    rows, (found, _) = (
        prepare.read_csv(shared_data / "imgnet/test.csv"),
        prepare.find_images(shared_data / "imgnet"),
    )
    images = torch.from_numpy(np.stack([prepare.decode(found[name]) for name, _ in rows])).unflatten(
        0, (20, 600)
    )
    runtime, path = load("simclr", "runtime"), ROOT / "results" / name / "encoder.pt"
    encoder, checkpoint = load("simclr", "model").load_model(path), runtime.load_checkpoint(path)
    about = {"train_epochs": checkpoint["epoch"], **checkpoint.get("training", {})}
    trained_on = {folder: runtime.read_config(folder)["features"] for folder in MIMGNET}
    runs = [folder for folder, features in trained_on.items() if about.items() <= features.items()]
    runs = [folder for folder in runs if (folder / "best.pt").exists()]
    size = {trained_on[folder].get("feature_size", 84) for folder in runs}
    assert len(size) == 1
    features = load("simclr", "export").encode_all(encoder, images, *size)
    np.save(tmp_path / "test_features.npy", features.flatten(0, 1).numpy())
    for folder in runs:
        flags = ["--eval-only", "--checkpoint", folder, "--test-shot", 1, "--images-per-class", 600]
        result = run(
            "mimgnet", "--data-dir", tmp_path, "--save-dir", tmp_path / name_of(folder), *flags, timeout=300
        )
        assert result.returncode == 0, result.stderr
        assert_same_test(folder, tmp_path / name_of(folder))
