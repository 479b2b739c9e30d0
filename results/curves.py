"""Draw accuracy and both loss terms of Omniglot's trainings over their steps, as results/omniglot/curves.png.

    python results/curves.py

The points are the validations of metrics.jsonl. Ours decodes another target, so its reconstruction is not
comparable.
"""

import matplotlib.pyplot as plt

from ablations import RESULTS, read_lines, save_figure
from published import PUBLISHED

OMNIGLOT = RESULTS / "omniglot"
RUNS = {
    "published, one sample decoded": "published-5way/seed0",
    "fast: small sets, KL warm-up, cosine": "5way-long/seed0",
    "ours": "canonical/seed0",
}
PANELS = {
    "accuracy, 5 ways, 1 shot (%)": lambda line: line["5way1shot"]["accuracy"],
    "accuracy, 5 ways, 5 shots (%)": lambda line: line["5way5shot"]["accuracy"],
    "reconstruction (nats an image)": lambda line: line["reconstruction"],
    "KL (nats an image)": lambda line: line["kl"],
}


def main():
    figure, axes = plt.subplots(1, len(PANELS), figsize=(4 * len(PANELS), 3.2), layout="constrained")
    for label, folder in RUNS.items():
        lines = read_lines(OMNIGLOT / folder / "metrics.jsonl")
        for ax, value in zip(axes, PANELS.values()):
            ax.plot([line["step"] for line in lines], list(map(value, lines)), ".-", ms=3, lw=1, label=label)
    for ax, title in zip(axes, PANELS):
        ax.set(title=title, xlabel="step", xscale="log")
        ax.grid(alpha=0.3)
    for ax, cell in zip(axes, ("5way1shot", "5way5shot")):
        ax.axhline(PUBLISHED["omniglot"][cell], color="black", lw=0.8, ls="--", label="the paper, on test")
    axes[1].legend(fontsize=7, loc="lower right")
    save_figure(OMNIGLOT / "curves.png", figure)


if __name__ == "__main__":
    main()
