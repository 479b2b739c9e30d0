"""bench.py: both versions of every measurement compute the same, and its report has what it says. Never a
time."""

import json
import sys

import pytest
import torch

from conftest import ROOT, run
from pairs import COMPILED, EPISODES, FP32, PAIRS, Pair, difference

sys.path.insert(0, str(ROOT))
import bench

CPU = torch.device("cpu")
EAGER = [name for name in PAIRS if name not in COMPILED]


@pytest.fixture(scope="module", autouse=True)
def stock_allocator():
    yield
    bench.use_allocator("plain")


def tiny(name, bf16=False):
    build, *settings = PAIRS[name]
    return build(*settings, True, CPU, bf16)


def results(pair):
    """Of the last part of each version, which are the ones to compare."""
    return [list(parts.values())[-1][0]() for parts in (pair.ours, pair.plain)]


@pytest.mark.parametrize("name", EAGER)
def test_both_versions_compute_the_same(name):
    pair = tiny(name)
    ours, other = results(pair)
    assert len(ours) >= len(other) and other.isfinite().all() and other.abs().sum() > 0
    assert difference(ours, other) <= (1e-5 if pair.tolerance == FP32 else 0.1 * pair.tolerance)
    if name.startswith(("omniglot-eval", "mimgnet-eval")):
        assert ours.unique().numel() > 1


@pytest.mark.parametrize("name", ["omniglot-5way", "omniglot-20way", "mimgnet-step"])
def test_a_step_leaves_both_versions_with_the_same_weights(name):
    """The losses of the second step, on other sets and draws: both have had the same gradient and the same
    Adam."""
    pair = tiny(name)
    (first, _), (ours, other) = results(pair), results(pair)
    assert difference(ours, other) < 1e-3 < difference(first, other)


def test_seconds_are_those_of_a_call_and_a_rate_is_the_best(monkeypatch):
    ticks = iter([10.0, 16.0])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(ticks))
    assert bench.seconds(lambda: None, CPU, 3) == 2
    taken = iter(range(1, 9))
    monkeypatch.setattr(bench, "seconds", lambda *_: next(taken))
    assert bench.matmul_rate("fp32", CPU, 4) == 2 * 4**3


def test_the_plain_version_is_not_tidied_up_after():
    """Its heap is larger: given back at every step, it would make the plain version slower."""
    hooks = bench._global_optimizer_post_hooks
    for version, count in (("ours", 1), ("ours", 1), ("plain", 0)):
        bench.use_allocator(version)
        assert len(hooks) == count or not bench.glibc()


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_step_computes_the_same(name, monkeypatch):
    """As torch.compile traces it; fusing the trace is the library's, and takes a minute."""
    compile, graphs = torch.compile, []

    def as_traced(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, mode: compile(function, backend=as_traced))
    pair = tiny(name)
    (first, _), (ours, other) = results(pair), results(pair)
    assert graphs and difference(ours, other) < 1e-3 < difference(first, other)


@pytest.mark.parametrize("name", ["omniglot-S1", "mimgnet-step", "simclr-step"])
def test_bf16_is_within_its_tolerance(name):
    pair = tiny(name, bf16=True)
    assert pair.precision == "bf16" and 0 < difference(*results(pair)) <= pair.tolerance


def product(size):
    a = torch.ones(size, size)
    return {"product": (lambda: (a @ a).sum().view(1), 1), "square": (lambda: a.square().view(-1)[:1], 10)}


def test_a_measurement():
    pair = Pair("title", "items", 20, "fp32", product(2048), product(2048), 1e-6)
    row = bench.measure(pair, CPU, baseline=True, repeat=4)
    assert row["difference"] == 0
    for version in ("ours", "plain"):
        r = row[version]
        assert r["flop"] == 2 * 2048**3
        assert r["memory_bytes"] is None or 15 * 2**20 < r["memory_bytes"] < 40 * 2**20  # a result of 16 MiB
        parts = r["parts"]
        assert r["seconds"] == pytest.approx(parts["product"]["seconds"] + 10 * parts["square"]["seconds"])
        assert r["rate"] == pytest.approx(20 / r["seconds"])
        assert all(part["least"] <= part["seconds"] <= part["most"] for part in parts.values())
        assert [part["samples"] for part in parts.values()] == [6, 6]  # three turns of two
    assert row["speedup"] == pytest.approx(row["plain"]["seconds"] / row["ours"]["seconds"])


def test_versions_that_differ_are_said_after_the_report(tmp_path, monkeypatch, capfd):
    one = torch.ones(1, 1)
    calls = [{"part": (lambda value=value: (value * one @ one).view(1), 1)} for value in (1.0, 1.1)]
    pair = Pair("a title", "items", 1, "fp32", *calls, 1e-2)
    monkeypatch.setattr(bench, "PAIRS", {"simclr-step": (lambda *_: pair,)})
    status, stdout, stderr = bench_main(
        monkeypatch, capfd, "--tiny", "--baseline", "--repeat", 1, "--device", "cpu", "--out", tmp_path
    )
    assert (
        status == 2
        and "a title: results 0.04" in stderr
        and "| a title" in stdout
        and len(list(tmp_path.iterdir())) == 1
    )


def test_part_of_the_table_does_not_replace_the_whole():
    assert bench.parse_args([]).out == ROOT / "results/bench"
    assert (
        bench.parse_args(["--only", "simclr-step"]).out is None and bench.parse_args(["--tiny"]).out is None
    )


def test_the_report(tmp_path):
    """The command as a user runs it, three measurements in small."""
    names = ["omniglot-eval-5way", "mimgnet-step", "simclr-export"]
    flags = ["--tiny", "--baseline", "--repeat", 2, "--device", "cpu", "--precision", "fp32"]
    result = run(".", *flags, "--out", tmp_path, "--only", *names, script="bench.py", timeout=600)
    assert result.returncode == 0, result.stderr
    (path,) = tmp_path.iterdir()
    report = json.loads(path.read_text())
    assert path.name.endswith("-1-threads-fp32.json")
    assert report["threads"] == 1 and report["device"] and report["tiny"]
    assert report["versions"].keys() == {"python", "torch", "torchvision", "numpy"}
    assert report["matmul_flop_per_second"].keys() == {"fp32"}
    assert list(report["measurements"]) == names
    for name, row in report["measurements"].items():
        pair = tiny(name)
        assert row["title"] == pair.title and row["title"] in result.stdout
        assert row["items"] == pair.items and row["difference"] <= pair.tolerance
        for version in ("ours", "plain"):
            assert row[version]["parts"].keys() == getattr(pair, version).keys()
        assert row["ours"]["flop"] > 0 and row["speedup"] > 0
    assert report["measurements"]["omniglot-eval-5way"]["items"] == EPISODES
    assert len([line for line in result.stdout.splitlines() if line.startswith("| ")]) == len(names) + 1


def test_without_names_all_are_measured(monkeypatch):
    ours = {"seconds": 1.0, "rate": 1.0, "flop": 0}
    row = {"title": "a title", "unit": "step", "items": 1, "precision": "fp32", "ours": ours}
    monkeypatch.setattr(bench, "measure_apart", lambda name: row)
    report = bench.bench(bench.parse_args(["--tiny"]), CPU, False)
    assert list(report["measurements"]) == EAGER


def bench_main(monkeypatch, capfd, *flags):
    """bench.py in this process, which saves importing torch again: (exit status, stdout, stderr), those of
    its children included."""
    monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, flags)])
    status = 0
    try:
        bench.main()
    except SystemExit as end:
        status = end.code
    return status, *capfd.readouterr()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--only", "nonsense"], ["--only", "nonsense"]),
        (["--tiny", "--device", "nonsense"], ["--device", "nonsense"]),
        (["--repeat", 0], ["--repeat", "0 found"]),
    ],
)
def test_mistakes(flags, words, monkeypatch, capfd):
    status, _, stderr = bench_main(monkeypatch, capfd, *flags)
    assert status == 2 and len(stderr.splitlines()) == 1, stderr
    assert all(word in stderr for word in words)
