"""Test an Omniglot run on other test data: how much do the split and the resizing matter?

    python results/other_data.py omniglot/published-5way/seed0 --source DIR   # the two official zips

The paper published neither. "resized: ..." is our test split with another filter in place of Lanczos, "sixth
...": one of six disjoint groups of its characters. Writes other-data.json into results/<run>.
"""

import sys
from types import SimpleNamespace

import torch

from ablations import RESULTS, read_json

sys.path[:0] = [str(RESULTS.parent / folder) for folder in ("omniglot", "data/omniglot")]
import prepare  # noqa: E402
from evaluate import TEST_SEED, evaluate_split, summary  # noqa: E402
from machine import Parser, program, user_path  # noqa: E402
from model import load_model  # noqa: E402
from runtime import write_json  # noqa: E402

FILTERS, PARTS = ("lanczos", "nearest", "bilinear", "bicubic"), 6


def variants(source):
    """Yield (name, test images): every filter, then every part with ours, the first filter."""
    images = None
    for name in FILTERS:
        prepare.RESAMPLING = prepare.Image.Resampling[name.upper()]
        resized = torch.from_numpy(prepare.prepare(source)[0]["test"])
        images = resized if images is None else images
        yield f"resized: {name}", resized
    characters = images.unflatten(0, (-1, len(prepare.ROTATIONS)))
    size = len(characters) // PARTS
    for i, part in enumerate(characters[: PARTS * size].split(size), start=1):
        yield f"sixth {i}", part.flatten(0, 1)


def main():
    p = Parser(description=__doc__.split("\n")[0])
    p.add_argument("run", help="a folder of results/ with 1shot_best.pt and 5shot_best.pt")
    p.add_argument("--source", type=user_path, required=True, help="folder of the two official archives")
    args = p.parse_args()
    folder, found = RESULTS / args.run, {}
    with program(), prepare.program():
        models = {shot: load_model(folder / f"{shot}shot_best.pt") for shot in (1, 5)}
        trained = SimpleNamespace(**read_json(folder / "config.json")["args"])
        for name, images in variants(args.source):
            found[name] = {}
            for shot, model in models.items():
                tested = evaluate_split(model, images, [trained.way], [shot], TEST_SEED, trained)
                found[name] |= {cell: summary(accuracies) for cell, accuracies in tested.items()}
            print(name, *(f"{r['accuracy']:.2f} ± {r['ci95']:.2f}" for r in found[name].values()))
        write_json(folder / "other-data.json", found)


if __name__ == "__main__":
    main()
