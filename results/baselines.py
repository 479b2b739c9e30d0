"""Test few-shot classifiers without Meta-GMVAE: what the VAE adds to what it is given.

    python results/baselines.py simclr/prototypical/seed0  # on features in data/imgnet, or --data-dir
    python results/baselines.py omniglot                   # on the drawings in data/omniglot: no training

Nearest support mean looks at one query at a time. EM starts there and looks at the queries together; it is
`adapt` of mixture.py on the features or pixels themselves. Writes baselines.json into results/<run>.
"""

import json
import sys
import zlib
from pathlib import Path

import numpy as np
import torch

RESULTS = Path(__file__).resolve().parent
sys.path.insert(0, str(RESULTS.parent / "omniglot"))
from dataloader import as_float, draw_episodes, load_split  # noqa: E402
from evaluate import TEST_SEED, summary  # noqa: E402
from machine import Parser, UserError, in_short, program  # noqa: E402
from mixture import classify  # noqa: E402
from pose import canonical, pose  # noqa: E402
from runtime import load_checkpoint, read_config, write_json  # noqa: E402

CLASSIFIERS = {  # EM iterations, reading of the E-step
    "nearest mean": (0, "unit"), "EM": (10, "unit"), "EM, tied-full E-step,": (10, "tied-full"),
}  # fmt: skip
QUERY, EPISODES, IMAGES = 15, 1000, 600
DESCRIBED = (  # of a run's flags, in features.json
    "train_epochs batch_size view_size loss views crop_scale jitter hue neighbours feature_size lda".split()
)
CELLS = {"omniglot": ([5, 20], [1, 5]), "simclr": ([5], [1, 5, 20, 50])}  # ways, shots


def accuracies(features, way, shot, iters, reading="unit"):
    """Return the accuracy of each episode, in percent; features (classes, images of a class, width)."""
    episodes = draw_episodes(features, way, shot, QUERY, EPISODES, TEST_SEED)
    labels, found = torch.arange(way).repeat_interleave(QUERY), []
    for index in episodes.split(100 // way):
        h = features.flatten(0, 1)[index].unsqueeze(3)  # (B, way, members, 1, width): one sample an image
        chosen = classify(h[:, :, :shot], h[:, :, shot:].flatten(1, 2), iters, reading).argmax(-1)
        found.append(100 * (chosen == labels).float().mean(-1))
    return torch.cat(found)


def load_features(folder, run):
    """Load test features, without --lda standardised by training features: (classes, images, width).

    Raises UserError if they were not made as results/<run> says, by its encoder where that was kept.
    """
    path, encoder = folder / "features.json", RESULTS / run / "encoder.pt"
    args = read_config(RESULTS / run)["args"]
    expected = {name: args[name] for name in DESCRIBED if name in args}  # an old run has fewer flags
    if encoder.exists():
        weights = load_checkpoint(encoder)["model"].values()
        expected["encoder_crc32"] = zlib.crc32(b"".join(tensor.numpy().tobytes() for tensor in weights))
    try:
        found = {name: None for name in expected} | json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: not found, the features of {run} and their description expected") from None
    except (OSError, ValueError, TypeError):
        raise UserError(f"{path}: not readable, the description of the features of {run} expected") from None
    for name, value in expected.items():
        if found[name] != value:
            raise UserError(f"{path}: {name} {found[name]} found, {value} expected, as in {run}")
    arrays = {}
    for name in ("train", "test"):
        file = folder / f"{name}_features.npy"
        try:
            arrays[name] = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{file}: not a readable .npy array ({in_short(error)})") from None
        if zlib.crc32(arrays[name]) != found.get("crc32", {}).get(name):
            raise UserError(f"{file}: other features than {path.name} beside it describes")
    train, test = (torch.from_numpy(array) for array in arrays.values())
    each = (found.get("images_per_class") or {}).get("test", IMAGES)
    if each != IMAGES or len(test) % IMAGES:
        said = f"{len(test)} test images, {each} a class found, {IMAGES} expected as in {run}"
        raise UserError(f"{path}: {said}")
    if not found.get("lda"):
        test = (test - train.mean(0)) / train.std(0).clamp_min(1e-6)
    return test.unflatten(0, (-1, IMAGES))


def main():
    p = Parser(description=__doc__.split("\n")[0])
    trained = (path.parent.relative_to(RESULTS) for path in RESULTS.glob("simclr/*/seed*/config.json"))
    runs, made = ["omniglot", *sorted(map(str, trained))], "omniglot, or the run that made the features"
    p.add_argument("run", choices=runs, metavar="RUN", help=made)
    p.add_argument("--data-dir", type=Path, help="folder of the arrays or features, if not in data/")
    args = p.parse_args()
    with program():
        experiment, cells = args.run.split("/")[0], {}
        if experiment == "omniglot":
            x = as_float(load_split(args.data_dir or RESULTS.parent / "data/omniglot", "test"))
            of = read_config(RESULTS / "omniglot/canonical/seed0")
            if of and [*x.shape] != of["data"]["test"]["shape"]:
                expected = f"Omniglot's {of['data']['test']['shape']} expected"
                raise UserError(f"--data-dir: test.npy of shape {[*x.shape]} found, {expected}")
            inputs = {"the drawings": x, "drawings without their pose": canonical(x, pose(x))}
            inputs = {f" on {name}": images.flatten(2) for name, images in inputs.items()}
        else:
            inputs = {"": load_features(args.data_dir or RESULTS.parent / "data/imgnet", args.run)}
        ways, shots = CELLS[experiment]
        for of, features in inputs.items():
            for name, how in CLASSIFIERS.items():
                if experiment == "omniglot" and "tied-full" in how:
                    continue  # a covariance of 784 pixels
                found = {
                    f"{way}way{shot}shot": summary(accuracies(features, way, shot, *how))
                    for way in ways
                    for shot in shots
                }
                cells[name + of] = found
                print(name + of, *(f"{r['accuracy']:.2f} ± {r['ci95']:.2f}" for r in found.values()))
        write_json(RESULTS / args.run / "baselines.json", cells)


if __name__ == "__main__":
    main()
