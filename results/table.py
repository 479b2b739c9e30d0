"""Make the tables of results in Markdown from the files in results/, between the marks of each page.

    python results/table.py            # rewrites the tables of every README.md
    python results/table.py --check    # exit status 1 if they disagree with results/

A run is a folder <experiment>/<recipe>/seed<N>. The config.json of a mimgnet run says which features it used,
and how many epochs their encoder was trained.
"""

import re
import statistics
import sys

from ablations import BASE, OURS, OUT, RESULTS, SEEDS, TEST, TRAIN, Parser, name_of, other_ways
from ablations import read_json, read_lines, save, tested
from pages import filled, grid
from published import OTHERS, PUBLISHED, encoder, recipe
from speed import speed_tables

ALONE = "the same, inductive"  # how a row begins
HEADLINES = (  # in README.md
    "omniglot/published-5way", "omniglot/published-20way", "omniglot/canonical",
    "mimgnet/neighbours",
)  # fmt: skip

NAMES = {"omniglot": "Omniglot", "mimgnet": "Mini-ImageNet"}


# --- reading --------------------------------------------------------------------------------------


def read_run(folder):
    """Read a run: config.json, last validation, test; baselines and the inductive test if there are any."""
    found = {"test": read_json(folder / "test.json"), "baselines": {}}
    if (folder / "baselines.json").exists():
        found["baselines"] = read_json(folder / "baselines.json")
    if (folder / "inductive/test.json").exists():
        found["inductive"] = read_json(folder / "inductive/test.json")
    return read_json(folder / "config.json") | read_lines(folder / "metrics.jsonl")[-1] | found


def read_runs():
    """Read {experiment/recipe: [run of each seed]}."""
    runs = {}
    for path in sorted(RESULTS.glob("*/*/seed*/test.json")):
        runs.setdefault(name_of(path.parent.parent), []).append(read_run(path.parent))
    return runs


# --- how a run is described -----------------------------------------------------------------------
def describe(name, seeds):
    """Link the runs of all seeds, and say how long they trained and on what; config.json has the machine."""
    args = seeds[0]["args"]
    length = f"{args['train_iters']:,} steps" if "train_iters" in args else f"{args['train_epochs']} epochs"
    seconds = [run["seconds"] for run in seeds]  # longer beside other work
    size, unit = (60, "min") if max(seconds) > 120 else (1, "s")
    took = " to ".join(map(str, sorted({round(min(seconds) / size), round(max(seconds) / size)})))
    parts = [part for run in seeds for part in (run, *run.get("resumed", []))]
    machines = " or ".join(dict.fromkeys(re.sub(r".* (CPU), ", r"\1, ", device(part)) for part in parts))
    return f"{link(name)}: {length} in {took} {unit}, {re.sub(' threads? or CPU,', ' or', machines)}"


def link(name):
    return f"[`{name}`](results/{name})"


def device(run):
    return re.sub(r"\(R\)| Processor", "", run["device"]).replace(" 1 threads", " 1 thread")


def readable(cell):
    """Spell out a cell: '5way1shot' -> '5-way 1-shot'."""
    return cell.replace("way", "-way ").replace("shot", "-shot")


def interval(cell, digits=2):
    return f"{cell['accuracy']:.{digits}f} ± {cell['ci95']:.{digits}f}"


def score(tests, cell):
    """Average a cell over the tests of all seeds: (mean, each seed with its 95 % interval)."""
    mean = statistics.fmean(test[cell]["accuracy"] for test in tests)
    return mean, ", ".join(interval(test[cell]) for test in tests)


def compare(tests, paper):
    """Compare the mean of each cell that all seeds have with the paper's: {cell: text}."""
    texts = {}
    for cell, published in paper.items():
        if all(cell in test for test in tests):
            mean, each = score(tests, cell)
            texts[cell] = f"{mean:.2f} ({mean - published:+.2f})<br>{each}"
            if len(tests) == 1:
                texts[cell] = f"{each} ({mean - published:+.2f})"
    return texts


# --- the tables -----------------------------------------------------------------------------------


def rows(experiment, runs, detail=True):
    """List (recipe, {cell: accuracy and difference to the paper's}, run) of each of our runs.

    `detail` adds what was not run as published, which comes first, and other classifiers.
    """
    paper, found = PUBLISHED[experiment], []
    for name, seeds in runs.items():
        made_by = name.split("/")[0]
        if made_by == experiment:
            how = recipe(experiment, seeds[0])
        elif made_by == "simclr" and experiment == "mimgnet":
            features = encoder(seeds[0]["args"]) or "SimCLR"
            how = f"baseline: logistic regression on the features of {features}"
        else:
            continue
        found.append((how, compare([run["test"] for run in seeds], paper), describe(name, seeds)))
        if "inductive" in seeds[0]:
            found.append((f"{ALONE}: no EM, no set attention", compare([seeds[0]["inductive"]], paper), ""))
        for other in seeds[0]["baselines"] if detail else ():
            scores = compare([run["baselines"][other] for run in seeds if other in run["baselines"]], paper)
            found.append((how.replace("logistic regression", other), scores, link(name)))
    untrained = RESULTS / experiment / "baselines.json"
    for name, cells in read_json(untrained).items() if untrained.exists() else ():
        if detail or name == "EM on drawings without their pose":
            found.append((f"baseline, no training: {name}", compare([cells], paper), ""))
    whole = {cell for how, scores, _ in found if how == "published" for cell in scores}
    missing = {cell: "not run" for cell in paper if cell not in whole}
    return [("published, unchanged, at full length", missing, ""), *found] if missing and detail else found


def joined(found):
    """Join rows of one recipe that fill different columns: its trainings for 5 and for 20 ways."""
    rows = []
    for how, scores, run in found:
        if rows and rows[-1][0] == how and not rows[-1][1].keys() & scores.keys():
            _, others, other = rows.pop()
            scores, run = others | scores, f"{other}<br>{run}"
        rows.append((how, scores, run))
    return rows


def table(names=None):
    """Make a table for each data set: the paper's accuracies, and all our runs or those of `names`."""
    runs = read_runs()
    runs = runs if names is None else {name: runs[name] for name in names}
    parts = []
    for experiment, title in NAMES.items():
        paper = PUBLISHED[experiment]
        header = [f"{title}, accuracy in %", "queries", *map(readable, paper), "run"]
        lines = [["the paper", "together", *(f"{accuracy:.2f}" for accuracy in paper.values()), ""]]
        others = OTHERS[experiment].items()
        others = [[name, "alone", *(f"{cell:.2f}" for cell in cells), ""] for name, cells in others]
        lines += others if names is None else others[-1:]
        for how, scores, run in joined(rows(experiment, runs, detail=names is None)):
            queries = "alone" if how.startswith(("baseline", ALONE)) and ": EM" not in how else "together"
            lines.append([how, queries, *(scores.get(cell, "") for cell in paper), run])
        parts.append(grid(header, lines))
    return "\n\n".join(parts)


def ways_table():
    """Show every trained Omniglot model at every number of ways."""
    ways, lines = (5, 10, 15, 20), []
    for run, tests in other_ways().items():
        for shot in (1, 5):
            scores = [score(tests, f"{way}way{shot}shot") for way in ways]
            lines.append([f"`{run}`", str(shot), *(f"{mean:.2f} ({each})" for mean, each in scores)])
    return grid(["trained model", "shots at test", *(f"{way} ways" for way in ways)], lines)


def test_ablations():
    """Make a table for each run with the results of `results/ablations.py test`."""
    parts = []
    for run, variants in tested().items():
        if TEST[0] in variants:
            cells, lines = list(variants[TEST[0]]), []
            for flags in TEST:
                found = variants.get(flags)
                scores = [interval(found[cell]) if found else "not run" for cell in cells]
                lines.append([f"`{flags}`" if flags else "none", *scores])
            parts += [f"`{run}`, test accuracy in %:", grid(["flags", *map(readable, cells)], lines)]
    return "\n\n".join(parts)


def train_ablations():
    """Make a table for each experiment with the results of `results/ablations.py train`."""
    parts, active = [], read_json(OUT / "active.json")
    for experiment, trainings in TRAIN.items():
        folders = {OUT / name: flags for name, flags in trainings.items()}
        if experiment == "mimgnet":  # Omniglot has a training of its own with nothing changed
            folders = {RESULTS / "mimgnet/5way-fast/seed0": "", **folders}
        cells = [cell for cell in PUBLISHED[experiment] if cell.startswith("5way")]
        dimensions = ["dimensions used"] * (experiment == "omniglot")
        header = ["changed", *map(readable, cells), "reconstruction", "KL", *dimensions, "minutes"]
        lines = []
        for folder, flags in folders.items():
            line = [f"`{flags}`" if flags else "nothing"]
            if (folder / "test.json").exists():
                run = read_run(folder)
                line += [interval(run["test"][cell]) for cell in cells]
                line += [f"{run['reconstruction']:.0f}", f"{run['kl']:.1f}"]
                if dimensions:
                    line.append(" of ".join(map(str, active.get(folder.name, ["not run"]))))
                line.append(f"{run['seconds'] / 60:.0f}, {device(run).rpartition(', ')[2]}")
            else:
                line.append("not run")
            lines.append(line)
        flags = f"has `{BASE[experiment]}` and what is changed"
        parts.append(f"Every training on {NAMES[experiment]} {flags}; test accuracy in %:")
        parts.append(grid(header, lines))
    used = ", ".join(f"`{name}` {count}" for name, (count, _) in active.items() if "/" in name)
    return "\n\n".join([*parts, f"Dimensions used by the runs of `../README.md`: {used}"])


def seeds_ablations():
    """Compare the trainings in three seeds of `results/ablations.py ours` and `decoded`."""
    ours = {"nothing": RESULTS / "omniglot/quick"} | {f"`{name}`": OUT / "ours" / name for name in OURS}
    decoded = {f"{name} of 32 samples decoded": OUT / "decoded" / name for name in SEEDS["decoded"][1]}
    tables = {SEEDS["ours"][0]: seeds_table(ours), SEEDS["decoded"][0]: seeds_table(decoded)}
    said = "test accuracy in %, loss terms of the last step"
    return "\n\n".join(f"Every training of `{base}`, {said}:\n\n{made}" for base, made in tables.items())


def seeds_table(folders):
    """Compare trainings, {what differs: folder of its seeds}, with the first one on the same test episodes.

    An interval is that of the difference per episode, after averaging over the seeds that both have.
    """
    cells, terms, base, lines = ("5way1shot", "5way5shot"), ("reconstruction", "kl"), {}, []
    for name, folder in folders.items():
        runs = {path.parent.name: read_run(path.parent) for path in sorted(folder.glob("seed*/test.json"))}
        base = base or runs
        line = [name]
        for cell in cells if runs else ():
            each = [run["test"][cell]["accuracy"] for run in runs.values()]
            line.append(f"{statistics.fmean(each):.2f} ({', '.join(f'{accuracy:.2f}' for accuracy in each)})")
            both = [(runs[seed]["test"][cell], base[seed]["test"][cell]) for seed in base if seed in runs]
            by_seed = [[a - b for a, b in zip(*(test["accuracies"] for test in pair))] for pair in both]
            differences = [statistics.fmean(episode) for episode in zip(*by_seed)]
            ci95 = 1.96 * statistics.pstdev(differences) / len(differences) ** 0.5
            line.append(f"{statistics.fmean(differences):+.2f} ± {ci95:.2f}" if runs is not base else "")
        line += [f"{statistics.fmean(run[term] for run in runs.values()):.1f}" for term in terms if runs]
        lines.append(line if runs else [name, "not run"])
    header = ["changed", *(text for cell in cells for text in (readable(cell), "difference"))]
    return grid([*header, "reconstruction", "KL"], lines)


def recipe_table():
    """List what was tried for the fast recipe: validations of results/recipe/*.jsonl and of the runs kept."""
    tried = {path.stem: path for path in (RESULTS / "recipe").glob("*.jsonl")}
    for path in RESULTS.glob("omniglot/*/seed0/metrics.jsonl"):
        tried[name_of(path.parent.parent)] = path
    lines = []
    for name, path in sorted(tried.items()):
        for line in read_lines(path):
            cells = [interval(cell, 1) for key, cell in line.items() if key.endswith("shot")]
            terms = [f"{line['reconstruction']:.0f}", f"{line['kl']:.1f}"]
            lines.append([name, str(line["step"]), *cells, *terms])
    parts = [grid(["run", "steps", "1-shot", "5-shot", "reconstruction", "KL"], lines)]
    parts.append("`5shot_best.pt`, tested on 1,292 of its own training classes:")
    seen = []
    for run, cells in read_json(RESULTS / "recipe/training-classes.json").items():
        scores = [f"{readable(name)} {interval(cell)} %" for name, cell in cells.items()]
        seen.append(f"* `{run}`: {', '.join(scores)}")
    return "\n\n".join([*parts, "\n".join(seen)])


def printed():
    """Show what `make demo` and `make omniglot` printed, and how long they trained."""
    lines = ["```"]
    for name in ("demo", "omniglot"):
        run = read_run(RESULTS / "make" / name)
        seconds = run["seconds"]
        took = f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"
        lines.append(f"make {name}: {took} of training, {device(run)}")
        for cell, r in run["test"].items():
            lines.append(f"test  {cell:>12}  {interval(r):>14} %  ({r['episodes']} episodes)")
    return "\n".join([*lines, "```"])


def main():
    p = Parser(description=__doc__.split("\n")[0])
    p.add_argument("--check", action="store_true", help="write nothing, fail if a table is old")
    check, stale = p.parse_args().check, []
    ablations = seeds_ablations, test_ablations, train_ablations
    readmes = {
        "README.md": {"printed": printed(), "results": table(HEADLINES)},
        "results/README.md": {"results": f"{table()}\n\n{ways_table()}".replace("](results/", "](")},
        "results/recipe/README.md": {"results": recipe_table()},
        "results/ablations/README.md": {"results": "\n\n".join(part() for part in ablations)},
        "results/bench/README.md": {"results": speed_tables()},
    }
    for name, tables in readmes.items():
        path = RESULTS.parent / name
        text = path.read_text(encoding="utf-8")
        if filled(text, tables) != text:
            stale.append(name)
            if not check:
                save(path, lambda temporary: temporary.write_text(filled(text, tables), "utf-8"))
    if check and stale:
        sys.exit(f"{', '.join(stale)}: the result table disagrees with results/; run `make table`")


if __name__ == "__main__":
    main()
