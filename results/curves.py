"""Draw accuracy and both loss terms of Omniglot's trainings over their steps, as results/omniglot/curves.png.

    python results/curves.py

The points are the validations of metrics.jsonl. Ours decodes another target, so its reconstruction is not
comparable.
"""

import matplotlib.pyplot as plt

from ablations import RESULTS, Parser, read_lines, save_figure
from published import PUBLISHED

OMNIGLOT = RESULTS / "omniglot"
ONE = "published, one sample decoded"
RUNS = {  # ways -> label -> folder; ours is trained and validated at 5 ways
    5: {ONE: "published-5way/seed0", "fast": "5way-long/seed0", "ours": "canonical/seed0"},
    20: {ONE: "published-20way/seed0", "fast": "20way-fast/seed0"},
}


def main():
    Parser(description=__doc__.split("\n")[0]).parse_args()
    figure, rows = plt.subplots(len(RUNS), 4, sharex=True, figsize=(16, 6.4), layout="constrained")
    for axes, (way, runs) in zip(rows, RUNS.items()):
        cells = [f"{way}way{shot}shot" for shot in (1, 5)]
        for label, folder in runs.items():
            lines = read_lines(OMNIGLOT / folder / "metrics.jsonl")
            curves = [[line[cell]["accuracy"] for line in lines] for cell in cells]
            curves += [[line[term] for line in lines] for term in ("reconstruction", "kl")]
            for ax, curve in zip(axes, curves):
                ax.plot([line["step"] for line in lines], curve, ".-", ms=3, lw=1, label=label)
        titles = [f"validation accuracy, {way} ways, {shots} (%)" for shots in ("1 shot", "5 shots")]
        for ax, title in zip(axes, [*titles, "reconstruction (nats an image)", "KL (nats an image)"]):
            ax.set(title=title, xlabel="step", xscale="log")
            ax.grid(alpha=0.3)
        for ax, cell in zip(axes, cells):
            paper = PUBLISHED["omniglot"][cell]
            ax.axhline(paper, color="black", lw=0.8, ls="--", label="the paper, on test")
        axes[1].legend(fontsize=7, loc="lower right")
    save_figure(OMNIGLOT / "curves.png", figure)


if __name__ == "__main__":
    main()
