"""The tables of results in Markdown, from the files in results/; no number in them is typed by hand.

    python results/table.py            # rewrites the tables in README.md, results/README.md and results/recipe/README.md
    python results/table.py --check    # exit status 1 if they disagree with results/

A run is a folder <experiment>-<name> or, for several seeds of one run, <experiment>-<name>-seed<N>.
"""

import json
import re
import statistics
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent
START, END = "<!-- results: made by `make table` -->", "<!-- end of results -->"
# Accuracies in % of the paper's table (ICLR 2021): experiment, training way, cell -> published.
PUBLISHED = {
    ("omniglot", 5, "5way1shot"): 94.92, ("omniglot", 5, "5way5shot"): 97.09,
    ("omniglot", 20, "20way1shot"): 82.21, ("omniglot", 20, "20way5shot"): 90.61,
    ("mimgnet", 5, "5way1shot"): 42.82, ("mimgnet", 5, "5way5shot"): 55.73,
    ("mimgnet", 5, "5way20shot"): 63.14, ("mimgnet", 5, "5way50shot"): 68.26,
}  # fmt: skip
NAMES = {"omniglot": "Omniglot", "mimgnet": "Mini-ImageNet"}
RECIPE = {"kl_warmup_iters": 0, "kl_weight": 1.0, "ema_decay": 0.0, "lr_schedule": "constant", "e_step": "unit"}  # the published one
STEPS = {"omniglot": (60000, 32), "mimgnet": (15000, 256)}  # its training steps and Monte-Carlo samples


def read_runs():
    """{name without seed: [{config, test, seconds}, ...]} of every folder with a test.json."""
    runs = {}
    for path in sorted(RESULTS.glob("*/test.json")):
        config, metrics = path.with_name("config.json"), path.with_name("metrics.jsonl")
        seconds = json.loads(metrics.read_text().splitlines()[-1])["seconds"] if metrics.exists() else None
        name = re.sub(r"-seed\d+$", "", path.parent.name)
        run = {"args": {}, "device": "?"} | json.loads(config.read_text())
        runs.setdefault(name, []).append(run | {"test": json.loads(path.read_text()), "seconds": seconds})
    return runs


def is_published(experiment, args):
    steps, samples = STEPS[experiment]
    length = (args["train_iters"], args["train_mc_sample_size"]) == (steps, samples)
    return length and all(args[name] == value for name, value in RECIPE.items())


def score(seeds, cell):
    """(mean, 'mean ± interval') of a cell over the seeds of a run: the 95 % interval of one, the spread of several."""
    cells = [run["test"][cell] for run in seeds]
    mean = statistics.fmean(c["accuracy"] for c in cells)
    if len(cells) == 1:
        return mean, f"{mean:.2f} ± {cells[0]['ci95']:.2f}"
    return mean, f"{mean:.2f} (std {statistics.stdev(c['accuracy'] for c in cells):.2f}, {len(cells)} seeds)"


def describe(name, seeds):
    run = seeds[0]
    minutes = f" in {run['seconds'] / 60:.0f} min" if run["seconds"] else ""
    return f"[`{name}`](results/{name if len(seeds) == 1 else ''}): {run['args']['train_iters']:,} steps{minutes}, {run['device']}"


def table():
    """The result table in Markdown: a row for each published cell and each of our runs of it."""
    runs, lines = read_runs(), []
    lines += ["| accuracy, % | published | ours | difference | recipe | run |", "|---|---|---|---|---|---|"]
    for (experiment, way, cell), published in PUBLISHED.items():
        title = f"{NAMES[experiment]} {cell.replace('way', '-way ').replace('shot', '-shot')}"
        found = {name: s for name, s in runs.items() if name.startswith(f"{experiment}-") and s[0]["args"]["way"] == way and all(cell in run["test"] for run in s)}
        if not found:
            lines.append(f"| {title} | {published:.2f} | not run | | | |")
        for name, seeds in found.items():
            mean, text = score(seeds, cell)
            recipe = "published" if is_published(experiment, seeds[0]["args"]) else "fast"
            lines.append(f"| {title} | {published:.2f} | {text} | {mean - published:+.2f} | {recipe} | {describe(name, seeds)} |")
    return "\n".join(lines)


def recipe_table():
    """What was tried for the fast recipe: the validations in results/recipe/*.jsonl."""
    lines = ["| run | steps | 5-way 1-shot | 5-way 5-shot | reconstruction | KL |", "|---|---|---|---|---|---|"]
    for path in sorted((RESULTS / "recipe").glob("*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            cells = [f"{line[cell]['accuracy']:.1f} ± {line[cell]['ci95']:.1f}" for cell in ("5way1shot", "5way5shot")]
            lines.append(f"| {path.stem} | {line['step']} | {' | '.join(cells)} | {line['reconstruction']:.0f} | {line['kl']:.1f} |")
    return "\n".join(lines)


def filled(text, content):
    before, rest = text.split(START)
    return f"{before}{START}\n{content}\n{END}{rest.split(END)[1]}"


def main():
    stale, content = [], table()
    tables = {RESULTS.parent / "README.md": content, RESULTS / "README.md": content.replace("](results/", "]("), RESULTS / "recipe/README.md": recipe_table()}
    for path, fixed in tables.items():
        text = path.read_text()
        if filled(text, fixed) != text:
            stale.append(str(path.relative_to(RESULTS.parent)))
            if "--check" not in sys.argv:
                path.write_text(filled(text, fixed))
    if "--check" in sys.argv and stale:
        sys.exit(f"{', '.join(stale)}: the result table disagrees with results/; run `make table`")


if __name__ == "__main__":
    main()
