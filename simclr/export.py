"""Use a trained encoder: write feature files for Meta-GMVAE, and test the features alone."""

import io
import os
import signal
import subprocess
import sys
import tempfile
import zlib
from contextlib import contextmanager

import numpy as np
import torch
from tqdm import tqdm

from dataloader import check_apart, check_episodes, load_split, plain_views, strength_of, training_views
from fewshot import evaluate, logistic_regression, standardise
from machine import BAR_SECONDS, HERE, UserError, write
from model import Encoder, lda, load_model
from parallel import rank, world
from runtime import load_checkpoint, save_checkpoint, write_json

SPLITS = ("train", "val", "test")
SHOTS, BEST_SHOT = (1, 5), 5  # of validations; best.pt is the best at 5 shots, which vary less
TEST_SEED = 2  # of the episodes: the same for every run
LDA_VIEWS, LDA_IMAGES, LDA_SEED = 4, 3000, 3
PREPARE = HERE.parent / "data/imgnet/prepare.py"


@contextmanager
def repeatable(encoder):
    """Run an encoder so that it gives the same features again, and on another machine but for rounding.

    In evaluation mode and in float32, whatever the training's precision. cuDNN does not search for the
    fastest kernels: it might find others next time.
    """
    encoder.eval()
    trained_in, encoder.bf16 = encoder.bf16, False
    searching, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    with torch.no_grad():
        yield
    encoder.bf16, torch.backends.cudnn.benchmark = trained_in, searching


def encode_all(encoder, images, size, name=None):
    """Encode whole images (classes, n, 84, 84, 3), uint8, scaled to `size` pixels -> (classes, n, width)."""
    batches = images.flatten(0, 1).split(500 if images.is_cuda else 100)
    bar = tqdm(batches, desc=name, disable=name is None, mininterval=BAR_SECONDS)
    with repeatable(encoder):
        features = torch.cat([encoder.features(plain_views(batch, size)) for batch in bar])
    return features.unflatten(0, images.shape[:2])


def with_directions(encoder, images, size, count, strength):
    """Return the encoder with `count` directions of `lda`, from views of some of the images (N, 84, 84, 3).

    The views have `strength`, that of its training, but are as large as the images will be. For one process:
    `training_views` would share them out. Raises UserError if the features do not vary.
    """
    generator = torch.Generator().manual_seed(LDA_SEED)
    chosen = torch.randperm(len(images), generator=generator)[:LDA_IMAGES].to(images.device)
    views = []
    with repeatable(encoder):
        for some in tqdm(chosen.split(25), desc="views", mininterval=BAR_SECONDS):
            h = encoder(training_views(images[some], generator, size, LDA_VIEWS, strength))
            views.append(h.unflatten(0, (LDA_VIEWS, -1)).cpu())
    centre, directions = lda(torch.cat(views, 1), count)
    found = Encoder(**encoder.sizes, directions=directions.shape)
    found.load_state_dict(encoder.state_dict() | {"centre": centre, "directions": directions})
    return found.to(images.device).eval()


def checksum(encoder):
    """Return a checksum of the weights, to tell one encoder's features from another's."""
    return zlib.crc32(b"".join(tensor.cpu().numpy().tobytes() for tensor in encoder.state_dict().values()))


def export(splits, device, args):
    """Write the three feature files of --checkpoint or of the run's own encoder, and features.json.

    Also write encoder.pt, the run's own encoder or the one that got directions by `lda`, into --save-dir.
    Returns {split: (classes, n, width)}. Raises UserError for NaN.
    """
    path, folder = args.checkpoint or args.save_dir / f"{args.export}.pt", args.feature_save_dir
    encoder, checkpoint = load_model(path).to(device), load_checkpoint(path)
    size, features = args.feature_size, {}
    width, count = encoder.sizes.get("directions", (encoder.width(size), args.lda))
    if width != encoder.width(size) or args.lda not in (0, count):
        expected = f"those of its {count} directions in {width} features expected"
        raise UserError(f"{path}: --feature-size {size} and --lda {args.lda} found, {expected}")
    args.lda = count  # also for a probe
    if count > width:
        raise UserError(f"--lda: {count} found, at most the {width} features of an image expected")
    if count and "directions" not in encoder.sizes:
        if not checkpoint.get("training"):
            raise UserError(f"{path}: no settings of its training found, the views' expected for --lda")
        strength = strength_of(checkpoint["training"])
        encoder = with_directions(encoder, splits["train"].flatten(0, 1), size, count, strength)
    for name, images in splits.items():
        features[name] = encode_all(encoder, images, size, f"{name} features")
    if not all(h.isfinite().all() for h in features.values()):
        raise UserError(f"{path}: features that are NaN or infinite found, finite ones expected")
    sums, hidden = {}, {name: folder / f".{name}_features.npy" for name in features}
    try:
        for name, h in features.items():  # all are written before the first is renamed
            array, buffer = h.flatten(0, 1).cpu().numpy(), io.BytesIO()
            np.save(buffer, array)
            write(hidden[name], buffer.getbuffer())
            sums[name] = zlib.crc32(array)
    except UserError:  # a full disk
        for path in hidden.values():
            path.unlink(missing_ok=True)
        raise
    about = {"epoch": checkpoint.get("epoch"), "training": checkpoint.get("training", {})}
    counts = {name: images.shape[1] for name, images in splits.items()}
    (folder / "features.json").unlink(missing_ok=True)  # never beside another encoder's features
    for name, h in features.items():
        hidden[name].replace(folder / f"{name}_features.npy")
        print(f"{folder / name}_features.npy  {h.shape[:2].numel()} images, {h.shape[-1]} features")
    described = {"feature_size": size, "lda": count, "encoder_crc32": checksum(encoder)}
    described |= {"images_per_class": counts, "crc32": sums}
    write_json(folder / "features.json", {"train_epochs": about["epoch"], **about["training"], **described})
    if not args.checkpoint or args.lda:
        weights = {"model": encoder.state_dict(), "sizes": encoder.sizes}
        save_checkpoint(args.save_dir / "encoder.pt", weights | about)
    return features


def probe(features, args):
    """Test logistic regression on test features; write test.json.

    Features are standardised by those of training; not coordinates by `lda`, whose scales mean something.
    """
    test = features["test"] if args.lda else standardise(features["test"], features["train"])
    results = evaluate(test, logistic_regression, args.test_shot, TEST_SEED, args)
    for name, r in results.items():
        print(f"probe {name:>12}  {r['accuracy']:6.2f} ± {r['ci95']:.2f} %  ({r['episodes']} episodes)")
    write_json(args.save_dir / "test.json", results)


def prepared(args):
    """Return the folder of arrays: --data-dir, or <save-dir>/data, made from --data-dir's images and CSVs.

    Arrays made from other images are made again, unless a run has been trained on them. Arrays in --data-dir
    that record their source have to match the images beside them. Raises UserError.
    """
    arrays = os.path.exists(args.data_dir / "train.npy")  # Path.exists raises if it may not look
    csvs = [os.path.exists(args.data_dir / f"{split}.csv") for split in SPLITS]
    if not csvs[0] or (arrays and not (all(csvs) and PREPARE.exists())):
        return args.data_dir
    out, trained = args.save_dir / "data", os.path.exists(args.save_dir / "last.pt")
    if arrays:
        out, trained = args.data_dir, True
    if rank() > 0:  # the first process has made it
        return out
    if trained and not out.exists():
        found = f"{args.save_dir} holds a run on other arrays than the images in {args.data_dir}"
        raise UserError(f"--save-dir: {found}, an empty folder expected")
    if not PREPARE.exists():
        expected = "what data/imgnet/prepare.py makes of them expected"
        raise UserError(
            f"--data-dir: {args.data_dir} holds unprepared images ({PREPARE} not found), {expected}"
        )
    flags = ["--source", args.data_dir, "--out", out, "--if-changed", "fail" if trained else "again"]
    before = signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches the program, which cleans up
    made = subprocess.run([sys.executable, PREPARE, *flags])
    signal.signal(signal.SIGINT, before)
    if made.returncode:
        sys.exit(made.returncode)  # it has said why
    return out


def load_splits(args):
    """Load the arrays that a run needs, {split: tensor}; check them against its flags. Raises UserError."""
    data_dir = prepared(args)
    splits = {name: load_split(data_dir, name) for name in SPLITS}
    if args.contact_sheet:
        return splits
    check_apart(data_dir, splits)
    if args.probe:
        check_episodes(data_dir, "test", splits["test"], args.way, args.test_shot, args.query)
    if not args.export_only:
        check_episodes(data_dir, "val", splits["val"], args.way, SHOTS, args.query)
        found = splits["train"].shape[:2].numel()
        if found < args.batch_size:
            expected = f"at least --batch-size {args.batch_size} expected"
            raise UserError(f"{data_dir / 'train.npy'}: {found} images found, {expected}")
        if args.neighbours and world() > 1:  # each would find other neighbours
            raise UserError(f"--neighbours: {world()} processes found, one expected")
        if args.neighbours >= found:
            raise UserError(f"--neighbours: {args.neighbours} found, fewer than the {found} images expected")
    return splits


def check_probe():
    """Check before training that scikit-learn is installed. Raises UserError."""
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise UserError(
            "--probe: scikit-learn not found, the package expected (pip install scikit-learn)"
        ) from None


def check_feature_dir(folder):
    """Make the folder for features before training starts. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        expected = f"a folder to write into expected ({error.strerror})"
        raise UserError(f"--feature-save-dir: {folder} found, {expected}") from None
