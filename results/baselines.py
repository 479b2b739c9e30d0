"""Test few-shot classifiers on Mini-ImageNet's features alone: what Meta-GMVAE adds to them.

    python results/baselines.py simclr/prototypical/seed0    # features in data/imgnet, or --data-dir

Nearest support mean looks at one query at a time. EM starts there and looks at the queries together; it is
`adapt` of mixture.py on the features themselves. Writes baselines.json into the run's folder.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

RESULTS = Path(__file__).resolve().parent
sys.path.insert(0, str(RESULTS.parent / "mimgnet"))
from dataloader import draw_episodes  # noqa: E402
from evaluate import TEST_SEED, summary  # noqa: E402
from machine import program  # noqa: E402
from mixture import classify  # noqa: E402
from runtime import write_json  # noqa: E402

CLASSIFIERS = {"nearest mean": 0, "EM": 10}  # EM iterations
QUERY, EPISODES, IMAGES = 15, 1000, 600


def accuracies(features, shot, iters):
    """Return the accuracy of each 5-way episode, in percent; features (classes, images of a class, width)."""
    episodes = draw_episodes(features, 5, shot, QUERY, EPISODES, TEST_SEED)
    labels, found = torch.arange(5).repeat_interleave(QUERY), []
    for index in episodes.split(50):
        h = features.flatten(0, 1)[index].unsqueeze(3)  # (B, way, members, 1, width): one sample an image
        chosen = classify(h[:, :, :shot], h[:, :, shot:].flatten(1, 2), iters).argmax(-1)
        found.append(100 * (chosen == labels).float().mean(-1))
    return torch.cat(found)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("run", help="folder of results/ whose encoder made the features")
    data_dir = RESULTS.parent / "data/imgnet"
    p.add_argument("--data-dir", type=Path, default=data_dir, help="folder of the features")
    args = p.parse_args()
    with program():
        paths = (args.data_dir / f"{split}_features.npy" for split in ("train", "test"))
        train, test = (torch.from_numpy(np.load(path)) for path in paths)
        features = ((test - train.mean(0)) / train.std(0).clamp_min(1e-6)).unflatten(0, (-1, IMAGES))
        cells = {}
        for name, iters in CLASSIFIERS.items():
            cells[name] = {f"5way{s}shot": summary(accuracies(features, s, iters)) for s in (1, 5, 20, 50)}
            print(name, *(f"{cell['accuracy']:.2f} ± {cell['ci95']:.2f}" for cell in cells[name].values()))
        write_json(RESULTS / args.run / "baselines.json", cells)


if __name__ == "__main__":
    main()
