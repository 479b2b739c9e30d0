"""Store the weights of results/ in half precision: clones are smaller, accuracies the same to 0.01 points.

    python results/halve.py        # every *best.pt of omniglot/ and mimgnet/, unless it is half already

`main.py --eval-only` reads them like any checkpoint, into a float32 network. The weights of a last.pt, which
is too large for a clone, are kept as weights.pt, unless they are the best: restart.py continues from them.
"""

import sys

import torch

from ablations import RESULTS

sys.path.insert(0, str(RESULTS.parent / "omniglot"))
from machine import Parser, UserError, program  # noqa: E402
from runtime import load_checkpoint, save_checkpoint  # noqa: E402


def halve(path):
    """Rewrite a checkpoint with float16 weights. Raises UserError if one is too large for that."""
    checkpoint = load_checkpoint(path)
    before = checkpoint["model"]
    floats = {name for name, value in before.items() if value.dtype == torch.float32}
    halved = {name for name in floats if ".running_" not in name}  # not batch norm's few statistics
    weights = {name: value.half() if name in halved else value for name, value in before.items()}
    if not all(value.isfinite().all() for value in weights.values()):
        raise UserError(f"{path}: weights beyond float16 found, at most 65504 expected")
    if halved:
        save_checkpoint(path, checkpoint | {"model": weights})
        print(path)


def keep_last(path):
    """Write the weights of a last.pt beside it; not with --ema-decay, for they are not the ones to test."""
    checkpoint = load_checkpoint(path)
    steps = {load_checkpoint(best)["step"] for best in path.parent.glob("*best.pt")}
    if checkpoint["step"] not in steps and "average" not in checkpoint:
        kept = {name: checkpoint[name] for name in ("model", "sizes", "way", "step")}
        save_checkpoint(path.with_name("weights.pt"), kept)


def main():
    Parser(description=__doc__.split("\n")[0]).parse_args()
    with program():
        for path in sorted(RESULTS.glob("omniglot/*/seed*/last.pt")):
            keep_last(path)
        for kind in ("omniglot/*/seed*/*best.pt", "omniglot/*/seed*/weights.pt", "mimgnet/*/seed*/best.pt"):
            for path in sorted(RESULTS.glob(kind)):
                halve(path)


if __name__ == "__main__":
    main()
