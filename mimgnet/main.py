"""Meta-GMVAE on Mini-ImageNet: meta-train on features of unlabeled images, then test few-shot classification.

    python main.py --data-dir ../data/imgnet --save-dir runs/5way

The published recipe is the default. `--save-dir` receives config.json, metrics.jsonl, last.pt, best.pt,
test.json and tb_log/. The repository's README.md has the rest.
"""

import os

# Use huge pages for large CPU tensors; torch reads this at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import copy
import math
import sys
import time
from pathlib import Path

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from dataloader import check_alike, check_encoder, draw_sets, load_splits, read_description
from evaluate import evaluate_split, summary, test
from machine import BAR_SECONDS, HERE, Parser, UserError, catch_stop, number, program, use_bf16, user_path
from mixture import READINGS
from model import GMVAE, load_model
from parallel import join, mean, part, rank, share, share_of_draws, stopping, wait, wrap, world
from runtime import Log, describe_run, load_checkpoint, open_folder, restore, save_checkpoint
from runtime import say_other_data, snapshot, write_json, write_metrics

VALIDATION_SEED = 1  # of the episodes: the same for every run
SAVE_SECONDS = 300  # at most this much training is lost to a kill


def make_parser():
    """Make the parser; its defaults are the published recipe.

    A resumed run may change the flags of "run" and "test"; a test of a checkpoint does not use "training".
    """
    count, natural, rate = number(int, 1, below=2**31), number(int, 0, below=2**31), number(float, 0)
    data = HERE.parent / "data/imgnet"
    p = Parser(description=__doc__.split("\n")[0])
    # fmt: off
    add = p.add_argument_group("run").add_argument
    add("--data-dir", type=user_path, default=data, help="folder with train_features.npy, ...")
    add("--save-dir", type=user_path, default=Path("runs/default"), help="output folder, for this run alone")
    add("--resume", action="store_true", help="continue the run in --save-dir, if there is one")
    add("--eval-only", action="store_true", help="test --checkpoint, write test.json into --save-dir")
    add("--checkpoint", type=user_path, help="for --eval-only: weights, or a run's folder (its best)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--debug", action="store_true", help="try it: 4 steps, 2 validations of 10 episodes, 2 samples")
    add = p.add_argument_group("training").add_argument
    add("--hidden-size", type=count, default=512, help="width of the decoder's hidden layers")
    add("--latent-size", type=count, default=32, help="dimensions of the latent space")
    add("--way", type=count, default=5, help="components of the mixture, classes of a validation episode")
    add("--shot", type=count, default=1, help="labeled images per class of a validation episode")
    add("--batch-size", type=count, default=16, help="sets per step")
    add("--sample-size", type=count, default=5, help="images per set")
    add("--train-mc-sample-size", type=count, default=256, help="Monte-Carlo samples per image")
    add("--decode-samples", type=count, help="samples per image to decode, drawn each step; not given: all")
    add("--unsupervised-em-iters", type=natural, default=10, help="EM iterations on each set")
    add("--em-start", choices=["samples", "images"], default="samples", help="images: start at distinct ones")
    add("--fix-pi", action="store_true", help="keep the mixture weights uniform")
    add("--train-iters", type=count, default=15000, help="steps; a --resume at a constant rate may raise it")
    add("--freq-iters", type=count, default=1000, help="steps between validations")
    add("--lr", type=rate, default=1e-4, help="Adam's learning rate")
    add("--lr-schedule", choices=["constant", "cosine"], default="constant", help="cosine: falls to zero")
    add("--weight-decay", type=rate, default=5e-2, help="Adam's L2 penalty")
    add("--kl-warmup-iters", type=natural, default=0, help="steps over which the KL weight rises")
    add("--kl-weight", type=rate, default=1.0, help="weight of the KL term; 1: the evidence lower bound")
    decay = number(float, 0, below=1)
    add("--ema-decay", type=decay, default=0.0, help="decay of the weights' EMA, which is tested; 0: off")
    add("--seed", type=natural, default=0, help="for weights, sets and noise; episodes do not depend on it")
    add("--precision", choices=["fp32", "bf16", "auto"], default="fp32", help="auto: bf16 where it is fast")
    add("--compile", action="store_true", help="use torch.compile, with CUDA graphs; the start is slow")
    add = p.add_argument_group("evaluation").add_argument
    add("--images-per-class", type=count, help="stored together; not given: from features.json or labels")
    add("--query", type=count, default=15, help="query images per class")
    add("--eval-episodes", type=count, default=1000, help="episodes of a validation or test, for each shot")
    add("--test-mc-sample-size", type=count, default=256, help="Monte-Carlo samples per image")
    add("--semisupervised-em-iters", type=natural, default=10, help="EM iterations on an episode")
    add("--e-step", choices=READINGS, default="unit",
        help="variance: 1 (published), per class, shared, shared covariance, 1 with hard assignments")
    add("--no-set-attention", action="store_true", help="encode every image alone: an ablation")
    add = p.add_argument_group("test").add_argument
    add("--test-way", type=count, nargs="+", help="ways to test; not given: the way of training")
    add("--test-shot", type=count, nargs="+", default=[1, 5, 20, 50], help="shots to test")
    # fmt: on
    return p


def parse_args(argv=None):
    """Parse the command line and check that its flags fit together."""
    p = make_parser()
    args = p.parse_args(argv)
    if args.checkpoint and not args.eval_only:
        p.error("--checkpoint goes with --eval-only; --resume continues a run")
    if args.eval_only and not args.checkpoint:
        p.error("--eval-only: no --checkpoint found, weights or the folder of a run expected")
    if args.eval_only and (args.resume or args.way != p.get_default("way")):
        p.error(f"{'--resume' if args.resume else '--way'} is of training; --eval-only has --test-way")
    if args.decode_samples and args.decode_samples > args.train_mc_sample_size:
        expected = f"at most --train-mc-sample-size {args.train_mc_sample_size} expected"
        p.error(f"--decode-samples: {args.decode_samples} found, {expected}")
    if args.debug:
        args.train_iters, args.freq_iters, args.eval_episodes = 4, 2, 10
        args.train_mc_sample_size = args.test_mc_sample_size = 2
        args.decode_samples = args.decode_samples and 1
    if not args.eval_only:
        args.test_way = args.test_way or [args.way]
    return args


# --- a step ---------------------------------------------------------------------------------------


def learning_rate(step, args):
    """Return Adam's rate at a step from 1 to --train-iters."""
    if args.lr_schedule == "constant":
        return args.lr
    return 0.5 * args.lr * (1 + math.cos(math.pi * (step - 1) / args.train_iters))


def kl_weight(step, args):
    """Return the KL term's weight; full weight from the start nearly collapses the posterior at first."""
    if step >= args.kl_warmup_iters:
        return args.kl_weight
    return args.kl_weight * (0.02 + 0.98 * step / args.kl_warmup_iters)


def train_step(model, optimizer, x, step, args, generator):
    """Take a step of Adam on the negative evidence lower bound; return its terms (reconstruction, KL)."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, args)
    sizes = args.train_mc_sample_size, args.way, args.unsupervised_em_iters
    reconstruction, kl = model(x, *sizes, args.fix_pi, generator, args.em_start, args.decode_samples)
    optimizer.zero_grad()
    (reconstruction + kl_weight(step, args) * kl).backward()
    optimizer.step()
    return reconstruction, kl


def update_average(average, model, step, args):
    """Update the EMA of the weights.

    The decay is min(--ema-decay, step / (9 + step)), so that the weights of the first steps fade soon.
    """
    move = get_ema_multi_avg_fn(min(args.ema_decay, step / (9 + step)))
    averaged, current = (
        [value for value in module.state_dict().values() if value.is_floating_point()]
        for module in (average, model)
    )
    move(averaged, current, None)


# --- training -------------------------------------------------------------------------------------


def validate(model, images, step, history, args):
    """Score the model on validation episodes; save it as best.pt if it is the best so far."""
    results = evaluate_split(model, images, [args.way], [args.shot], VALIDATION_SEED, args)
    ((name, accuracies),) = results.items()
    result = summary(accuracies)
    if all(result["accuracy"] > line[name]["accuracy"] for line in history):
        best = {"model": model.state_dict(), "sizes": model.sizes, "way": args.way, "step": step}
        save_checkpoint(args.save_dir / "best.pt", best)
    return {name: result}


def train(splits, device, bf16, config, stop, args):
    """Train to --train-iters, from the start or from last.pt.

    Once `stop` is not empty, save a checkpoint and exit with status 128 + signal.
    """
    torch.manual_seed(args.seed)
    sizes = splits["train"].shape[-1], args.hidden_size, args.latent_size
    signed = splits["train"].min().item() < 0
    model = GMVAE(*sizes, not args.no_set_attention, bf16, signed).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    generator = torch.Generator(device).manual_seed(args.seed + 2**31)  # not the draws of the weights
    parts = {"model": model, "optimizer": optimizer, "generator": generator}
    if args.ema_decay:
        parts["average"] = copy.deepcopy(model)
    evaluated = parts.get("average", model)
    if args.compile:
        model.compile(mode="reduce-overhead")  # few passes over memory and, on a GPU, few launches

    last, images = args.save_dir / "last.pt", splits["train"].flatten(0, 1)
    progress = restore(parts, last, {"step": 0, "seconds": 0.0, "history": []})
    start = step = progress["step"]
    history = progress["history"]
    if start > args.train_iters:
        found = f"{args.train_iters} found, at least the {start} steps of {last} expected"
        raise UserError(f"--train-iters: {found}")
    first = rank() == 0  # it validates and writes
    if first:
        write_json(args.save_dir / "config.json", config)
        (args.save_dir / "test.json").unlink(missing_ok=True)  # of an earlier start
    if first and start:  # a kill may have come after last.pt, before this
        write_metrics(args.save_dir, history)
    began, saved = time.monotonic() - progress["seconds"], time.monotonic()

    highest = torch.linalg.vector_norm(images, torch.inf).item()  # of its absolute values
    hint = f"; features up to {highest:.4g} found, of a few units expected: divide them all by one number"
    folder = args.save_dir if first else None
    network = wrap(model)
    log = Log(folder, ("reconstruction", "kl"), model.parameters(), start, hint * (highest > 100))
    log_every = 50 if device.type == "cuda" else 1
    shown = {"desc": args.save_dir.name, "unit": "step", "mininterval": BAR_SECONDS, "disable": not first}
    bar = tqdm(total=args.train_iters, initial=start, **shown)
    for step in range(start + 1, args.train_iters + 1):
        model.train()
        x = share(draw_sets(images, args.batch_size, args.sample_size, generator))
        with share_of_draws():
            terms = train_step(network, optimizer, x, step, args, generator)
        log.add(*mean(*terms))
        if args.ema_decay:
            update_average(evaluated, model, step, args)
        bar.update()
        validating = first and (step % args.freq_iters == 0 or step == args.train_iters)
        leaving = stopping(stop, step % log_every == 0)  # once: a later signal is for the next step
        saving = first and (validating or leaving or time.monotonic() - saved > SAVE_SECONDS)
        if saving or step % log_every == 0:
            terms = log.flush(step)
            bar.set_postfix({name: f"{value:.2f}" for name, value in terms.items()}, refresh=False)
        if validating:
            seconds = round(time.monotonic() - began, 1)  # without this validation
            results = validate(evaluated, splits["val"], step, history, args)
            history.append({"step": step, "seconds": seconds, **terms, **results})
        if saving:
            progress = {"step": step, "seconds": time.monotonic() - began, "history": history}
            save_checkpoint(last, snapshot(parts) | progress | {"sizes": model.sizes, "way": args.way})
            write_metrics(args.save_dir, history)
            saved = time.monotonic()
        if validating:  # printed once it is saved
            for name, r in results.items():
                log.add_scalar(f"validation/{name}", r["accuracy"], step)
            said = "  ".join(f"{name} {r['accuracy']:.2f} ± {r['ci95']:.2f}" for name, r in results.items())
            losses = f"reconstruction {terms['reconstruction']:.1f}  KL {terms['kl']:.1f}"
            bar.write(f"step {step}  {said}  {losses}")
        if leaving:
            break
    bar.close()
    part(stop)
    if stop:
        print(f"stopped after step {step}; --resume continues", file=sys.stderr)
        sys.exit(128 + stop[0])


def weights_for(args):
    """Return {path: shots to test}: a checkpoint, or a folder's best.pt."""
    place = args.checkpoint or args.save_dir
    return {place / "best.pt" if os.path.isdir(place) else place: args.test_shot}


def main():
    args = parse_args()
    batch_size = 0 if args.eval_only else args.batch_size
    with program(), join(args.device, batch_size, args.compile and not args.eval_only) as device:
        bf16 = not args.eval_only and use_bf16(args.precision, device)
        if args.eval_only:
            (path,) = weights_for(args)
            sizes = load_model(path).sizes  # a bad one is refused before anything is written
            args.test_way = args.test_way or [load_checkpoint(path).get("way", args.way)]
        wait(rank() > 0)  # until the first has checked the data and opened the folder
        described = read_description(args.data_dir)
        splits = load_splits(args, described)
        if args.eval_only:
            of = sizes["feature_size"], sizes["signed"], path
            check_alike(args.data_dir, "test", splits["test"], *of)
            check_encoder(described, path, args.data_dir)
        names = make_parser().names
        flags = names("run", "evaluation", "test") | (set() if args.eval_only else names("training"))
        precision = "bf16" if bf16 else "fp32"
        of_args = {name: value for name, value in vars(args).items() if name in flags}
        config = describe_run(of_args, device, precision, splits) | {"features": described}
        splits = {name: images.to(device) for name, images in splits.items()}
        doing = "testing" if args.eval_only else "training"
        print(f"{config['device']}, {doing} in {precision}, tests with --e-step {args.e_step}")
        free = names("run", "test") | ({"train_iters"} if args.lr_schedule == "constant" else set())
        if rank() == 0:
            config = open_folder(args.save_dir, config, args.resume, free, testing=args.eval_only)
        wait(rank() == 0)
        if args.eval_only:
            write_json(args.save_dir / "config.json", config)
            say_other_data(args.checkpoint, config["data"])
        else:
            with catch_stop(world() > 1) as stop:
                train(splits, device, bf16, config, stop, args)
        test(weights_for(args), splits["test"], args)


if __name__ == "__main__":
    main()
