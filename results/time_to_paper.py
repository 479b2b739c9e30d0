"""Measure the seconds of training until Omniglot's test passes the paper's accuracy at 5 ways.

    python results/time_to_paper.py             # seeds 0, 1 and 2 of omniglot/recipes/quick.txt, from scratch

Each seed is one run of omniglot/main.py into <out>/seed<N>: training, then the full test of 1,000 episodes.
The seconds are those of the training steps: start-up, the one validation at the end and the test are not
among them. Exits with status 1 if a seed stays below the paper at 1 or 5 shots.
"""

import os
import statistics
import sys
from pathlib import Path

from ablations import RESULTS, Parser, main_py, read_json, read_lines
from published import PUBLISHED

PAPER = {cell: accuracy for cell, accuracy in PUBLISHED["omniglot"].items() if cell.startswith("5way")}


def run(folder, data_dir, flags):
    """Train and test in a folder; return (seconds of training, {cell: accuracy in %})."""
    place = os.path.relpath(folder, RESULTS.parent / "omniglot")
    main_py("omniglot", data_dir, "@recipes/quick.txt", "--save-dir", place, *flags)
    trained, test = read_lines(folder / "metrics.jsonl")[-1], read_json(folder / "test.json")
    return trained["seconds"], {cell: test[cell]["accuracy"] for cell in PAPER}


def main():
    p = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--out", type=Path, default=RESULTS.parent / "runs/quick", help="new folder for the runs")
    p.add_argument("--data-dir", type=Path, help="prepared arrays, if not in data/")
    args, flags = p.parse_known_args()  # the others are main.py's
    out = args.out.resolve()
    runs = [run(out / f"seed{n}", args.data_dir, ["--seed", n, *flags]) for n in args.seeds]
    print(f"\n{'seed':>5}  {'seconds':>7}  " + "  ".join(PAPER))
    for n, (seconds, test) in zip(args.seeds, runs):
        print(f"{n:>5}  {seconds:7.1f}  " + "  ".join(f"{accuracy:9.2f}" for accuracy in test.values()))
    seconds = statistics.mean(taken for taken, _ in runs)
    means = [statistics.mean(test[cell] for _, test in runs) for cell in PAPER]
    print(f"{'mean':>5}  {seconds:7.1f}  " + "  ".join(f"{accuracy:9.2f}" for accuracy in means))
    print(f"{'paper':>5}  {'':7}  " + "  ".join(f"{accuracy:9.2f}" for accuracy in PAPER.values()))
    sys.exit(any(test[cell] < accuracy for _, test in runs for cell, accuracy in PAPER.items()))


if __name__ == "__main__":
    main()
