"""results/ablations.py: its trainings and tests are of what they say, and its counts are right."""

import json
import shutil
import signal
import subprocess

import pytest
import torch

from conftest import ROOT, load, needs_shared_data, run
from test_results import RESULTS, read_json

ablations = load("results", "ablations")


def test_the_ablations_are_flags():
    parsers = {experiment: load(experiment, "main").parse_args for experiment in ("omniglot", "mimgnet")}
    for flags in [ablations.WAYS, *ablations.TEST]:
        parsers["omniglot"](flags.split())
    for experiment, trainings in ablations.TRAIN.items():
        base = ablations.BASE[experiment]
        for name, flags in trainings.items():
            before, after = (vars(parsers[experiment](text.split())) for text in (base, f"{base} {flags}"))
            assert sum(value != before[key] for key, value in after.items()) == (1 if flags else 0), name
    for base, changes in ablations.SEEDS.values():
        base = base.replace("@", f"@{ROOT}/omniglot/")
        for name, flags in changes.items():
            before, after = (vars(parsers["omniglot"](f"{base} {text}".split())) for text in ("", flags))
            assert sum(value != before[key] for key, value in after.items()) == (1 if flags else 0), name
            assert flags or name in (*ablations.CODE, "all")


def test_an_ablation_tests_one_run_and_trains_what_is_not_finished(tmp_path, monkeypatch):
    calls, kept = [], "mimgnet/neighbours/seed0"

    def main_py(experiment, data_dir, *flags, code=None):
        calls.append([experiment, data_dir, *map(str, flags)])
        if "--eval-only" in flags:
            out = flags[flags.index("--save-dir") + 1]
            (ROOT / out / "test.json").write_text(json.dumps({"of": flags[-1]}))

    monkeypatch.setattr(ablations, "main_py", main_py)
    monkeypatch.setattr(ablations, "OUT", tmp_path)
    ablations.test(kept, ["--no-set-attention", ablations.WAYS], "data")
    for call, last in zip(calls, ("--no-set-attention", f"--e-step tied-full {ablations.WAYS}"), strict=True):
        assert call[:5] == ["mimgnet", "data", "--eval-only", "--checkpoint", str(RESULTS / kept)]
        assert " ".join(call[7:]) == f"--test-shot 1 5 {last}"
    found = {"--no-set-attention": {"of": "--no-set-attention"}, ablations.WAYS: {"of": "20"}}
    assert read_json(tmp_path / f"{kept}.json") == found
    (tmp_path / "seed-1").mkdir()
    (tmp_path / "seed-1/test.json").write_text("{}")
    calls.clear()
    ablations.train(["seed-1", "seed-2"], None)
    ablations.train_seeds("decoded", ["one"], None)
    ends = [("--seed 2", "seed-2")]
    ends += [(f"--seed {n} --decode-samples 1", f"decoded/one/seed{n}") for n in range(3)]
    for call, (flags, folder) in zip(calls, ends, strict=True):
        assert " ".join(call[2:]).endswith(f"{flags} --save-dir ../results/ablations/{folder} --resume")


def test_an_ablation_by_code_runs_it_on_the_data_given(tmp_path, monkeypatch):
    ran, done = [], subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(ablations, "OUT", tmp_path)
    monkeypatch.setattr(ablations.subprocess, "run", lambda command, cwd: ran.append((command, cwd)) or done)
    ablations.train_seeds("ours", ["input-canonical", "kl-weight-1"], ROOT / "data/mine")
    programs = [["-c", ablations.CODE["input-canonical"]]] * 3 + [["main.py"]] * 3
    for (command, cwd), program in zip(ran, programs, strict=True):
        given = command[1 : len(program) + 3]
        assert cwd == ROOT / "omniglot" and given == [*program, "--data-dir", "../data/mine"]


INTERRUPTED = """
import os, signal, sys, time
try:
    for pid in os.getppid(), os.getpid():  # as Ctrl-C does
        os.kill(pid, signal.SIGINT)
    time.sleep(9)
except KeyboardInterrupt:
    time.sleep(0.6)  # subprocess.run kills a program 0.25 seconds after Ctrl-C
    open(sys.argv[-1] + "/saved", "w")
    sys.exit(130)
"""


def test_programs_that_start_another_let_it_save(tmp_path, monkeypatch):
    """Ctrl-C goes to both."""
    export = load("simclr", "export")
    monkeypatch.setattr(export, "PREPARE", tmp_path / "prepare.py")
    (tmp_path / "prepare.py").write_text(INTERRUPTED.replace("sys.argv[-1]", repr(str(tmp_path))))
    (tmp_path / "train.csv").write_text("")
    place = ["--data-dir", str(tmp_path), "--save-dir", str(tmp_path / "run")]
    for call in (
        lambda: ablations.main_py("omniglot", None, tmp_path, code=INTERRUPTED),
        lambda: export.prepared(load("simclr", "main").parse_args(place)),
    ):
        handler = signal.getsignal(signal.SIGINT)
        with pytest.raises(SystemExit, match="130"):
            call()
        assert signal.getsignal(signal.SIGINT) == handler
        (tmp_path / "saved").unlink()


def test_the_ablations_that_no_flag_does_change_what_they_say(glyphs_dir):
    """What the encoder sees and what the decoder draws: are they in the middle, are they of one size?"""
    measure = """
import sys
args = main.parse_args(["@recipes/quick.txt", "--data-dir", *sys.argv[1:]])
images = main.load_splits(args)["train"].flatten(0, 1)
for x in main.views(images.float() / (255 if images.dtype == torch.uint8 else 1), None, args):
    centre, size = main.pose(x, 0)
    print(bool(centre.abs().mean() < 0.05), bool(size[:, 0, 0].std() < 0.05), end=" ")
"""
    seen, plain = {}, "import main, torch; main.main()"
    for name in ("target-shape-0", "target-centred", "input-canonical"):
        code = ablations.CODE.get(name, plain).replace("; main.main()", measure)
        result = run("omniglot", code, glyphs_dir, *ablations.OURS[name].split(), script="-c")
        seen[name] = result.stdout.strip() or result.stderr
    assert seen == {
        "target-shape-0": "False False True True",
        "target-centred": "False False True False",
        "input-canonical": "True True True True",
    }


def test_a_dimension_is_active_when_its_signal_is_above_its_noise():
    log_var = torch.tensor([0.02, 0.5, 1.0, 4.0]).log().expand(1000, -1)
    scale = torch.tensor([1.0, 0.5, 0.0, 3.0])  # of the means: variance 1, 0.25, 0 and 9
    mean = 7 + scale * torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    assert ablations.active_dims(mean, log_var) == 2


def test_other_ways_are_of_the_runs_themselves():
    for name, variants in ablations.tested().items():
        if name.startswith("omniglot/") and ablations.WAYS in variants:
            found, said = variants[ablations.WAYS], read_json(RESULTS / name / "test.json")
            for cell in said:
                assert abs(found[cell]["accuracy"] - said[cell]["accuracy"]) < 0.05, (name, cell)


@needs_shared_data
def test_the_active_dimensions_are_those_of_the_checkpoints(omniglot_dir, tmp_path):
    for folder in ("results", "omniglot"):
        ignored = shutil.ignore_patterns("runs", "ablations", "mimgnet", "bench")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    result = run(tmp_path / "results", "active", "--data-dir", omniglot_dir, script="ablations.py")
    assert result.returncode == 0, result.stderr
    found, said = (read_json(place / "results/ablations/active.json") for place in (tmp_path, ROOT))
    stale = [name for name, counts in found.items() if said.get(name) != counts]
    assert found and not stale, "to be written again by ablations.py active"
