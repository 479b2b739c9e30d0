"""SimCLR on Mini-ImageNet: learn features from unlabeled images, then write them for Meta-GMVAE.

    python main.py --data-dir ../data/imgnet --save-dir runs/simclr --feature-save-dir ../data/imgnet

The published recipe is the default; recipes/ holds it and others, as files of flags. `--feature-save-dir`
receives train_features.npy, val_features.npy, test_features.npy and features.json, which says what made them;
`--save-dir` config.json, metrics.jsonl, last.pt, best.pt, encoder.pt (the exported one), tb_log/ and, with
--probe, test.json. README.md has the data and the results.
"""

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for large CPU tensors; torch reads it at its first allocation

import math
import subprocess
import sys
import tempfile
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from dataloader import (
    HUE, JITTER, SCALE, check_apart, check_episodes, contact_sheet, epoch_order, load_split, plain_views, training_views,
)  # fmt: skip
from fewshot import evaluate, logistic_regression, nearest_mean, standardise
from model import Encoder, nt_xent, projection_head, prototypical
from runtime import (
    HERE, Heap, LossLog, Parser, UserError, catch_stop, choose_device, describe_run, keep_memory, load_checkpoint, load_model,
    number, one_line_errors, open_folder, open_test_folder, print_in_any_encoding, restore, save_checkpoint, say_other_data, snapshot, use_bf16, user_path, write_atomically, write_json, write_metrics,
)  # fmt: skip

SPLITS, LOSSES = ("train", "val", "test"), ("nt-xent", "prototypical")
VALIDATION_SHOTS, BEST_SHOT = (1, 5), 5  # best.pt is the best at the latter: its accuracy varies less
VALIDATION_SEED, TEST_SEED = 1, 2  # of the episodes: the same for every run
CONSTANT_EPOCHS = 10  # before the learning rate starts to fall, as published
SAVE_SECONDS = 300  # at most this much training is lost to a kill
PREPARE = HERE.parent / "data/imgnet/prepare.py"
# The flags that features.json repeats, beside the number of epochs.
DESCRIBED = ("batch_size", "view_size", "loss", "views", "crop_scale", "jitter", "hue")
# What a resumed run may change: where it runs and what is made of its encoder, not what it trains.
FREE_ON_RESUME = {
    "data_dir", "save_dir", "feature_save_dir", "device", "resume", "export", "export_only", "checkpoint", "probe", "test_shot", "contact_sheet"
}  # fmt: skip
# What --export-only depends on; the rest of the flags is of training.
EXPORT_FLAGS = {
    "data_dir", "save_dir", "feature_save_dir", "export_only", "checkpoint", "probe", "way", "query", "eval_episodes", "test_shot", "device", "debug"
}  # fmt: skip


def parse_args(argv=None):
    """The command line as a namespace; the published defaults."""
    count, several = number(int, 1, below=2**31), number(int, 2, below=2**31)
    start, rate, share = number(int, 0), number(float, 0), number(float, 0, below=1)
    p = Parser(description=__doc__.split("\n")[0])
    g = p.add_argument_group("files")
    g.add_argument("--data-dir", type=user_path, default=HERE.parent / "data/imgnet", help="prepared arrays, or images/ (or zips of it) with the three CSVs")
    g.add_argument("--save-dir", type=user_path, default=Path("runs/default"), help="folder this run writes; must not hold another run")
    g.add_argument("--feature-save-dir", type=user_path, help="folder for the three feature files; without it, data/imgnet, or <save-dir>/features with --debug")
    g.add_argument("--resume", action="store_true", help="continue the run in --save-dir from its last.pt, or start it where there is none")
    g.add_argument("--export", choices=["best", "last"], default="last", help="epoch to write features of; best: on validation episodes")
    g.add_argument("--export-only", action="store_true", help="no training, whose flags do nothing then: write the features of --checkpoint")
    g.add_argument("--checkpoint", type=user_path, help="encoder for --export-only; without it the one in --save-dir that --export names")
    g.add_argument("--contact-sheet", type=user_path, metavar="PNG", help="save a picture of training images and views of them, and stop")
    g = p.add_argument_group("model and training")
    g.add_argument("--hidden-size", type=count, default=64, help="channels of the convolutions; the features are 4 times as wide")
    g.add_argument("--loss", choices=LOSSES, default="nt-xent", help="of projections, or of the features")
    g.add_argument("--batch-size", type=several, default=512, help="images a step; each gives --views views")
    g.add_argument("--views", type=several, default=2, help="views of an image a step; 2 for nt-xent")
    g.add_argument("--view-size", type=number(int, 64, below=96), default=84, help="pixels of a view's side in training; features are of whole images of 84")
    g.add_argument("--crop-scale", type=share, default=SCALE[0], help="least share of the image in a crop")
    g.add_argument("--jitter", type=rate, default=JITTER, help="strength of brightness, contrast, saturation")
    g.add_argument("--hue", type=share, default=HUE, help="largest shift of the hue, in turns")
    g.add_argument("--train-epochs", type=count, default=400, help="passes over the training images")
    g.add_argument("--lr", type=rate, default=1e-3, help="Adam's rate: constant, then a cosine to zero")
    g.add_argument("--constant-epochs", type=start, default=CONSTANT_EPOCHS, help="before the rate falls")
    g.add_argument("--temperature", type=number(float, 1e-3), default=0.5, help="of the loss")
    g.add_argument("--weight-decay", type=rate, default=0.0, help="Adam's L2 penalty")
    g = p.add_argument_group("evaluation")
    g.add_argument("--freq-epochs", type=count, default=5, help="epochs between validations")
    g.add_argument("--probe", action="store_true", help="few-shot logistic regression on the test features; needs scikit-learn")
    g.add_argument("--way", type=count, default=5, help="classes of an episode")
    g.add_argument("--query", type=count, default=15, help="query images a class")
    g.add_argument("--eval-episodes", type=count, default=1000, help="episodes of a validation or probe, for each shot")
    g.add_argument("--test-shot", type=count, nargs="+", default=[1, 5, 20, 50], help="shots of --probe")
    g = p.add_argument_group("machine")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    g.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="of the convolutions in training; auto: bf16 where it is fast")
    g.add_argument("--seed", type=number(int, 0, below=2**31), default=0, help="of weights, order and views; episodes are the same for every seed")
    g.add_argument("--debug", action="store_true", help="smoke run: 2 epochs of 2 steps of 16 images, 2 validations of 10 episodes")
    args = p.parse_args(argv)
    if args.checkpoint and not args.export_only:
        p.error("--checkpoint goes with --export-only; --resume continues a run")
    if args.resume and args.export_only:
        p.error("--resume is of training, --export-only found")
    if args.checkpoint and args.export != p.get_default("export"):
        p.error(f"--export {args.export} is of the run in --save-dir, --checkpoint found")
    if args.loss == "nt-xent" and args.views != 2:
        p.error(f"--views: {args.views} found, 2 expected for --loss nt-xent")
    if args.probe and args.way < 2:
        p.error(f"--way: {args.way} found, at least 2 expected for --probe")
    args.feature_save_dir = args.feature_save_dir or (args.save_dir / "features" if args.debug else HERE.parent / "data/imgnet")
    if args.debug:
        args.train_epochs, args.freq_epochs, args.batch_size, args.eval_episodes = 2, 1, 16, 10
    return args


# --- features --------------------------------------------------------------------------------------


@torch.no_grad()
def encode_all(encoder, images, name=None):
    """Features of whole images: uint8 (classes, n, 84, 84, 3) -> float32 (classes, n, width).

    In evaluation mode and in float32 whatever the training's precision, so that a checkpoint gives the same features
    on every machine; cuDNN does not search for the fastest kernels meanwhile, which may be others the next time.
    """
    encoder.eval()
    trained_in, encoder.bf16 = encoder.bf16, False
    searching, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    batches = images.flatten(0, 1).split(500 if images.is_cuda else 100)
    quiet = 0.1 if sys.stderr.isatty() else 30
    features = torch.cat([encoder(plain_views(batch)) for batch in tqdm(batches, desc=name, disable=name is None, mininterval=quiet)])
    encoder.bf16, torch.backends.cudnn.benchmark = trained_in, searching
    return features.unflatten(0, images.shape[:2])


def write_array(path, array):
    def write(temporary):
        with open(temporary, "wb") as file:  # np.save adds .npy to a name, not to a file
            np.save(file, array)

    write_atomically(path, write)


def checksum(encoder):
    """Of its weights: which encoder made some features."""
    return zlib.crc32(b"".join(tensor.cpu().numpy().tobytes() for tensor in encoder.state_dict().values()))


def export(splits, device, args):
    """Writes the three feature files of --checkpoint or of the run's own encoder; returns {split: (classes, n, width)}. Raises UserError for NaN."""
    path = args.checkpoint or args.save_dir / f"{args.export}.pt"
    encoder = load_model(path, Encoder).to(device)
    check_feature_dir(args.feature_save_dir)
    checkpoint = load_checkpoint(path)
    epoch, training = checkpoint.get("epoch"), checkpoint.get("training", {})
    features = {name: encode_all(encoder, images, f"{name} features") for name, images in splits.items()}
    if not all(h.isfinite().all() for h in features.values()):
        raise UserError(f"{path}: features that are NaN or infinite found, finite ones expected")
    arrays = {args.feature_save_dir / f"{name}_features.npy": h.flatten(0, 1).cpu().numpy() for name, h in features.items()}
    beside = {target: target.with_name(f".{target.name}.tmp") for target in arrays}  # all are written before the first is renamed
    for target, array in arrays.items():
        write_array(beside[target], array)
    described = args.feature_save_dir / "features.json"
    described.unlink(missing_ok=True)  # it must not stand beside features of another encoder for a moment
    for target, array in arrays.items():
        os.replace(beside[target], target)
        print(f"{target}  {array.shape} {array.dtype}")
    counts = {name: images.shape[1] for name, images in splits.items()}
    sums = {name: zlib.crc32(array) for name, array in zip(features, arrays.values())}
    write_json(described, {"train_epochs": epoch, **training, "encoder_crc32": checksum(encoder), "images_per_class": counts, "crc32": sums})
    if not args.checkpoint:
        save_checkpoint(args.save_dir / "encoder.pt", {"model": encoder.state_dict(), "sizes": encoder.sizes, "epoch": epoch, "training": training})
    return features


def probe(features, args):
    """The few-shot baseline on the test features, standardised on the training features; printed and written to test.json."""
    results = evaluate(standardise(features["test"], features["train"]), logistic_regression, args.test_shot, TEST_SEED, args)
    for name, r in results.items():
        print(f"probe {name:>12}  {r['accuracy']:6.2f} ± {r['ci95']:.2f} %  ({r['episodes']} episodes)")
    write_json(args.save_dir / "test.json", results)


# --- training -------------------------------------------------------------------------------------


def learning_rate(epoch, args):
    """Adam's rate after `epoch` epochs, a fraction within one: constant at first, zero at --train-epochs."""
    falling = (epoch - args.constant_epochs) / max(args.train_epochs - args.constant_epochs, 1)
    return args.lr if falling <= 0 else 0.5 * args.lr * (1 + math.cos(math.pi * falling))


def train_step(encoder, projection, optimizer, x, rate, temperature, criterion=nt_xent):
    """One step of Adam on the loss of the views x (views * N, 3, 84, 84); returns the loss, on the device."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = criterion(projection(encoder(x)), temperature=temperature)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def about(encoder, epoch, args):
    """What every checkpoint says of its encoder: sizes, epochs and, of its training, what features.json repeats."""
    training = {name: getattr(args, name) for name in DESCRIBED}
    return {"sizes": encoder.sizes, "epoch": epoch, "training": training}


def validate(encoder, images, epoch, step, history, args):
    """One line of metrics from labels that training never sees; the encoder becomes best.pt if it is the best so far."""
    features = encode_all(encoder, images)
    results = evaluate(standardise(features, features), nearest_mean, VALIDATION_SHOTS, VALIDATION_SEED, args)
    name = f"{args.way}way{BEST_SHOT}shot"
    if all(results[name]["accuracy"] > line[name]["accuracy"] for line in history):
        checkpoint = {"model": encoder.state_dict(), "step": step, "validation": results}
        save_checkpoint(args.save_dir / "best.pt", checkpoint | about(encoder, epoch, args))
    return results


def train(splits, device, bf16, config, stop, args):
    """Trains from the start, or from last.pt, to --train-epochs. Leaves with status 128 + signal, after a checkpoint, once `stop` is not empty."""
    torch.manual_seed(args.seed)
    encoder = Encoder(args.hidden_size, bf16).to(device)
    if args.loss == "nt-xent":
        projection, criterion = projection_head(args.hidden_size).to(device), nt_xent
    else:
        projection, criterion = torch.nn.Identity(), partial(prototypical, views=args.views)
    strength = args.crop_scale, args.jitter, args.hue
    parameters = [*encoder.parameters(), *projection.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    generator = torch.Generator().manual_seed(args.seed)  # of the views; the order of an epoch follows from its number
    parts = {"model": encoder, "projection": projection, "optimizer": optimizer, "generator": generator}

    last, images = args.save_dir / "last.pt", splits["train"].flatten(0, 1)
    steps = 2 if args.debug else len(images) // args.batch_size  # of an epoch; what is left over waits for another order
    total = steps * args.train_epochs
    progress = {"step": 0, "seconds": 0.0, "history": []}
    if last.exists():
        checkpoint = load_checkpoint(last)
        restore(parts, checkpoint, last)
        progress = {name: checkpoint[name] for name in progress}
        write_metrics(args.save_dir, progress["history"])  # a kill may have come between the two files
    write_json(args.save_dir / "config.json", config)
    start, history = progress["step"], progress["history"]
    began, saved = time.monotonic() - progress["seconds"], time.monotonic()

    tensorboard = SummaryWriter(args.save_dir / "tb_log", purge_step=start + 1)
    term = args.loss.replace("-", "_")
    heap, losses = Heap(), LossLog((term,), tensorboard)
    log_every = 50 if device.type == "cuda" else 1
    quiet = 0.1 if sys.stderr.isatty() else 30  # seconds between updates of the bar
    bar = tqdm(total=total, initial=start, desc=args.save_dir.name, unit="step", mininterval=quiet, dynamic_ncols=True)
    order = None
    for step in range(start + 1, total + 1):
        epoch, position = divmod(step - 1, steps)
        if order is None or position == 0:
            order = epoch_order(images, args.seed, epoch).to(device)
        encoder.train()
        batch = images[order[position * args.batch_size : (position + 1) * args.batch_size]]
        x = training_views(batch, generator, args.view_size, args.views, strength)
        rate = learning_rate((step - 1) / steps, args)
        losses.add(train_step(encoder, projection, optimizer, x, rate, args.temperature, criterion))
        heap.tidy()
        bar.update()
        validating = step % (args.freq_epochs * steps) == 0 or step == total
        stopping = bool(stop)  # read once: a signal from here on is for the next step
        saving = step % steps == 0 or stopping or time.monotonic() - saved > SAVE_SECONDS
        if saving or step % log_every == 0:
            terms = losses.flush(step)
            bar.set_postfix({"epoch": epoch + 1, **{name: f"{value:.3f}" for name, value in terms.items()}}, refresh=False)
        if saving and not all(p.isfinite().all() for p in parameters):
            found = f"{term} {terms[term]}"
            raise UserError(f"step {step}: a weight is not finite ({found}), finite ones expected")
        if validating:
            results = validate(encoder, splits["val"], epoch + 1, step, history, args)
            history.append({"epoch": epoch + 1, "step": step, "seconds": round(time.monotonic() - began, 1), **terms, **results})
            for name, r in results.items():
                tensorboard.add_scalar(f"validation/{name}", r["accuracy"], step)
            scores = "  ".join(f"{name} {r['accuracy']:.2f} ± {r['ci95']:.2f}" for name, r in results.items())
            bar.write(f"epoch {epoch + 1}  {scores}  {args.loss} {terms[term]:.3f}")
        if saving:
            progress = {"step": step, "seconds": time.monotonic() - began, "history": history}
            save_checkpoint(last, snapshot(parts) | progress | about(encoder, step // steps, args))
            write_metrics(args.save_dir, history)
            saved = time.monotonic()
        if stopping:
            break
    bar.close()
    tensorboard.close()
    if stop:
        print(f"stopped after step {progress['step']}; --resume continues", file=sys.stderr)
        sys.exit(128 + stop[0])


def prepared(args):
    """Find the prepared arrays: --data-dir, or <save-dir>/data, made from the images and CSVs in --data-dir.

    Made again where those there are of other images, unless a run has been trained on them. Raises UserError.
    """
    if (args.data_dir / "train.npy").exists() or not (args.data_dir / "train.csv").exists():
        return args.data_dir
    out, trained = args.save_dir / "data", (args.save_dir / "last.pt").exists()
    if trained and not out.exists():
        found = f"--save-dir: {args.save_dir} holds a run on other arrays than the images in {args.data_dir}"
        raise UserError(f"{found}, an empty folder expected")
    if not PREPARE.exists():
        found = f"--data-dir: {args.data_dir} holds unprepared images ({PREPARE} not found)"
        raise UserError(f"{found}, what data/imgnet/prepare.py makes of them expected")
    flags = ["--source", args.data_dir, "--out", out, "--if-changed", "fail" if trained else "again"]
    made = subprocess.run([sys.executable, PREPARE, *flags])
    if made.returncode:
        sys.exit(made.returncode)  # it has said why
    return out


def load_splits(args):
    """The arrays this run needs, checked against its flags, {split: tensor}. Raises UserError."""
    data_dir = prepared(args)
    splits = {name: load_split(data_dir, name) for name in SPLITS}
    if args.contact_sheet:
        return splits
    check_apart(data_dir, splits)
    if args.probe:
        check_episodes(data_dir, "test", splits["test"], [args.way], args.test_shot, args.query)
    if not args.export_only:
        check_episodes(data_dir, "val", splits["val"], [args.way], VALIDATION_SHOTS, args.query)
        found = splits["train"].shape[:2].numel()
        if found < args.batch_size:
            raise UserError(f"{data_dir / 'train.npy'}: {found} images found, at least --batch-size {args.batch_size} expected")
    return splits


def check_probe():
    """Raises UserError without scikit-learn: before the training that it is to follow."""
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise UserError("--probe: scikit-learn not found, the package expected (pip install scikit-learn)") from None


def check_feature_dir(folder):
    """Makes the folder. Raises UserError if it cannot be written: before the training whose features it is to receive."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"--feature-save-dir: {folder} found, a folder to write into expected ({error.strerror})") from None


def main():
    keep_memory()
    print_in_any_encoding()
    torch.backends.cudnn.benchmark = True  # the shapes never change
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # float32 is float32 on a GPU too
    args = parse_args()
    with one_line_errors():
        device = choose_device(args.device)
        bf16 = use_bf16(args.precision, device)
        if args.probe:
            check_probe()
        splits = load_splits(args)
        if args.contact_sheet:
            rows = splits["train"][:16, 0].to(device)
            draws = torch.Generator().manual_seed(args.seed)
            strength = args.crop_scale, args.jitter, args.hue
            picture = Image.fromarray(contact_sheet(rows, 9, draws, args.view_size, strength))
            write_atomically(args.contact_sheet, lambda temporary: picture.save(temporary, "png"))
            return
        run = describe_run(args, device, bf16, splits)
        splits = {name: images.to(device) for name, images in splits.items()}
        if args.checkpoint:
            load_model(args.checkpoint, Encoder)  # refused before anything is written
            open_test_folder(args.save_dir, run, EXPORT_FLAGS)
        if not args.export_only:
            check_feature_dir(args.feature_save_dir)
            config = open_folder(args.save_dir, run, args.resume, FREE_ON_RESUME)
            with catch_stop() as stop:
                train(splits, device, bf16, config, stop, args)
        elif not args.checkpoint:
            say_other_data(args.save_dir, run["data"])
        features = export(splits, device, args)
        if args.probe:
            probe(features, args)


if __name__ == "__main__":
    main()
