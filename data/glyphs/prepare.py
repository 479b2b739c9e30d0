"""Invented characters -> train.npy, val.npy, test.npy, split.json in Omniglot's format; no download.

    python data/glyphs/prepare.py                   # 300 / 60 / 100 characters, a few seconds
    python data/glyphs/prepare.py --out DIR --seed 1 --train 1000

A character is two to four smooth strokes; its 20 drawings differ in pen jitter, slant, scale, place and
thickness. Arrays are (characters, 20, 28, 28, 1) uint8, ink high. Every class is a character of its own,
without Omniglot's rotations. The same seed gives the same bytes.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))
from common import Parser, program, user_path, write_all  # noqa: E402

SPLITS = {"train": 300, "val": 60, "test": 100}  # characters
DRAWINGS, SIZE = 20, 28
KNOTS, POINTS = 6, 40  # of a stroke: points that are jittered, and points that are inked


def invent(rng):
    """Invent a character: (strokes, KNOTS, 2) positions in the square [-1, 1], 2 to 4 strokes.

    The pen sets out along an axis or a diagonal and turns at an almost constant rate, which gives lines,
    arcs, hooks and loops; most strokes touch an earlier one, as in most scripts.
    """
    strokes = []
    for i in range(rng.choice([2, 3, 4], p=[0.4, 0.4, 0.2])):
        length, heading = rng.uniform(0.7, 2.0), rng.integers(8) * np.pi / 4 + rng.normal(0, 0.15)
        turn = rng.choice([0, 1, 2], p=[0.3, 0.45, 0.25]) * rng.choice([-1, 1]) * rng.uniform(1.2, 2.6)
        t = np.linspace(0, 1, 10 * KNOTS)
        angle = heading + turn * t + rng.normal(0, 0.5) * t**2
        path = np.cumsum(np.stack([np.cos(angle), np.sin(angle)], -1), 0) * length / len(t)
        if i and rng.random() < 0.65:
            earlier = strokes[rng.integers(i)]
            path += earlier[rng.integers(KNOTS)] - path[rng.choice([0, len(t) // 2])]
        else:
            path += rng.uniform(-0.6, 0.6, 2) - path.mean(0)
        strokes.append(path[np.linspace(0, len(t) - 1, KNOTS).round().astype(int)])
    strokes = np.stack(strokes)
    low, high = strokes.min((0, 1)), strokes.max((0, 1))
    return (strokes - (low + high) / 2) * rng.uniform(1.5, 1.8) / (high - low).max()


def curve(knots):
    """Draw a Catmull-Rom curve through knots (..., KNOTS, 2) -> (..., POINTS, 2)."""
    ends = 2 * knots[..., :1, :] - knots[..., 1:2, :], 2 * knots[..., -1:, :] - knots[..., -2:-1, :]
    k = np.concatenate([ends[0], knots, ends[1]], -2)
    t = np.linspace(0, KNOTS - 1, POINTS)
    i = np.minimum(t.astype(int), KNOTS - 2)
    t = (t - i)[:, None]
    a, b, c, d = (k[..., i + j, :] for j in range(4))
    return 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)


def draw(strokes, rng):
    """Draw 20 versions of a character: (strokes, KNOTS, 2) -> (DRAWINGS, strokes * POINTS, 2) in pixels."""
    n = len(strokes)
    wobble = rng.normal(0, 0.03, (DRAWINGS, n, KNOTS, 2))
    misplaced = rng.normal(0, 0.07, (DRAWINGS, n, 1, 2))
    stretched = np.exp(rng.normal(0, 0.15, (DRAWINGS, n, 1, 1)))
    middle = strokes.mean(1, keepdims=True)
    knots = (strokes - middle) * stretched + middle + misplaced + wobble
    angle, slant = rng.normal(0, 0.1, DRAWINGS), rng.normal(0, 0.15, DRAWINGS)
    rotate = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], -1).reshape(-1, 2, 2)
    shear = np.eye(2) + slant[:, None, None] * np.array([[0, 1], [0, 0]])
    scale = np.exp(rng.normal(-0.1, 0.13, (DRAWINGS, 1, 2)))
    points = curve(knots).reshape(DRAWINGS, -1, 2) @ (rotate @ shear).swapaxes(1, 2) * scale
    points += rng.normal(0, 0.1, (DRAWINGS, 1, 2))
    return (np.clip(points, -0.93, 0.93) + 1) * SIZE / 2


def render(points, radius):
    """Draw the pen's points, antialiased: (N, P, 2) and radius (N,) in pixels -> (N, SIZE, SIZE) uint8."""
    centre = np.arange(SIZE, dtype=np.float32) + 0.5
    x, y = points.astype(np.float32)[..., None, :, 0], points.astype(np.float32)[..., None, :, 1]
    dx2, dy2 = (centre[:, None] - x) ** 2, (centre[:, None] - y) ** 2  # (N, SIZE, P)
    distance = np.sqrt((dy2[:, :, None] + dx2[:, None]).min(-1))
    return np.rint(255 * np.clip(radius[:, None, None] + 0.5 - distance, 0, 1)).astype(np.uint8)


def characters(split, count, seed, bar):
    """Yield the drawings of each character of a split: uint8 (20, 28, 28, 1).

    Every character has a random stream of its own: asking for more does not change the others.
    """
    for i in range(count):
        rng = np.random.default_rng((seed, split, i))
        points = draw(invent(rng), rng)
        bar.update()
        yield render(points, rng.uniform(0.5, 0.9, DRAWINGS))


def whole(low, high):
    """Make an argparse type: an integer from `low` to `high`."""

    def parse(text):
        if not (text.isdecimal() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text} found, an integer from {low} to {high} expected")
        return int(text)

    return parse


def parse_args():
    parser, here = Parser(__doc__), Path(__file__).resolve().parent
    parser.add_argument("--out", type=user_path, default=here, help="arrays' folder (default: the script's)")
    parser.add_argument("--seed", type=whole(0, 2**31), default=0, help="seed of all drawings (default: 0)")
    for name, count in SPLITS.items():
        parser.add_argument(f"--{name}", type=whole(1, 100000), default=count,
                            help=f"characters in {name}.npy (default: {count})")  # fmt: skip
    return parser.parse_args()


def main():
    with program():
        args = parse_args()
        counts = {name: getattr(args, name) for name in SPLITS}
        facts = {"seed": args.seed, "rotations": [0], "rows": "class i is character i"}
        facts |= {name: [f"{name}{i:04d}" for i in range(count)] for name, count in counts.items()}
        with tqdm(total=sum(counts.values()), desc="characters", unit="char") as bar:
            files = {
                name: ((count, DRAWINGS, SIZE, SIZE, 1), characters(s, count, args.seed, bar))
                for s, (name, count) in enumerate(counts.items())
            }
            write_all(args.out, files, "split.json", facts)
        for name, (shape, _) in files.items():
            print(f"{args.out / name}.npy  {shape} uint8")


if __name__ == "__main__":
    main()
