"""What each part of the method contributes: one thing changed at a time, by a flag of main.py, everything
else equal.

    python results/ablations.py ways omniglot/5way-fast/seed0   # a run at other numbers of ways: a minute
    python results/ablations.py test omniglot/5way-fast/seed0   # one thing changed in the test: minutes
    python results/ablations.py train       # short trainings on Omniglot: minutes each
    python results/ablations.py active      # counts the latent dimensions that all these use
    python results/ablations.py plot        # the figures from what the others have left

`ways` and `test` add to results/ablations/<run>.json, {flags: test.json}; `train` makes a folder
results/ablations/<name> for each training, as any run leaves it, and continues where it was killed; `active`
writes results/ablations/active.json. `make table` puts all into results/ablations/README.md.
"""

import argparse
import json
import os
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
    "--e-step learned", "--e-step k-means",
    "--semisupervised-em-iters 0", "--semisupervised-em-iters 1", "--semisupervised-em-iters 2",
    "--semisupervised-em-iters 5", "--semisupervised-em-iters 20",
    "--test-mc-sample-size 1", "--test-mc-sample-size 4", "--test-mc-sample-size 128",
    "--no-set-attention",
]  # fmt: skip
SHORT = "--train-mc-sample-size 1 --kl-warmup-iters 600 --train-iters 600 --freq-iters 150 --ema-decay 0.98"
MINI = "--train-mc-sample-size 16 --freq-iters 1500"  # as results/mimgnet/5way-fast, with which to compare
TRAIN = {  # name -> what differs from SHORT or, for Mini-ImageNet, from MINI; a later flag overrides
    "as-the-others": "",
    "seed-1": "--seed 1",
    "seed-2": "--seed 2",
    "kl-warmup-none": "--kl-warmup-iters 0",
    "kl-warmup-200": "--kl-warmup-iters 200",
    "no-set-attention": "--no-set-attention",
    "fix-pi": "--fix-pi",
    "mc-samples-4": "--train-mc-sample-size 4",
    "mc-samples-32": "--train-mc-sample-size 32",
    "mimgnet-em-start-images": "--em-start images",
}
CPU = [name for name in TRAIN if name != "mc-samples-32"]  # that one: 600 steps of four seconds


def main_py(experiment, data_dir, *flags):
    """`python main.py <flags>` in an experiment's folder; leaves with its exit status if it fails."""
    folder = RESULTS.parent / experiment
    data_dir = data_dir or RESULTS.parent / DATA[experiment]
    done = subprocess.run(
        [sys.executable, "main.py", "--data-dir", os.path.relpath(data_dir, folder), *map(str, flags)],
        cwd=folder,
    )
    if done.returncode:
        sys.exit(done.returncode)  # it has said why


def test(run, variants, data_dir):
    """The checkpoints of results/<run> with every one of some flags, on the same test episodes."""
    path = OUT / f"{run}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for variant in variants:
        with tempfile.TemporaryDirectory() as out:
            flags = ["--eval-only", "--checkpoint", RESULTS / run, "--save-dir", out, "--test-shot", 1, 5]
            main_py(run.split("/")[0], data_dir, *flags, *variant.split())
            results[variant] = json.loads(Path(out, "test.json").read_text())
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, lambda temporary: temporary.write_text(json.dumps(results, indent=1) + "\n"))


def train(names, data_dir):
    """The trainings of TRAIN that are not finished yet."""
    for name in names or CPU:
        if (OUT / name / "test.json").exists():
            print(f"{OUT / name}: finished, nothing done; remove it to train again")
        else:
            experiment, flags = ("mimgnet", MINI) if name.startswith("mimgnet-") else ("omniglot", SHORT)
            main_py(
                experiment,
                data_dir,
                "--save-dir",
                f"../results/ablations/{name}",
                "--resume",
                *flags.split(),
                *TRAIN[name].split(),
            )


def active_dims(mean, log_var):
    """How many latent dimensions carry a signal above their noise: Var_x E[z|x] > E_x Var[z|x] (the active
    units of Burda et al. 2016, with the noise as the threshold). mean, log_var (images, D) of q(z|x)."""
    return int((mean.var(0, correction=0) > log_var.exp().mean(0)).sum())


def active(data_dir):
    """{training: [active dimensions, latent size]} of every Omniglot model in results/, on the validation
    images in sets of 200."""
    sys.path.insert(0, str(RESULTS.parent / "omniglot"))
    import torch
    from dataloader import draw_sets, load_split
    from model import load_model
    from machine import program

    path = OUT / "active.json"
    counts = (
        json.loads(path.read_text()) if path.exists() else {}
    )  # the trainings' weights are not in the repository
    with program(), torch.inference_mode():
        images = load_split(data_dir or RESULTS.parent / DATA["omniglot"], "val").flatten(0, 1)
        sets = draw_sets(images, len(images) // 200, 200, torch.Generator().manual_seed(0))
        for weights in [
            *sorted(RESULTS.glob("omniglot/*/seed*/1shot_best.pt")),
            *sorted(OUT.glob("*/1shot_best.pt")),
        ]:
            model = load_model(weights)
            terms = [model.posterior(model.encode(x).unsqueeze(0)) for x in sets]
            place = RESULTS if weights.is_relative_to(RESULTS / "omniglot") else OUT
            name = weights.parent.relative_to(place).as_posix()
            counts[name] = [
                active_dims(*(torch.cat(parts, 1)[0] for parts in zip(*terms))),
                model.sizes["latent_size"],
            ]
            print(name, *counts[name])
    save(path, lambda temporary: temporary.write_text(json.dumps(counts, indent=1) + "\n"))


def tested():
    """{run: {flags: its test.json}} of what `ways` and `test` have left."""
    found = {
        path.relative_to(OUT): json.loads(path.read_text()) for path in sorted(OUT.glob("*/*/seed*.json"))
    }
    return {path.with_suffix("").as_posix(): variants for path, variants in found.items()}


def other_ways():
    """{Omniglot run without its seed: [test.json at every number of ways, of each seed]}, as far as `ways`
    was run."""
    runs = {}
    for run, variants in tested().items():
        if run.startswith("omniglot/") and WAYS in variants:
            runs.setdefault(run.rpartition("/")[0], []).append(variants[WAYS])
    return runs


def plot():
    """ways.png: accuracy over the number of ways, shaded between the seeds of a run; kl.png: the KL term and
    the accuracy while the warm-ups differ."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    for run, seeds in other_ways().items():
        for axis, shot in zip(axes, (1, 5)):
            ways = [5, 10, 15, 20]
            accuracies = [[test[f"{way}way{shot}shot"]["accuracy"] for test in seeds] for way in ways]
            (line,) = axis.plot(ways, list(map(statistics.fmean, accuracies)), marker="o", label=run)
            if len(seeds) > 1:
                axis.fill_between(
                    ways,
                    list(map(min, accuracies)),
                    list(map(max, accuracies)),
                    color=line.get_color(),
                    alpha=0.2,
                )
            axis.set(title=f"Omniglot, {shot}-shot test", xlabel="ways at test", xticks=ways)
    axes[0].set_ylabel("accuracy, %")
    axes[0].legend(title="trained model")
    save_figure(OUT / "ways.png", figure)

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for name in ("kl-warmup-none", "kl-warmup-200", "as-the-others"):
        if not (OUT / name / "metrics.jsonl").exists():
            continue  # not run yet
        lines = [json.loads(line) for line in (OUT / name / "metrics.jsonl").read_text().splitlines()]
        iters = json.loads((OUT / name / "config.json").read_text())["args"]["kl_warmup_iters"]
        steps = [line["step"] for line in lines]
        axes[0].plot(
            steps, [line["kl"] for line in lines], marker=".", label=f"{iters} steps" if iters else "none"
        )
        axes[1].plot(steps, [line["5way1shot"]["accuracy"] for line in lines], marker=".")
    axes[0].set(title="KL term", xlabel="step", ylabel="nats an image", ylim=(0, None))
    axes[0].legend(title="KL warm-up")
    axes[1].set(title="validation, 5-way 1-shot", xlabel="step", ylabel="accuracy, %")
    save_figure(OUT / "kl.png", figure)


def save(path, write):
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)
    print(path)


def save_figure(path, figure):
    save(path, lambda temporary: figure.savefig(temporary, format="png", dpi=90, bbox_inches="tight"))


class Parser(argparse.ArgumentParser):
    """Says an error in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def main():
    p = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("what", choices=["ways", "test", "train", "active", "plot"], help="see above")
    p.add_argument(
        "names",
        nargs="*",
        help="ways, test: folders of results/; train: names of TRAIN (default: what a CPU can do)",
    )
    p.add_argument("--data-dir", type=Path, help="prepared arrays, if not in data/")
    args = p.parse_args()
    known = (
        sorted(TRAIN)
        if args.what == "train"
        else sorted(
            path.parent.relative_to(RESULTS).as_posix()
            for name in DATA
            for path in RESULTS.glob(f"{name}/*/seed*/config.json")
        )
    )
    if args.what in ("ways", "test") and not args.names:
        p.error(f"no run found, at least one of {', '.join(known)} expected")
    for name in args.names:
        if name not in known:
            p.error(f"{name} found, one of {', '.join(known)} expected")
    OUT.mkdir(exist_ok=True)
    if args.what in ("ways", "test"):
        for run in args.names:
            test(run, TEST if args.what == "test" else [WAYS], args.data_dir)
    elif args.what == "train":
        train(args.names, args.data_dir)
    elif args.what == "active":
        active(args.data_dir)
    else:
        plot()


if __name__ == "__main__":
    main()
