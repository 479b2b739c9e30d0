"""The tables of results in Markdown, from the files in results/; no number in them is typed by hand.

    python results/table.py            # rewrites the tables of every README.md
    python results/table.py --check    # exit status 1 if they disagree with results/

A run is a folder <experiment>/<recipe>/seed<N>. Those of simclr learned the features of mimgnet runs, whose
config.json says after how many epochs.
"""

import json
import statistics
import sys
from pathlib import Path

from ablations import MINI, SHORT, TEST, TRAIN, other_ways, tested

RESULTS = Path(__file__).resolve().parent
START, END = "<!-- {}: made by `make table` -->", "<!-- end of {} -->"  # around a table that has a name
# Accuracies in % of the paper's table (ICLR 2021): experiment, training way, cell -> published.
PUBLISHED = {
    ("omniglot", 5, "5way1shot"): 94.92, ("omniglot", 5, "5way5shot"): 97.09,
    ("omniglot", 20, "20way1shot"): 82.21, ("omniglot", 20, "20way5shot"): 90.61,
    ("mimgnet", 5, "5way1shot"): 42.82, ("mimgnet", 5, "5way5shot"): 55.73,
    ("mimgnet", 5, "5way20shot"): 63.14, ("mimgnet", 5, "5way50shot"): 68.26,
}  # fmt: skip
NAMES = {"omniglot": "Omniglot", "mimgnet": "Mini-ImageNet"}
RECIPE = {  # the published one, but for its length: the defaults of main.py
    "unsupervised_em_iters": 10, "em_start": "samples", "fix_pi": False, "no_set_attention": False,
    "kl_warmup_iters": 0, "kl_weight": 1.0,
    "ema_decay": 0.0, "lr_schedule": "constant", "e_step": "unit", "semisupervised_em_iters": 10,
    "eval_episodes": 1000, "query": 15,
    "decode_samples": None,
}  # fmt: skip
RECIPES = {
    "omniglot": RECIPE
    | {
        "batch_size": 4,
        "lr": 1e-3,
        "weight_decay": 1e-6,
        "hidden_size": 64,
        "latent_size": 64,
        "train_mc_sample_size": 32,
        "test_mc_sample_size": 32,
        "target": "drawing",
        "warp": "none",
    },
    "mimgnet": RECIPE
    | {
        "batch_size": 16,
        "lr": 1e-4,
        "weight_decay": 5e-2,
        "hidden_size": 512,
        "latent_size": 32,
        "train_mc_sample_size": 256,
        "test_mc_sample_size": 256,
    },
}
FAST = {
    "train_mc_sample_size",
    "sample_size",
    "kl_warmup_iters",
    "lr_schedule",
    "ema_decay",
}  # what the fast recipe changes
# Ours: the decoder draws the character without its pose.
CANONICAL = FAST | {"target", "warp", "kl_weight", "e_step", "eval_episodes"}
HEADLINES = {
    "omniglot/canonical",
    "omniglot/5way-long",
    "mimgnet/prototypical-512",
    "simclr/prototypical-512",
}  # in README.md
SET_SIZES = {("omniglot", 5): 200, ("omniglot", 20): 300, ("mimgnet", 5): 5}
STEPS, EPOCHS = {"omniglot": 60000, "mimgnet": 15000}, 400  # of SimCLR
SIMCLR = {"batch_size": 512, "view_size": 84}


def read_runs():
    """{experiment/recipe: what `read_run` found of each seed} of every run with a test.json."""
    runs = {}
    for path in sorted(RESULTS.glob("*/*/seed*/test.json")):
        name = path.parent.parent.relative_to(RESULTS).as_posix()
        runs.setdefault(name, []).append(read_run(path.parent))
    return runs


def read_run(folder):
    """Its config.json with its test.json, how long it trained and, where there is one, its baselines.json."""
    config, test = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "test"))
    beside, metrics = folder / "baselines.json", (folder / "metrics.jsonl").read_text().splitlines()
    baselines = json.loads(beside.read_text()) if beside.exists() else {}
    return config | {"test": test, "seconds": json.loads(metrics[-1])["seconds"], "baselines": baselines}


def recipe(experiment, run):
    """Name the recipe: the published one, with what was run shorter, or another and what differs."""
    args = run["args"]
    expected = RECIPES[experiment] | {"sample_size": SET_SIZES[experiment, args["way"]]}
    changed = [
        name for name, value in expected.items() if args.get(name, value) != value
    ]  # a flag newer than the run had its default
    parts = [(args["train_iters"], STEPS[experiment], "steps")]
    if changed == ["train_mc_sample_size"]:
        name = f"published, trained with {args[changed[0]]} Monte-Carlo samples"
    elif args.get("target") == "canonical" and set(changed) <= CANONICAL:
        reading = f", {args['e_step']} variance in the E-step" if "e_step" in changed else ""
        name, parts = f"ours: drawings without their pose{reading}", []
    elif changed:
        name, parts = (
            "fast"
            if set(changed) <= FAST
            else f"another: {', '.join(f'{key} {args[key]}' for key in changed)}",
            [],
        )
    else:
        name = "published"
    if experiment == "mimgnet":
        other = simclr(run.get("features", {}))
        if other:
            name = f"{other}, else {name}"
        else:
            parts.append((run.get("features", {}).get("train_epochs"), EPOCHS, "SimCLR epochs"))
    short = [
        f"{f'{found:,}' if found else '?'} of {whole:,} {unit}"
        for found, whole, unit in parts
        if found != whole
    ]
    return ", ".join([name, *short])


def simclr(features):
    """Name the encoder that features.json describes; nothing for the published one of any length."""
    if features.get("loss") == "prototypical":
        size = features.get("feature_size", SIMCLR["view_size"])
        of = "" if size == SIMCLR["view_size"] else f", features of {size} pixels"
        return f"a prototypical encoder, {features['batch_size']} x {features['views']} views{of}"
    found = SIMCLR | {name: features[name] for name in SIMCLR if name in features}  # older ones say less
    sizes = f"SimCLR in batches of {found['batch_size']} with views of {found['view_size']} pixels"
    return "" if found == SIMCLR else sizes


def score(seeds, cell):
    """(mean, spread) of a cell over the tests of a run's seeds: of one its 95 % interval, of several the
    values themselves."""
    cells = [test[cell] for test in seeds]
    accuracies = [c["accuracy"] for c in cells]
    return statistics.fmean(accuracies), ", ".join(f"{c['accuracy']:.2f} ± {c['ci95']:.2f}" for c in cells)


def describe(name, seeds):
    run = seeds[0]
    length = (
        f"{run['args']['train_epochs']} epochs"
        if name.startswith("simclr")
        else f"{run['args']['train_iters']:,} steps"
    )
    took = sorted(
        {round(run["seconds"] / 60) for run in seeds if run["seconds"]}
    )  # seeds beside other work took longer
    minutes = f" in {' to '.join(map(str, dict.fromkeys((took[0], took[-1]))))} min" if took else ""
    return f"[`{name}`](results/{name}): {length}{minutes}, {device(run)}"


def device(run):
    return run["device"].replace(" 1 threads", " 1 thread")


def rows(experiment, runs, detail=True):
    """(recipe, {cell: accuracy and difference to the paper's}, run) of each of our runs, after what of the
    published recipe nobody ran at full length."""
    cells = {cell: published for (of, _, cell), published in PUBLISHED.items() if of == experiment}
    made_by = {
        name: recipe(experiment, seeds[0])
        for name, seeds in runs.items()
        if name.startswith(f"{experiment}/")
    }
    if experiment == "mimgnet":
        encoders = {
            name: simclr(seeds[0]["args"]) or "SimCLR"
            for name, seeds in runs.items()
            if name.startswith("simclr")
        }
        made_by |= {
            name: f"baseline: logistic regression on the features of {encoder}"
            for name, encoder in encoders.items()
        }
    found = []
    for name, how in made_by.items():
        seeds, scores = runs[name], {}
        for cell, published in cells.items():
            if all(cell in run["test"] for run in seeds):
                mean, spread = score([run["test"] for run in seeds], cell)
                scores[cell] = f"{mean:.2f} ({mean - published:+.2f})<br>{spread}"
        found.append((how, scores, describe(name, seeds)))
        for other, cells_of in seeds[0].get("baselines", {}).items() if detail else ():
            scores = {}
            for cell, published in cells.items():
                mean, spread = score([cells_of], cell)
                scores[cell] = f"{mean:.2f} ({mean - published:+.2f})<br>{spread}"
            found.append((how.replace("logistic regression", other), scores, f"[`{name}`](results/{name})"))
    whole = {cell for how, scores, _ in found if how == "published" for cell in scores}
    missing = {cell: "not run" for cell in cells if cell not in whole}
    return [("published, at full length", missing, ""), *found] if missing else found


def table(names=None):
    """The result tables in Markdown: for each data set the published cells, and each of our runs of them, or
    those of `names`."""
    runs, parts = {name: seeds for name, seeds in read_runs().items() if names is None or name in names}, []
    for experiment, title in NAMES.items():
        cells = {cell: published for (of, _, cell), published in PUBLISHED.items() if of == experiment}
        lines = [
            f"| {title}, accuracy in % | queries | {' | '.join(map(readable, cells))} | run |",
            "|---" * (len(cells) + 3) + "|",
        ]
        lines.append(
            f"| the paper | together | {' | '.join(f'{published:.2f}' for published in cells.values())} | |"
        )
        for how, scores, run in rows(experiment, runs, names is None):
            queries = "alone" if how.startswith("baseline") and "EM" not in how else "together"
            lines.append(
                f"| {how} | {queries} | {' | '.join(scores.get(cell, '') for cell in cells)} | {run} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def readable(cell):
    """'5way1shot' -> '5-way 1-shot'."""
    return cell.replace("way", "-way ").replace("shot", "-shot")


def interval(cell):
    return f"{cell['accuracy']:.2f} ± {cell['ci95']:.2f}"


def ways_table():
    """Every trained Omniglot model at every number of ways."""
    lines = [
        "| trained model | shots at test | 5 ways | 10 ways | 15 ways | 20 ways |",
        "|---|---|---|---|---|---|",
    ]
    for run, seeds in other_ways().items():
        for shot in (1, 5):
            scores = ["{:.2f} ({})".format(*score(seeds, f"{way}way{shot}shot")) for way in (5, 10, 15, 20)]
            lines.append(f"| `{run}` | {shot} | {' | '.join(scores)} |")
    return "\n".join(lines)


def test_ablations():
    """One table for each run: what `results/ablations.py test` has found."""
    parts = []
    for run, variants in tested().items():
        if TEST[0] not in variants:
            continue
        names = list(variants[TEST[0]])
        lines = [
            f"`{run}`, test accuracy in %:\n",
            f"| flags | {' | '.join(map(readable, names))} |",
            "|---" * (len(names) + 1) + "|",
        ]
        for flags in TEST:
            scores = [interval(variants[flags][name]) if flags in variants else "not run" for name in names]
            lines.append(f"| {f'`{flags}`' if flags else 'none'} | {' | '.join(scores)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def train_ablations():
    """Trainings with one thing changed: what `results/ablations.py train` has left, for each experiment."""
    rows = {"omniglot": [], "mimgnet": [(RESULTS / "mimgnet/5way-fast/seed0", "")]}  # (folder, changed flags)
    for name, flags in TRAIN.items():
        rows["mimgnet" if name.startswith("mimgnet-") else "omniglot"].append(
            (RESULTS / "ablations" / name, flags)
        )
    parts, active = [], json.loads((RESULTS / "ablations/active.json").read_text())
    for (experiment, folders), base, shots in zip(rows.items(), (SHORT, MINI), ((1, 5), (1, 5, 20, 50))):
        names = [f"5way{shot}shot" for shot in shots]
        header = [
            "changed",
            *map(readable, names),
            "reconstruction",
            "KL",
            *(["dimensions used"] if experiment == "omniglot" else []),
            "minutes",
        ]
        lines = [f"Every training on {NAMES[experiment]}: `{base}`, test accuracy in %, and\n"]
        lines += [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        for folder, flags in folders:
            cells = ["not run", *[""] * (len(header) - 2)]
            if (folder / "test.json").exists():
                scores = json.loads((folder / "test.json").read_text())
                last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
                cells = [interval(scores[name]) for name in names]
                cells += [f"{last['reconstruction']:.0f}", f"{last['kl']:.1f}"]
                if experiment == "omniglot":
                    cells.append(" of ".join(map(str, active.get(folder.name, ["not run"]))))
                threads = json.loads((folder / "config.json").read_text())["device"].rpartition(", ")[2]
                cells.append(f"{last['seconds'] / 60:.0f}, {threads.replace('1 threads', '1 thread')}")
            lines.append(f"| {f'`{flags}`' if flags else 'nothing'} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    trained = ", ".join(
        f"`{name}` {used}" for name, (used, _) in active.items() if name.startswith("omniglot/")
    )
    return "\n\n".join([*parts, f"Dimensions used by the runs of `../README.md`: {trained}"])


def recipe_table():
    """What was tried for the fast recipe: the validations in results/recipe/*.jsonl, and of the runs kept."""
    lines = ["| run | steps | 1-shot | 5-shot | reconstruction | KL |", "|---|---|---|---|---|---|"]
    kept = {
        f"omniglot/{path.parent.parent.name}": path for path in RESULTS.glob("omniglot/*/seed0/metrics.jsonl")
    }
    for name, path in sorted(
        ({path.stem: path for path in (RESULTS / "recipe").glob("*.jsonl")} | kept).items()
    ):
        for line in map(json.loads, path.read_text().splitlines()):
            cells = [
                f"{cell['accuracy']:.1f} ± {cell['ci95']:.1f}"
                for key, cell in line.items()
                if key.endswith("shot")
            ]
            lines.append(
                f"| {name} | {line['step']} | {' | '.join(cells)} | "
                f"{line['reconstruction']:.0f} | {line['kl']:.1f} |"
            )
    seen = json.loads((RESULTS / "recipe/training-classes.json").read_text())
    lines += ["", "`5shot_best.pt`, tested on 1,292 of its own training classes:\n"]
    for run, cells in seen.items():
        lines.append(
            f"* `{run}`: "
            + ", ".join(f"{readable(cell)} {interval(found)} %" for cell, found in cells.items())
        )
    return "\n".join(lines)


def demo():
    """What `make demo` printed, and how long it trained."""
    run = read_run(RESULTS / "demo")
    lines = [
        f"test  {name:>12}  {interval(cell):>14} %  ({cell['episodes']} episodes)"
        for name, cell in run["test"].items()
    ]
    return "\n".join([f"{run['seconds']:.0f} seconds of training, {device(run)}:\n", "```", *lines, "```"])


def speed_table(path, detail=False):
    """A file of bench.py as a table; in detail, also the speed-up there would be if our products alone took
    time, and what an older file has."""
    bench, before = json.loads(path.read_text()), path.with_name(f"{path.stem}-before.json")
    old = json.loads(before.read_text())["measurements"] if detail and before.exists() else None
    versions = bench["versions"]
    threads = f", {bench['threads']} threads" if bench["device"].endswith("CPU") else ""
    lines = [
        f"{bench['device']}{threads}, torch {versions['torch']}, networks in {bench['precision']}: "
        f"`{bench['command']}`\n"
    ]
    header = [
        "",
        "here",
        "plain float32",
        "speed-up",
        *(["products alone"] if detail else []),
        "peak memory",
        "plain's",
        *(["here, before"] if old else []),
    ]
    lines += [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name, row in bench["measurements"].items():
        cells = [row["title"], pace(row, "ours"), pace(row, "plain"), ratio(row)]
        if detail:
            products = row["ours"]["flop"] / bench["matmul_flop_per_second"][row["precision"]]
            cells.append(f"{row['plain']['seconds'] / products:.1f} ×" if "plain" in row else "")
        cells += [memory(row, "ours"), memory(row, "plain"), *([pace(old[name], "ours")] if old else [])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def pace(row, version):
    """Seconds of a step, or items a second."""
    if version not in row:
        return ""
    seconds, rate = row[version]["seconds"], row[version]["rate"]
    if row["items"] == 1:
        return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"
    return f"{rate:,.{0 if rate >= 10 else 1}f} {row['unit']}/s"


def ratio(row):
    return f"{row['speedup']:.1f} ×" if "speedup" in row else ""


def memory(row, version):
    found = row.get(version, {}).get("memory_bytes")
    if not found:
        return ""
    return f"{found / 2**30:.1f} GiB" if found >= 2**30 else f"{found / 2**20:.0f} MiB"


def precision_table(path):
    """A file of bench.py --compare-precision: the same seeds in float32 and in bfloat16."""
    bench = json.loads(path.read_text())
    lines = [f"{bench['device']}, torch {bench['versions']['torch']}: `{bench['command']}`\n"]
    lines += [
        "| seed | step | reconstruction, fp32 / bf16 | KL | 5-way 1-shot | 5-way 5-shot |",
        "|---|---|---|---|---|---|",
    ]
    for seed, both in bench["runs"].items():
        for line, other in zip(both["fp32"], both["bf16"], strict=True):
            cells = [f"{line[term]:.1f} / {other[term]:.1f}" for term in ("reconstruction", "kl")]
            cells += [
                f"{line[cell]['accuracy']:.1f} / {other[cell]['accuracy']:.1f}"
                for cell in ("5way1shot", "5way5shot")
            ]
            lines.append(f"| {seed.removeprefix('seed ')} | {line['step']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def bench_files():
    """What bench.py measured: a file for each machine and precision."""
    return [
        path
        for path in sorted((RESULTS / "bench").glob("*.json"))
        if not path.stem.endswith(("-precisions", "-before"))
    ]


def speed_tables():
    """Every file of bench.py, and the precisions side by side where they were compared."""
    parts = [speed_table(path, detail=True) for path in bench_files()]
    return "\n\n".join([*parts, *map(precision_table, sorted((RESULTS / "bench").glob("*-precisions.json")))])


def filled(text, tables):
    """A README with its tables, {name: content}, between their marks."""
    for name, content in tables.items():
        start, end = START.format(name), END.format(name)
        before, rest = text.split(start)
        text = f"{before}{start}\n{content}\n{end}{rest.split(end)[1]}"
    return text


def main():
    stale, results = [], f"{table()}\n\n{ways_table()}"
    readmes = {
        "README.md": {"demo": demo(), "results": table(HEADLINES)},
        "results/README.md": {"results": results.replace("](results/", "](")},
        "results/recipe/README.md": {"results": recipe_table()},
        "results/ablations/README.md": {"results": f"{test_ablations()}\n\n{train_ablations()}"},
        "results/bench/README.md": {"results": speed_tables()},
    }
    for name, tables in readmes.items():
        path = RESULTS.parent / name
        text = path.read_text()
        if filled(text, tables) != text:
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_text(filled(text, tables))
    if "--check" in sys.argv and stale:
        sys.exit(f"{', '.join(stale)}: the result table disagrees with results/; run `make table`")


if __name__ == "__main__":
    main()
