"""SimCLR on Mini-ImageNet: learn features from unlabeled images, then write them for Meta-GMVAE.

    python main.py --data-dir ../data/imgnet --save-dir runs/simclr --feature-save-dir ../data/imgnet

The published recipe is the default; recipes/ holds it and ours, as files of flags. `--feature-save-dir`
receives train_features.npy, val_features.npy, test_features.npy and features.json, which says what made them;
`--save-dir` receives config.json, metrics.jsonl, last.pt, best.pt, encoder.pt (the exported one), tb_log/ and
test.json (with --probe). The repository's README.md has the results.
"""

import os

# Use huge pages for large CPU tensors; torch reads this at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import math
import sys
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from dataloader import HUE, JITTER, SCALE, SIZE, contact_sheet, epoch_order, strength_of, training_views
from export import BEST_SHOT, SHOTS, check_feature_dir, check_probe, checksum, encode_all, export
from export import load_splits, probe
from fewshot import evaluate, nearest_mean, standardise
from machine import BAR_SECONDS, HERE, Parser, UserError, catch_stop, number, program, use_bf16
from machine import user_path, write
from model import Encoder, load_model, nt_xent, projection_head, prototypical
from neighbours import REFRESH_EPOCHS, draw_partners, find_neighbours
from parallel import gather, join, part, rank, share, stopping, wait, wrap, world
from runtime import Log, describe_run, open_folder, restore, save_checkpoint
from runtime import say_other_data, snapshot, write_json, write_metrics

VALIDATION_SEED = 1  # of the episodes: the same for every run
SAVE_SECONDS = 300  # at most this much training is lost to a kill
DESCRIBED = "batch_size view_size loss views crop_scale jitter hue neighbours".split()  # in features.json


def make_parser():
    """Make the parser; its defaults are the published recipe.

    A resumed run may change the flags of "run" and "test"; an export does not use those of "training".
    """
    count, several = number(int, 1, below=2**31), number(int, 2, below=2**31)
    natural, rate, fraction = number(int, 0, below=2**31), number(float, 0), number(float, 0, below=1)
    data = HERE.parent / "data/imgnet"
    p = Parser(description=__doc__.split("\n")[0])
    # fmt: off
    add = p.add_argument_group("run").add_argument
    add("--data-dir", type=user_path, default=data, help="folder of arrays, or of images/ (or zips) and CSVs")
    add("--save-dir", type=user_path, default=Path("runs/default"), help="output folder, for this run alone")
    add("--feature-save-dir", type=user_path, help="folder for features; not given: data/imgnet")
    add("--resume", action="store_true", help="continue the run in --save-dir, if there is one")
    add("--export", choices=["best", "last"], default="last", help="last.pt or best.pt (by validation)")
    add("--export-only", action="store_true", help="write the features of --checkpoint, without training")
    add("--checkpoint", type=user_path, help="for --export-only; not given: --export of --save-dir")
    add("--contact-sheet", type=user_path, metavar="PNG", help="save a picture of views, and stop")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--debug", action="store_true", help="try it: 2 epochs of 2 steps; features into --save-dir")
    add = p.add_argument_group("training").add_argument
    add("--init", type=user_path, help="encoder.pt to start from; not given: random weights")
    add("--hidden-size", type=count, default=64, help="channels; features of 84 pixels are 4 times as wide")
    add("--loss", choices=["nt-xent", "prototypical"], default="nt-xent", help="on projections or features")
    add("--temperature", type=number(float, 1e-3), default=0.5, help="of the loss")
    add("--batch-size", type=several, default=512, help="images per step; each gives --views views")
    add("--views", type=several, default=2, help="views per image and step; 2 for nt-xent")
    add("--neighbours", type=natural, default=0, help="make half the views of one of so many near images")
    add("--view-size", type=number(int, 64, below=96), default=84, help="pixels of a view's side")
    add("--crop-scale", type=fraction, default=SCALE[0], help="smallest share of the image's area in a crop")
    add("--jitter", type=rate, default=JITTER, help="strength of brightness, contrast, saturation")
    add("--hue", type=fraction, default=HUE, help="largest shift of the hue, in turns")
    add("--train-epochs", type=count, default=400, help="passes; a --resume at a constant rate may raise it")
    add("--freq-epochs", type=count, default=5, help="epochs between validations")
    add("--lr", type=rate, default=1e-3, help="Adam's rate: constant, then a cosine to zero")
    add("--constant-epochs", type=natural, default=10, help="epochs before the rate falls")
    add("--weight-decay", type=rate, default=0.0, help="Adam's L2 penalty")
    add("--seed", type=natural, default=0, help="for weights, order and views")
    add("--precision", choices=["fp32", "bf16", "auto"], default="fp32", help="auto: bf16 where it is fast")
    add = p.add_argument_group("evaluation").add_argument
    larger = number(int, 64, below=1025)
    add("--feature-size", type=larger, default=SIZE, help="pixels of an image's side when features are made")
    add("--lda", type=natural, default=0, help="project features on so many directions; 0: do not")
    add("--way", type=several, default=5, help="classes of an episode")
    add("--query", type=count, default=15, help="query images per class")
    add("--eval-episodes", type=count, default=1000, help="episodes of a validation or probe, for each shot")
    add = p.add_argument_group("test").add_argument
    add("--probe", action="store_true", help="logistic regression on test features; needs scikit-learn")
    add("--test-shot", type=count, nargs="+", default=[1, 5, 20, 50], help="shots of --probe")
    # fmt: on
    return p


def parse_args(argv=None):
    """Parse the command line and check that its flags fit together."""
    p = make_parser()
    args = p.parse_args(argv)
    if args.checkpoint and not args.export_only:
        p.error("--checkpoint goes with --export-only; --resume continues a run")
    for flag in ("resume", "init"):
        if getattr(args, flag) and args.export_only:
            p.error(f"--{flag} is of training, --export-only found")
    if args.probe and args.export_only and not args.checkpoint:
        p.error("--probe: --export-only without --checkpoint found, --resume --probe tests a run itself")
    if args.checkpoint and args.export != p.get_default("export"):
        p.error(f"--export {args.export} is of the run in --save-dir, --checkpoint found")
    if args.loss == "nt-xent" and args.views != 2:
        p.error(f"--views: {args.views} found, 2 expected for --loss nt-xent")
    if args.neighbours and args.views % 2:
        p.error(f"--views: {args.views} found, an even number expected for --neighbours")
    width = args.hidden_size * (args.feature_size // 32) ** 2
    if args.lda > width and not args.export_only:
        p.error(f"--lda: {args.lda} found, at most the {width} features of an image expected")
    features = args.save_dir / "features" if args.debug else HERE.parent / "data/imgnet"
    args.feature_save_dir = args.feature_save_dir or features
    if args.debug:
        args.train_epochs, args.freq_epochs, args.batch_size, args.eval_episodes = 2, 1, 16, 10
    return args


# --- training -------------------------------------------------------------------------------------


def learning_rate(epoch, args):
    """Return Adam's rate after `epoch` epochs (fractions count): constant, then falling to zero."""
    falling = (epoch - args.constant_epochs) / max(args.train_epochs - args.constant_epochs, 1)
    return args.lr if falling <= 0 else 0.5 * args.lr * (1 + math.cos(math.pi * falling))


def train_step(network, optimizer, x, rate, temperature, criterion, views):
    """Take a step of Adam on the loss of the views x (views * N, 3, size, size); return the loss.

    With several processes each one has a share of the images, but the loss compares all of them.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = criterion(gather(network(x), views), temperature=temperature)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def about(encoder, epoch, args):
    """Return what every checkpoint says about its encoder: sizes, epochs, and settings for features.json."""
    training = {name: getattr(args, name) for name in DESCRIBED}
    return {"sizes": encoder.sizes, "epoch": epoch, "training": training}


def validate(encoder, images, epoch, step, history, args):
    """Score the encoder by labels that training never sees; save it as best.pt if it is the best so far."""
    features = encode_all(encoder, images, args.feature_size)
    results = evaluate(standardise(features, features), nearest_mean, SHOTS, VALIDATION_SEED, args)
    name = f"{args.way}way{BEST_SHOT}shot"
    if all(results[name]["accuracy"] > line[name]["accuracy"] for line in history):
        checkpoint = {"model": encoder.state_dict(), "step": step} | about(encoder, epoch, args)
        save_checkpoint(args.save_dir / "best.pt", checkpoint)
    return results


def train(splits, device, bf16, config, stop, args):
    """Train to --train-epochs, from the start or from last.pt.

    Once `stop` is not empty, save a checkpoint and exit with status 128 + signal.
    """
    torch.manual_seed(args.seed)
    encoder = Encoder(args.hidden_size, bf16).to(device)
    if args.init:
        encoder.blocks.load_state_dict(load_model(args.init).blocks.state_dict())
    if args.loss == "nt-xent":
        projection, criterion = projection_head(args.hidden_size).to(device), nt_xent
    else:
        projection, criterion = torch.nn.Identity(), partial(prototypical, views=args.views)
    strength = strength_of(vars(args))
    parameters = [*encoder.parameters(), *projection.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    generator = torch.Generator().manual_seed(args.seed)  # of the views; an epoch's order has its own
    parts = {"model": encoder, "projection": projection, "optimizer": optimizer, "generator": generator}

    last, images = args.save_dir / "last.pt", splits["train"].flatten(0, 1)
    steps = 2 if args.debug else len(images) // args.batch_size  # of an epoch; left-over images are skipped
    total = steps * args.train_epochs
    progress = restore(parts, last, {"step": 0, "seconds": 0.0, "history": [], "near": torch.empty(0)})
    start = step = progress["step"]
    history, near = progress["history"], progress["near"].to(device)
    if start > total:
        found = f"{args.train_epochs} found, at least the {start // steps} epochs of {last} expected"
        raise UserError(f"--train-epochs: {found}")
    first = rank() == 0  # it validates and writes
    if first:
        write_json(args.save_dir / "config.json", config)
        (args.save_dir / "test.json").unlink(missing_ok=True)  # of an earlier start
    if first and start:  # a kill may have come after last.pt, before this
        write_metrics(args.save_dir, history)
    began, saved = time.monotonic() - progress["seconds"], time.monotonic()

    term = args.loss.replace("-", "_")
    log = Log(args.save_dir if first else None, (term,), parameters, start)
    network = wrap(torch.nn.Sequential(encoder, projection))
    log_every = 50 if device.type == "cuda" else 1
    shown = {"desc": args.save_dir.name, "unit": "step", "mininterval": BAR_SECONDS, "disable": not first}
    bar = tqdm(total=total, initial=start, **shown)
    order = None
    for step in range(start + 1, total + 1):
        epoch, position = divmod(step - 1, steps)
        if order is None or position == 0:
            order = epoch_order(images, args.seed, epoch).to(device)
        if args.neighbours and position == 0 and epoch % REFRESH_EPOCHS == 0:
            near = find_neighbours(encoder, images, args.neighbours, strength)
        encoder.train()
        sources = [order[position * args.batch_size : (position + 1) * args.batch_size]]
        if args.neighbours:
            sources.append(draw_partners(sources[0], near, generator))
        views = args.view_size, args.views // len(sources), strength
        seen = [training_views(images[share(rows)], generator, *views) for rows in sources]
        x = torch.cat(seen) if args.neighbours else seen[0]  # without a copy
        rate = learning_rate((step - 1) / steps, args)
        log.add(train_step(network, optimizer, x, rate, args.temperature, criterion, args.views))
        bar.update()
        validating = first and (step % (args.freq_epochs * steps) == 0 or step == total)
        leaving = stopping(stop, step % log_every == 0)  # once: a later signal is for the next step
        saving = first and (step % steps == 0 or leaving or time.monotonic() - saved > SAVE_SECONDS)
        if saving or step % log_every == 0:
            terms = log.flush(step)
            bar.set_postfix({"epoch": epoch + 1, term: f"{terms[term]:.3f}"}, refresh=False)
        if validating:
            seconds = round(time.monotonic() - began, 1)  # without this validation
            results = validate(encoder, splits["val"], epoch + 1, step, history, args)
            history.append({"epoch": epoch + 1, "step": step, "seconds": seconds, **terms, **results})
        if saving:
            progress = {"step": step, "seconds": time.monotonic() - began, "history": history, "near": near}
            save_checkpoint(last, snapshot(parts) | progress | about(encoder, step // steps, args))
            write_metrics(args.save_dir, history)
            saved = time.monotonic()
        if validating:  # printed once it is saved
            for name, r in results.items():
                log.add_scalar(f"validation/{name}", r["accuracy"], step)
            said = "  ".join(f"{name} {r['accuracy']:.2f} ± {r['ci95']:.2f}" for name, r in results.items())
            bar.write(f"epoch {epoch + 1}  {said}  {args.loss} {terms[term]:.3f}")
        if leaving:
            break
    bar.close()
    part(stop)
    if stop:
        print(f"stopped after step {step}; --resume continues", file=sys.stderr)
        sys.exit(128 + stop[0])


def main():
    args = parse_args()
    batch_size = 0 if args.export_only or args.contact_sheet else args.batch_size
    with program(), join(args.device, batch_size) as device:
        bf16 = not args.export_only and use_bf16(args.precision, device)
        if args.probe:
            check_probe()
        wait(rank() > 0)  # until the first has prepared the data and opened the folder
        splits = load_splits(args)
        if args.contact_sheet:
            draws = torch.Generator().manual_seed(args.seed)
            rows, strength = splits["train"][:16, 0].to(device), strength_of(vars(args))
            write(args.contact_sheet, contact_sheet(rows, 9, draws, args.view_size, strength))
            return
        names = make_parser().names
        flags = names("run", "evaluation", "test") | (set() if args.export_only else names("training"))
        precision = "bf16" if bf16 else "fp32"
        of_args = {name: value for name, value in vars(args).items() if name in flags}
        config = describe_run(of_args, device, precision, splits)
        splits = {name: images.to(device) for name, images in splits.items()}
        print(f"{config['device']}, {'exporting' if args.export_only else 'training'} in {precision}")
        if args.export_only:  # a bad one is refused before anything is written
            load_model(args.checkpoint or args.save_dir / f"{args.export}.pt")
        if args.init:
            start = load_model(args.init)
            channels = start.sizes["hidden_size"]
            if channels != args.hidden_size:
                found = f"{args.hidden_size} found, {channels} expected as in {args.init}"
                raise UserError(f"--hidden-size: {found}")
            config["init_crc32"] = checksum(start)
        check_feature_dir(args.feature_save_dir)
        if not args.export_only:
            longer = {"train_epochs"} if args.constant_epochs >= args.train_epochs else set()
            if rank() == 0:
                config = open_folder(args.save_dir, config, args.resume, names("run", "test") | longer)
            wait(rank() == 0)
            with catch_stop(world() > 1) as stop:
                train(splits, device, bf16, config, stop, args)
        else:
            if args.checkpoint:
                write_json(args.save_dir / "config.json", open_folder(args.save_dir, config, testing=True))
            say_other_data(args.checkpoint or args.save_dir, config["data"])
        features = export(splits, device, args)
        if args.probe:
            probe(features, args)


if __name__ == "__main__":
    main()
