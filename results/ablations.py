"""Change one thing at a time, by a flag of main.py, to see what each part of the method contributes.

    python results/ablations.py ways omniglot/5way-fast/seed0   # a run at other numbers of ways: a minute
    python results/ablations.py test omniglot/5way-fast/seed0   # one thing changed in the test: minutes
    python results/ablations.py train       # short trainings, mostly on Omniglot: minutes each
    python results/ablations.py ours        # the same for our recipe, recipes/quick.txt, with three seeds
    python results/ablations.py decoded     # 600 steps of the published recipe: all 32 samples decoded, or 1
    python results/ablations.py active      # count the latent dimensions that Omniglot models use
    python results/ablations.py plot        # the figures of these results

`ways` and `test` add to results/ablations/<run>.json, {flags: test.json}. `train` writes each training to
results/ablations/<name>, like any run, and continues where it was killed; `ours` and `decoded` write to
results/ablations/<ours or decoded>/<name>/seed<N>, `active` to results/ablations/active.json. `make table`
puts `ways` in results/README.md and the others in results/ablations/README.md.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).resolve().parent
OUT = RESULTS / "ablations"
DATA = {"omniglot": "data/omniglot", "mimgnet": "data/imgnet"}

WAYS = "--test-way 5 10 15 20"
TEST = [
    "",  # the protocol itself
    "--e-step learned", "--e-step tied", "--e-step k-means",
    "--semisupervised-em-iters 0", "--semisupervised-em-iters 1", "--semisupervised-em-iters 2",
    "--semisupervised-em-iters 5", "--semisupervised-em-iters 20",
    "--test-mc-sample-size 1", "--test-mc-sample-size 4", "--test-mc-sample-size 128",
    "--no-set-attention",
]  # fmt: skip
# These two are short, and default to float32; the runs kept are from before, with --precision auto.
SHORT = "--train-mc-sample-size 1 --kl-warmup-iters 600 --train-iters 600 --freq-iters 150 --ema-decay 0.98"
MINI = "--train-mc-sample-size 16 --freq-iters 1500"  # as results/mimgnet/5way-fast, to compare with it
BASE = {"omniglot": SHORT, "mimgnet": MINI}  # the flags of every training
TRAIN = {  # experiment -> name -> what differs; a later flag overrides
    "omniglot": {
        "as-the-others": "",
        "seed-1": "--seed 1",
        "seed-2": "--seed 2",
        "kl-warmup-none": "--kl-warmup-iters 0",
        "kl-warmup-200": "--kl-warmup-iters 200",
        "no-set-attention": "--no-set-attention",
        "fix-pi": "--fix-pi",
        "mc-samples-4": "--train-mc-sample-size 4",
        "mc-samples-32": "--train-mc-sample-size 32",
    },
    "mimgnet": {"mimgnet-em-start-images": "--em-start images"},
}
OURS = {  # name -> flags that differ from recipes/quick.txt
    "target-drawing": "--target drawing",
    "target-centred": "",
    "target-shape-0": "--target-shape 0",
    "target-shape-0.5": "--target-shape 0.5",
    "input-canonical": "--target drawing",
    "warp-affine": "--warp affine",
    "warp-elastic": "--warp elastic",
    "kl-weight-0.02": "--kl-weight 0.02",
    "kl-weight-0.15": "--kl-weight 0.15",
    "kl-weight-1": "--kl-weight 1",
    "precision-fp32": "--precision fp32",  # the recipe's is bfloat16 where it is fast
    "em-iters-0": "--unsupervised-em-iters 0",
    "em-iters-1": "--unsupervised-em-iters 1",
}
SEEDS = {  # what is run in three seeds: the flags of every training, and its names
    "ours": ("@recipes/quick.txt", OURS),
    "decoded": (
        "@recipes/published-5way.txt --precision auto --train-iters 600 --freq-iters 200",
        {"one": "--decode-samples 1", "all": ""},
    ),
}
CODE = {  # of OURS, changes that no flag makes: run before main()
    "target-centred": "main.canonical = lambda x, p: "
    "pose.canonical(x, (p[0], torch.eye(2).expand_as(p[1])))",
    "input-canonical": "load = main.load_splits; main.load_splits = lambda args: "
    "{name: pose.canonical(x / 255, pose.pose(x)) for name, x in load(args).items()}",
}
CODE = {name: f"import main, pose, torch; {code}; main.main()" for name, code in CODE.items()}
SLOW = "mc-samples-32"  # 600 steps of four seconds on a CPU: run only if named


def main_py(experiment, data_dir, *flags, code=None):
    """Run `python main.py <flags>`, or code in its place, in a folder; exit with its status if it fails."""
    folder = RESULTS.parent / experiment
    data = os.path.relpath(data_dir or RESULTS.parent / DATA[experiment], folder)
    program = ["-c", code] if code else ["main.py"]
    command = [sys.executable, *program, "--data-dir", data, *map(str, flags)]
    before = signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches the program, which saves and ends
    done = subprocess.run(command, cwd=folder)
    signal.signal(signal.SIGINT, before)
    if done.returncode:
        sys.exit(done.returncode)  # it has said why


def test(run, variants, data_dir):
    """Test the checkpoints of results/<run> with each variant of flags, on the same episodes."""
    path = OUT / f"{run}.json"
    reading = read_json(RESULTS / run / "config.json")["args"]["e_step"]
    for variant in variants:
        with tempfile.TemporaryDirectory() as out:
            flags = ["--eval-only", "--checkpoint", RESULTS / run, "--save-dir", out, "--test-shot", 1, 5]
            flags += ["--e-step", reading] if variant == WAYS else []  # other ways, with the run's own E-step
            main_py(run.split("/")[0], data_dir, *flags, *variant.split())
            found = read_json(Path(out, "test.json"))
        save_json(path, (read_json(path) if path.exists() else {}) | {variant: found})


def train_in(name, experiment, flags, data_dir, code=None):
    """Train in results/ablations/<name>, from the start or where it was killed, unless it is finished."""
    if (OUT / name / "test.json").exists():
        print(f"{OUT / name}: finished, nothing done; remove it to train again")
        return
    flags = f"{flags} --save-dir ../results/ablations/{name} --resume"
    main_py(experiment, data_dir, *flags.split(), code=code)


def train(names, data_dir):
    """Run those trainings of TRAIN that are not finished yet."""
    for experiment, trainings in TRAIN.items():
        for name, changed in trainings.items():
            if name in names:
                train_in(name, experiment, f"{BASE[experiment]} {changed}", data_dir)


def train_seeds(what, names, data_dir):
    """Run those trainings of SEEDS[what] that are not finished yet, each in three seeds."""
    base, changes = SEEDS[what]
    for name in names or changes:
        for seed in range(3):
            flags = f"{base} --seed {seed} {changes[name]}"
            train_in(f"{what}/{name}/seed{seed}", "omniglot", flags, data_dir, CODE.get(name))


def active_dims(mean, log_var):
    """Count the latent dimensions that carry a signal above their noise: Var_x E[z|x] > E_x Var[z|x].

    Those are the active units of Burda et al. 2016, with the noise as the threshold. mean, log_var (images,
    D) of q(z|x).
    """
    return int((mean.var(0, correction=0) > log_var.exp().mean(0)).sum())


def active(data_dir):
    """Write {training: [active dimensions, latent size]} of every Omniglot model whose weights are here.

    It encodes the validation images in sets of 200. Counts of models that are gone stay.
    """
    sys.path.insert(0, str(RESULTS.parent / "omniglot"))
    import torch
    from dataloader import draw_sets, load_split
    from model import load_model
    from machine import program

    path = OUT / "active.json"
    counts = read_json(path) if path.exists() else {}
    models = {name_of(w.parent): w for w in sorted(RESULTS.glob("omniglot/*/seed*/1shot_best.pt"))}
    models |= {w.parent.name: w for w in sorted(OUT.glob("*/1shot_best.pt"))}
    with program(), torch.inference_mode():
        images = load_split(data_dir or RESULTS.parent / DATA["omniglot"], "val").flatten(0, 1)
        sets = draw_sets(images, len(images) // 200, 200, torch.Generator().manual_seed(0))
        for name, weights in models.items():
            model = load_model(weights)
            terms = [model.posterior(model.encode(x).unsqueeze(0)) for x in sets]
            mean, log_var = (torch.cat(parts, 1)[0] for parts in zip(*terms))
            counts[name] = [active_dims(mean, log_var), model.sizes["latent_size"]]
            print(name, *counts[name])
    save_json(path, counts)


def name_of(folder, root=RESULTS):
    """Return a folder's name in results/: <experiment>/<recipe>/seed<N> of a run."""
    return folder.relative_to(root).as_posix()


def tested():
    """Read {run: {flags: its test.json}}, written by `ways` and `test`."""
    paths = sorted(OUT.glob("*/*/seed*.json"))
    return {name_of(path.with_suffix(""), OUT): read_json(path) for path in paths}


def other_ways():
    """Read {Omniglot recipe: [test.json at every number of ways, of each seed]}, as far as `ways` was run."""
    runs = {}
    for run, variants in tested().items():
        if run.startswith("omniglot/") and WAYS in variants:
            runs.setdefault(run.rpartition("/")[0], []).append(variants[WAYS])
    return runs


def plot():
    """Draw ways.png and kl.png.

    ways.png: accuracy over the number of ways, shaded between the seeds of a recipe. kl.png: the KL term and
    the accuracy with several warm-ups.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    ways = [5, 10, 15, 20]
    for recipe, seeds in other_ways().items():
        for axis, shot in zip(axes, (1, 5)):
            accuracies = [[test[f"{way}way{shot}shot"]["accuracy"] for test in seeds] for way in ways]
            least, mean, most = (list(map(of, accuracies)) for of in (min, statistics.fmean, max))
            (line,) = axis.plot(ways, mean, marker="o", label=recipe)
            if len(seeds) > 1:
                axis.fill_between(ways, least, most, color=line.get_color(), alpha=0.2)
            axis.set(title=f"Omniglot, {shot}-shot test", xlabel="ways at test", xticks=ways)
    axes[0].set_ylabel("accuracy, %")
    axes[1].legend(title="trained model", loc="lower left")
    save_figure(OUT / "ways.png", figure)

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for name in ("kl-warmup-none", "kl-warmup-200", "as-the-others"):
        if not (OUT / name / "metrics.jsonl").exists():
            continue  # not run yet
        lines = read_lines(OUT / name / "metrics.jsonl")
        steps = [line["step"] for line in lines]
        iters = read_json(OUT / name / "config.json")["args"]["kl_warmup_iters"]
        label = f"{iters} steps" if iters else "none"
        axes[0].plot(steps, [line["kl"] for line in lines], marker=".", label=label)
        axes[1].plot(steps, [line["5way1shot"]["accuracy"] for line in lines], marker=".")
    axes[0].set(title="KL term", xlabel="step", ylabel="nats an image", ylim=(0, None))
    axes[0].legend(title="KL warm-up")
    axes[1].set(title="validation, 5-way 1-shot", xlabel="step", ylabel="accuracy, %")
    save_figure(OUT / "kl.png", figure)


def read_json(path):
    return json.loads(path.read_text())


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def save(path, write):
    """Write a file whole or not at all; write(path) writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)
    print(path)


def save_json(path, content):
    save(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n"))


def save_figure(path, figure):
    save(path, lambda temporary: figure.savefig(temporary, format="png", dpi=90, bbox_inches="tight"))


class Parser(argparse.ArgumentParser):
    """Parse flags; print an error in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def main():
    p = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("what", choices=["ways", "test", "train", *SEEDS, "active", "plot"], help="see docstring")
    names = "ways, test: folders of results/; otherwise names of trainings (default: all but the slowest)"
    p.add_argument("names", nargs="*", help=names)
    p.add_argument("--data-dir", type=Path, help="prepared arrays, if not in data/")
    args = p.parse_args()
    known = sorted(name for trainings in TRAIN.values() for name in trainings)
    if args.what in SEEDS:
        known = list(SEEDS[args.what][1])
    elif args.what != "train":
        folders = [path.parent for path in RESULTS.glob("*/*/seed*/config.json")]
        known = sorted(name_of(folder) for folder in folders if folder.parts[-3] in DATA)
    if args.what in ("ways", "test") and not args.names:
        p.error(f"no run found, at least one of {', '.join(known)} expected")
    for name in args.names:
        if name not in known:
            p.error(f"{name} found, one of {', '.join(known)} expected")
    if args.what in ("ways", "test"):
        for run in args.names:
            test(run, TEST if args.what == "test" else [WAYS], args.data_dir)
    elif args.what == "train":
        train(args.names or [name for name in known if name != SLOW], args.data_dir)
    elif args.what in SEEDS:
        train_seeds(args.what, args.names, args.data_dir)
    elif args.what == "active":
        active(args.data_dir)
    else:
        plot()


if __name__ == "__main__":
    main()
