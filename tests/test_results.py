"""results/: the tables agree with it, its commands are ones, its checkpoints score what it says."""

import json
import re
import shlex
import shutil

import numpy as np
import pytest
import torch

from conftest import ROOT, fails, load, needs_shared_data, run, shared_data

ablations = load("results", "ablations")
RESULTS, name_of, read_json = ablations.RESULTS, ablations.name_of, ablations.read_json
OMNIGLOT = sorted(path.parent for path in RESULTS.glob("omniglot/*/seed*/test.json"))
MIMGNET = sorted(path.parent for path in RESULTS.glob("mimgnet/*/seed*/test.json"))
KEPT = [folder for folder in OMNIGLOT if list(folder.glob("*best.pt"))]
ENCODERS = sorted(RESULTS.glob("simclr/*/seed*/encoder.pt"))


def test_tables_agree_with_results():
    result = run("results", "--check", script="table.py")
    assert result.returncode == 0, result.stderr


def test_an_old_table_is_said_and_not_written(monkeypatch):
    table, written = load("results", "table"), []
    monkeypatch.setattr(table, "filled", lambda text, tables: text + "x")
    monkeypatch.setattr(table, "save", lambda path, _: written.append(path))
    monkeypatch.setattr("sys.argv", ["table.py", "--check"])
    with pytest.raises(SystemExit, match="results/bench/README.md: the result table disagrees"):
        table.main()
    assert not written


def test_the_curves_are_those_of_the_runs(monkeypatch):
    curves, kept = load("results", "curves"), []
    monkeypatch.setattr(curves, "save_figure", lambda path, figure: kept.append(figure))
    monkeypatch.setattr("sys.argv", ["curves.py"])
    curves.main()
    for way, axes in ((5, kept[0].axes[:4]), (20, kept[0].axes[4:])):
        text = (RESULTS / f"omniglot/published-{way}way/seed0/metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        drawn = [list(ax.lines[0].get_ydata()) for ax in axes]
        found = [[line[f"{way}way{shot}shot"]["accuracy"] for line in lines] for shot in (1, 5)]
        assert drawn == [*found, *([line[term] for line in lines] for term in ("reconstruction", "kl"))]


@pytest.mark.parametrize("script", ["table.py", "curves.py", "halve.py"])
def test_a_script_without_flags_does_nothing_for_one(script):
    fails(run("results", "--nonsense", script=script), f"{script}: error: unrecognized arguments: --nonsense")


def test_a_cell_says_what_it_differs_by_or_that_it_was_not_run():
    """A run has the published flags and two seeds at 5 ways; a single fast one is at 20."""
    table, parse = load("results", "table"), load("omniglot", "main").parse_args

    def fake(flags, accuracies):
        test = {cell: {"accuracy": accuracy, "ci95": 0.5} for cell, accuracy in accuracies.items()}
        made = {"args": vars(parse(flags.split())), "device": "a GPU", "seconds": 90.0}
        return made | {"test": test, "baselines": {}}

    seed0 = fake("", {"5way1shot": 94.0, "5way5shot": 97.0})
    seed1 = fake("--seed 1", {"5way1shot": 95.0, "5way5shot": 97.0})
    flags = "--way 20 --sample-size 300 --kl-warmup-iters 9 --train-iters 50"
    other = fake(flags, {"20way1shot": 80.0, "20way5shot": 90.0})
    runs = {"omniglot/5way": [seed0, seed1], "omniglot/20way-fast": [other]}
    missing, published, fast, *_ = table.rows("omniglot", runs)
    assert missing[1] == {"20way1shot": "not run", "20way5shot": "not run"}
    assert published[0] == "published"
    assert published[1]["5way1shot"] == "94.50 (-0.42)<br>94.00 ± 0.50, 95.00 ± 0.50"
    assert published[1].keys() == {"5way1shot", "5way5shot"}
    assert fast[0] == "fast" and "50 steps in 90 s" in fast[2]
    assert fast[1] == {
        "20way1shot": "80.00 ± 0.50 (-2.21)", "20way5shot": "90.00 ± 0.50 (-0.61)",
    }  # fmt: skip
    assert table.recipe("omniglot", fake("--way 10", {})) == "another: way 10"
    one, other, *rest = [("a", {5: 1}, "x"), ("a", {20: 2}, "y"), ("a", {5: 3}, "z"), ("b", {20: 4}, "")]
    assert table.joined([one, other, *rest]) == [("a", {5: 1, 20: 2}, "x<br>y"), *rest]


def test_features_of_changed_views_are_not_the_published_ones():
    published, flags = load("results", "published"), vars(load("simclr", "main").parse_args([]))
    assert published.encoder(flags) == published.encoder({}) == ""
    for name in ("crop_scale", "jitter", "hue", "neighbours", "feature_size", "lda"):
        assert published.encoder(flags | {name: 0.5}).endswith(f", {name} 0.5")


CALLS = [("README.md", 4), ("results/README.md", 12), ("results/bench/README.md", 2)]
CALLS += [("data/folder/README.md", 2)]


@pytest.mark.parametrize("name, least", CALLS)
def test_the_commands_are_understood(name, least, monkeypatch):
    """Parse every call of main.py, figures.py and bench.py in a README as the folder it is in does."""
    text = (ROOT / name).read_text().replace("\\\n", "")
    found, folder = 0, None
    for entered, script, flags in re.findall(r"\bcd (\w+)|python (main|figures|bench)\.py([^\n`#)]*)", text):
        folder = entered or folder
        if script and "--help" not in flags:
            monkeypatch.chdir(ROOT / (folder or "."))  # where @recipes are
            parse = load("." if script == "bench" else folder, script).parse_args
            args = parse(shlex.split(flags))  # leaves with status 2 if a flag is not known
            if (folder, script) == ("omniglot", "main"):
                assert max(args.test_shot) + args.query <= 20, flags  # drawings of a character
            found += 1
    assert found >= least


def test_the_python_of_the_readme(tmp_path):
    """Five lines classify images with the shipped weights."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert len(code.splitlines()) <= 5
    given = "import torch\nsupport, query = torch.rand(5, 1, 28, 28, 1), torch.rand(75, 28, 28, 1)\n"
    code = code.replace("model.predict(", "found = model.predict(")
    asked = "print(found.shape, found.sum(1).allclose(torch.ones(75)))"
    result = run("omniglot", given + code + asked, script="-c")
    assert result.stdout == "torch.Size([75, 5]) True\n", result.stderr


def test_a_run_goes_on_from_its_shipped_weights(glyphs_dir, tmp_path):
    folder, again = tmp_path / "shipped", tmp_path / "again"
    tiny = "--hidden-size 4 --latent-size 4 --batch-size 2 --sample-size 10 --train-mc-sample-size 2"
    tiny += " --test-mc-sample-size 2 --eval-episodes 5 --freq-iters 3 --train-iters"
    flags = ["--data-dir", glyphs_dir, *tiny.split()]
    assert run("omniglot", "--save-dir", folder, *flags, 3).returncode == 0
    shutil.rmtree(folder / "tb_log")
    (folder / "last.pt").unlink()
    shipped, older = (torch.load(folder / f"{shot}shot_best.pt", weights_only=True) for shot in (5, 1))
    older["model"] = {name: value * 2 for name, value in older["model"].items()}
    torch.save(older | {"step": 2}, folder / "1shot_best.pt")
    assert run("results", folder, "--out", again, script="restart.py").returncode == 0
    last, validated = torch.load(again / "last.pt", weights_only=True), folder / "metrics.jsonl"
    assert not last["generator"].equal(torch.Generator().manual_seed(2**31).get_state())  # nor the same sets
    assert all(last["model"][name].equal(value) for name, value in shipped["model"].items())
    (group,) = last["optimizer"]["param_groups"]
    assert (group["lr"], group["weight_decay"]) == (1e-3, 1e-6)
    assert last["seconds"] == json.loads(validated.read_text())["seconds"]
    assert run("omniglot", "--save-dir", again, "--resume", *flags, 6).returncode == 0
    before, after = ((place / "metrics.jsonl").read_text().splitlines() for place in (folder, again))
    assert after[:1] == before and json.loads(after[1])["step"] == 6
    assert read_json(again / "config.json")["restarted"] == [3]
    other = tmp_path / "bf16"
    assert run("results", folder, "--out", other, "--precision", "bf16", script="restart.py").returncode == 0
    config, bf16 = read_json(other / "config.json"), ["--precision", "bf16"]
    assert (config["precision"], config["precision_until"]) == ("bf16", {"3": "fp32"})
    assert run("omniglot", "--save-dir", other, "--resume", *flags, 6, *bf16).returncode == 0
    fails(run("results", folder, "--out", again, script="restart.py"), "--out", again)
    fails(run("results", folder, "--out", folder, script="restart.py"), "--out", folder)
    fails(run("results", folder, "--out", "/dev/null/a", script="restart.py"), "--out", "/dev/null/a")
    fails(run("results", tmp_path, "--out", tmp_path / "other", script="restart.py"), "no run found")
    features = RESULTS / "simclr/neighbours/seed0"
    fails(run("results", features, "--out", tmp_path / "other", script="restart.py"), features, "[None")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"ema_decay": 0.0', '"ema_decay": 0.9'))
    fails(run("results", folder, "--out", tmp_path / "other", script="restart.py"), folder, "--ema-decay")
    (folder / "config.json").write_text(config)
    for path in folder.glob("*best.pt"):
        path.unlink()
    fails(run("results", folder, "--out", tmp_path / "other", script="restart.py"), folder, "step 3")
    (folder / "metrics.jsonl").write_text("")
    result = run("results", folder, "--out", tmp_path / "other", script="restart.py")
    fails(result, "metrics.jsonl: no validation")


def test_other_data_are_the_test_split_resized_otherwise_and_parts_of_it(monkeypatch):
    other = load("results", "other_data")
    ours = np.arange(13 * 4, dtype=np.uint8).reshape(52, 1, 1, 1, 1)
    monkeypatch.setattr(other.prepare, "prepare", lambda _: ({"test": ours + other.prepare.RESAMPLING}, {}))
    found = {name: images.flatten() for name, images in other.variants("there")}
    filters = other.prepare.Image.Resampling
    lanczos, bilinear = found["resized: lanczos"], found["resized: bilinear"]
    assert (lanczos - bilinear).unique() == filters.LANCZOS - filters.BILINEAR
    parts = [found[f"sixth {i}"] for i in range(1, 7)]
    assert torch.equal(torch.cat(parts), lanczos[: 12 * 4]) and {len(part) for part in parts} == {8}


@pytest.mark.parametrize("folder", OMNIGLOT + MIMGNET, ids=name_of)
def test_a_run_says_how_it_was_made(folder):
    config = read_json(folder / "config.json")
    assert config["command"].startswith("python main.py") and config["device"] and config["versions"]["torch"]
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == config["args"]["train_iters"]
    assert config["args"]["seed"] == int(folder.name.removeprefix("seed"))
    for checkpoint in folder.glob("*best.pt"):
        kept = torch.load(checkpoint, map_location="cpu", weights_only=True)
        numbers = sum(value.numel() for value in kept["model"].values())
        assert checkpoint.stat().st_size <= 2 * numbers + 5e4  # two bytes each: halved, and nothing besides
        assert kept.keys() >= {"model", "sizes", "step"} and kept.get("way", 5) == config["args"]["way"]


def test_the_last_weights_are_kept_unless_they_are_the_best(tmp_path):
    for best, kept in ((2, True), (3, False)):
        (folder := tmp_path / str(best)).mkdir()
        for name, step in (("last.pt", 3), ("1shot_best.pt", 1), ("5shot_best.pt", best)):
            torch.save({"model": {}, "sizes": {}, "way": 5, "step": step, "optimizer": {}}, folder / name)
        load("results", "halve").keep_last(folder / "last.pt")
        assert (folder / "weights.pt").exists() == kept
    last = torch.load(tmp_path / "2/last.pt", weights_only=True) | {"average": {}}  # of --ema-decay
    (tmp_path / "2/weights.pt").unlink()
    torch.save(last, tmp_path / "2/last.pt")
    load("results", "halve").keep_last(tmp_path / "2/last.pt")
    assert not (tmp_path / "2/weights.pt").exists()


def test_time_to_paper_fails_below_the_paper(monkeypatch):
    program = load("results", "time_to_paper")
    monkeypatch.setattr("sys.argv", ["time_to_paper.py"])
    for more in (1, -1):
        found = {cell: accuracy + more for cell, accuracy in program.PAPER.items()}
        monkeypatch.setattr(program, "run", lambda *_: (1.0, found))
        with pytest.raises(SystemExit) as end:
            program.main()
        assert end.value.code == (more < 0)


def test_time_to_paper_trains_three_seeds_of_the_quick_recipe(tmp_path, monkeypatch):
    program, calls = load("results", "time_to_paper"), []

    def main_py(experiment, data_dir, *flags):
        calls.append((experiment, data_dir, *flags[:2], *flags[3:]))
        (folder := tmp_path / f"seed{flags[-1]}").mkdir()
        (folder / "metrics.jsonl").write_text('{"seconds": 1.0}\n')
        low = 10 * (flags[-1] == 2)  # the last seed is below the paper
        cells = {cell: {"accuracy": accuracy + 1 - low} for cell, accuracy in program.PAPER.items()}
        (folder / "test.json").write_text(json.dumps(cells))

    monkeypatch.setattr(program, "main_py", main_py)
    monkeypatch.setattr("sys.argv", ["", "--out", str(tmp_path), "--data-dir", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        program.main()
    how = "omniglot", tmp_path, "@recipes/quick.txt", "--save-dir", "--seed"
    assert end.value.code == 1 and calls == [(*how, seed) for seed in range(3)]


def test_halved_weights(tmp_path):
    halve, path = load("results", "halve"), tmp_path / "best.pt"
    weights = {"weight": torch.tensor([1.0, 1e-3, 60000.0]), "count": torch.tensor(70000)}
    weights["norm.running_var"] = torch.tensor([1.0001])
    torch.save({"model": weights, "step": 3}, path)
    for _ in range(2):
        halve.halve(path)
        found = torch.load(path, weights_only=True)
        assert found["step"] == 3 and found["model"]["count"].equal(weights["count"])
        assert found["model"]["weight"].equal(weights["weight"].half())
        assert found["model"]["norm.running_var"].equal(weights["norm.running_var"])
    torch.save({"model": {"weight": torch.tensor([70000.0])}}, path)
    with pytest.raises(halve.UserError, match="best.pt: weights beyond float16"):
        halve.halve(path)


@pytest.mark.parametrize(
    "made, recipes",
    {
        "omniglot/canonical": ["canonical"], "omniglot/quick": ["quick"],
        "omniglot/published-5way": ["published-5way"], "omniglot/published-20way": ["published-20way"],
        "mimgnet/tied-full": ["prototypical"], "mimgnet/neighbours": ["prototypical"],
        "simclr/prototypical-lda": ["prototypical"], "simclr/neighbours": ["prototypical", "neighbours"],
    }.items(),
)  # fmt: skip
def test_a_run_has_the_flags_of_its_recipe(made, recipes):
    folder = made.split("/")[0]
    parse, args = load(folder, "main").parse_args, read_json(RESULTS / made / "seed0/config.json")["args"]
    default = vars(parse([]))
    given = vars(parse([f"@{ROOT / folder / 'recipes' / name}.txt" for name in recipes]))
    changed = {name for name in given if given[name] != default[name]} - {"precision"}
    assert {name: args[name] for name in changed} == {name: given[name] for name in changed}
    assert changed or recipes == ["published-5way"]


def assert_same_test(folder, out):
    """Hold the same cells from the same episodes together: only rounding may differ."""
    said, again = (read_json(place / "test.json") for place in (folder, out))
    assert again and all(again[name]["episodes"] == said[name]["episodes"] for name in again)
    for name in again:
        assert abs(again[name]["accuracy"] - said[name]["accuracy"]) < 0.05, name


@needs_shared_data
@pytest.mark.parametrize("folder", KEPT, ids=name_of)
def test_its_checkpoints_score_what_it_says(folder, omniglot_dir, tmp_path):
    args = read_json(folder / "config.json")["args"]
    shots = [1, 5] if args["way"] == 5 else [1]  # twenty ways take a minute for each
    flags = ["--eval-only", "--checkpoint", folder, "--test-shot", *shots, "--e-step", args["e_step"]]
    result = run("omniglot", "--data-dir", omniglot_dir, "--save-dir", tmp_path / "eval", *flags, timeout=300)
    assert result.returncode == 0, result.stderr
    assert_same_test(folder, tmp_path / "eval")


@needs_shared_data
@pytest.mark.parametrize("path", ENCODERS, ids=name_of)
def test_the_encoder_makes_the_features_that_were_tested(path, tmp_path):
    """Go from the real test images through an encoder.pt to one-shot accuracies on its features."""
    prepare, export = load("data/imgnet", "prepare"), load("simclr", "export")
    encoder = load("simclr", "model").load_model(path)
    trained_on = {folder: read_json(folder / "config.json")["features"] for folder in MIMGNET}
    crc32 = export.checksum(encoder)
    runs = [folder for folder in MIMGNET if trained_on[folder].get("encoder_crc32") == crc32]
    runs = [folder for folder in runs if (folder / "best.pt").exists()]
    if not runs:  # it is the start of another one
        configs = [read_json(config) for config in RESULTS.glob("simclr/*/seed*/config.json")]
        assert crc32 in [config.get("init_crc32") for config in configs]
        return
    source = shared_data / "imgnet"
    rows, (found, _) = prepare.read_csv(source / "test.csv"), prepare.find_images(source)
    images = np.stack([prepare.decode(found[name]) for name, _ in rows])
    images = torch.from_numpy(images).unflatten(0, (20, 600))
    features = export.encode_all(encoder, images, trained_on[runs[0]]["feature_size"])
    np.save(tmp_path / "test_features.npy", features.flatten(0, 1).numpy())
    for folder in runs:
        out = tmp_path / name_of(folder)
        flags = ["--eval-only", "--checkpoint", folder, "--test-shot", 1, "--images-per-class", 600]
        flags += ["--e-step", read_json(folder / "config.json")["args"]["e_step"]]
        result = run("mimgnet", "--data-dir", tmp_path, "--save-dir", out, *flags, timeout=300)
        assert result.returncode == 0, result.stderr
        assert_same_test(folder, out)
