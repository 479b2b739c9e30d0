"""Meta-GMVAE on Mini-ImageNet: meta-train on features of unlabeled images, then test few-shot classification.

    python main.py --data-dir ../data/imgnet --save-dir runs/5way

The published recipe is the default. `--save-dir` receives config.json, metrics.jsonl, last.pt, best.pt,
test.json and tb_log/. README.md has the data, the features and the results.
"""

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for large CPU tensors; torch reads it at its first allocation

import copy
import math
import sys
import time
from pathlib import Path

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from dataloader import check_apart, check_episodes, check_width, draw_sets, load_split, read_description
from evaluate import evaluate_split
from model import GMVAE
from runtime import (
    HERE, Heap, LossLog, Parser, UserError, catch_stop, check_compiler, choose_device, describe_run, keep_memory, load_checkpoint, load_model,
    number, one_line_errors, open_folder, open_test_folder, read_config, print_in_any_encoding, restore, save_checkpoint, snapshot, use_bf16, user_path, validated_way, write_json, write_metrics,
)  # fmt: skip

VALIDATION_SEED, TEST_SEED = 1, 2  # of the episodes: the same for every run
SAVE_SECONDS = 300  # at most this much training is lost to a kill
# What a resumed run may change: where it runs and what it is tested on, not what it trains.
FREE_ON_RESUME = {"data_dir", "save_dir", "device", "resume", "eval_only", "checkpoint", "test_way", "test_shot"}
# What a test depends on; the rest of the flags is of training.
TEST_FLAGS = {
    "data_dir", "save_dir", "eval_only", "checkpoint", "no_set_attention", "query", "eval_episodes", "test_mc_sample_size",
    "semisupervised_em_iters", "e_step", "test_way", "test_shot", "device", "debug", "images_per_class"
}  # fmt: skip


def parse_args(argv=None):
    """The command line as a namespace; the published defaults."""
    count, natural, rate = number(int, 1, below=2**31), number(int, 0, below=2**31), number(float, 0)
    p = Parser(description=__doc__.split("\n")[0])
    g = p.add_argument_group("files")
    g.add_argument("--data-dir", type=user_path, default=HERE.parent / "data/imgnet", help="folder with train_, val_ and test_features.npy")
    g.add_argument("--images-per-class", type=count, help="images of a class, which lie together; without it, as features.json or the labels beside say")
    g.add_argument("--save-dir", type=user_path, default=Path("runs/default"), help="folder this run writes; must not hold another run")
    g.add_argument("--resume", action="store_true", help="continue the run in --save-dir from its last.pt, or start it where there is none")
    g.add_argument("--eval-only", action="store_true", help="no training, whose flags do nothing then: test --checkpoint, write test.json into --save-dir")
    g.add_argument("--checkpoint", type=user_path, help="weights for --eval-only, or the folder of a run: its best")
    g = p.add_argument_group("model")
    g.add_argument("--hidden-size", type=count, default=512, help="width of the decoder's hidden layers; the set network is as wide as a feature")
    g.add_argument("--latent-size", type=count, default=32, help="dimensions of the latent space")
    g.add_argument("--no-set-attention", action="store_true", help="every image alone, in training or in --eval-only: an ablation")
    g = p.add_argument_group("training")
    g.add_argument("--batch-size", type=count, default=16, help="sets a step")
    g.add_argument("--sample-size", type=count, default=5, help="images a set")
    g.add_argument("--train-mc-sample-size", type=count, default=256, help="Monte-Carlo samples an image in training")
    g.add_argument("--decode-samples", type=count, help="of an image's samples, drawn anew each step, how many are decoded; without it, all")
    g.add_argument("--unsupervised-em-iters", type=natural, default=10, help="EM iterations on each training set")
    g.add_argument("--em-start", choices=["samples", "images"], default="samples", help="where it starts: any samples (published), or those of different images")
    g.add_argument("--fix-pi", action="store_true", help="keep the mixture weights uniform in training")
    g.add_argument("--train-iters", type=count, default=15000, help="training steps")
    g.add_argument("--lr", type=rate, default=1e-4, help="Adam's learning rate")
    g.add_argument("--lr-schedule", choices=["constant", "cosine"], default="constant", help="cosine: from --lr to zero at the last step")
    g.add_argument("--weight-decay", type=rate, default=5e-2, help="Adam's L2 penalty")
    g.add_argument("--kl-warmup-iters", type=natural, default=0, help="steps over which the KL term's weight rises from 0.02 of --kl-weight to all of it")
    g.add_argument("--kl-weight", type=rate, default=1.0, help="final weight of the KL term; 1 is the evidence lower bound")
    g.add_argument("--ema-decay", type=number(float, 0, below=1), default=0.0, help="validate and test a moving average of the weights; 0: off")
    g = p.add_argument_group("evaluation")
    g.add_argument("--way", type=count, default=5, help="mixture components in training, classes of a validation episode")
    g.add_argument("--shot", type=count, default=1, help="labeled images a class of a validation episode")
    g.add_argument("--query", type=count, default=15, help="query images a class")
    g.add_argument("--freq-iters", type=count, default=1000, help="steps between validations")
    g.add_argument("--eval-episodes", type=count, default=1000, help="episodes of a validation, and of a test for each shot")
    g.add_argument("--test-mc-sample-size", type=count, default=256, help="Monte-Carlo samples an image in evaluation")
    g.add_argument("--semisupervised-em-iters", type=natural, default=10, help="EM iterations on each episode")
    g.add_argument("--e-step", choices=["unit", "learned", "tied", "hard"], default="unit", help="variance of an episode's E-step: 1 (published), learned, learned and shared by the classes; hard: k-means")
    g.add_argument("--test-way", type=count, nargs="+", help="ways to test, whatever --way is; without it, --way, or the checkpoint's own with --eval-only")
    g.add_argument("--test-shot", type=count, nargs="+", default=[1, 5, 20, 50], help="shots to test")
    g = p.add_argument_group("machine")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    g.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="of the networks in training; auto: bf16 where it is fast")
    g.add_argument("--compile", action="store_true", help="fuse the training step by torch.compile, on a GPU into CUDA graphs: a wait at the start")
    g.add_argument("--seed", type=number(int, 0, below=2**31), default=0, help="of weights, sets and noise; episodes are the same for every seed")
    g.add_argument("--debug", action="store_true", help="smoke run: 4 steps, 2 validations of 10 episodes, 2 Monte-Carlo samples")
    args = p.parse_args(argv)
    if args.checkpoint and not args.eval_only:
        p.error("--checkpoint goes with --eval-only; --resume continues a run")
    if args.eval_only and not args.checkpoint:
        p.error("--eval-only: no --checkpoint found, weights or the folder of a run expected")
    if args.eval_only and (args.resume or args.way != p.get_default("way")):
        p.error(f"{'--resume' if args.resume else '--way'} is of training, --eval-only found; --test-way sets the ways of a test")
    if args.debug:
        args.train_iters, args.freq_iters, args.eval_episodes = 4, 2, 10
        args.train_mc_sample_size = args.test_mc_sample_size = 2
    if args.decode_samples and args.decode_samples > args.train_mc_sample_size:
        expected = f"at most --train-mc-sample-size {args.train_mc_sample_size} expected"
        p.error(f"--decode-samples: {args.decode_samples} found, {expected}")
    if not args.eval_only:
        args.test_way = args.test_way or [args.way]
    return args


# --- testing --------------------------------------------------------------------------------------


def best_checkpoint(args):
    """The weights to test: --checkpoint or, of a run's folder, those that were best on validation."""
    place = args.checkpoint or args.save_dir
    return place / "best.pt" if place.is_dir() else place


def test(images, device, args):
    """The test table of --checkpoint, or of the run just trained; printed and written to test.json."""
    model = load_model(best_checkpoint(args), GMVAE).to(device)
    model.sizes["set_attention"] &= not args.no_set_attention
    results = evaluate_split(model, images, args.test_way, args.test_shot, TEST_SEED, args)
    for name, r in results.items():
        print(f"test  {name:>12}  {r['accuracy']:6.2f} ± {r['ci95']:.2f} %  ({r['episodes']} episodes)")
    write_json(args.save_dir / "test.json", results)


# --- training -------------------------------------------------------------------------------------


def learning_rate(step, args):
    """Adam's rate at a step from 1 to --train-iters."""
    return args.lr if args.lr_schedule == "constant" else 0.5 * args.lr * (1 + math.cos(math.pi * (step - 1) / args.train_iters))


def kl_weight(step, args):
    """The KL term's weight at a step: at full weight from the start, the posterior hides in the prior for thousands of steps."""
    if step >= args.kl_warmup_iters:
        return args.kl_weight
    return args.kl_weight * (0.02 + 0.98 * step / args.kl_warmup_iters)


def train_step(model, optimizer, x, step, args, generator):
    """One step of Adam on the negative evidence lower bound; returns its terms (reconstruction, KL), on the device."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, args)
    sizes = args.train_mc_sample_size, args.way, args.unsupervised_em_iters
    reconstruction, kl = model(x, *sizes, args.fix_pi, generator, args.em_start, args.decode_samples)
    optimizer.zero_grad()
    (reconstruction + kl_weight(step, args) * kl).backward()
    optimizer.step()
    return reconstruction, kl


def update_average(average, model, step, args):
    """Move the average of the weights, and of batch norm's statistics, towards the model.

    The decay rises to --ema-decay, min(decay, (1 + t) / (10 + t)), so that the first steps' weights are soon forgotten.
    """
    move = get_ema_multi_avg_fn(min(args.ema_decay, step / (9 + step)))
    floats = ([value for value in module.state_dict().values() if value.is_floating_point()] for module in (average, model))
    move(*floats, None)


def validate(model, images, step, history, args):
    """One line of metrics; the model becomes `best.pt` if it is the best so far."""
    results = evaluate_split(model, images, [args.way], [args.shot], VALIDATION_SEED, args)
    name = f"{args.way}way{args.shot}shot"
    if all(results[name]["accuracy"] > line[name]["accuracy"] for line in history):
        checkpoint = {"model": model.state_dict(), "sizes": model.sizes, "step": step, "validation": results}
        save_checkpoint(args.save_dir / "best.pt", checkpoint)
    return results


def train(splits, device, bf16, config, stop, args):
    """Trains from the start, or from last.pt, to --train-iters. Leaves with status 128 + signal, after a checkpoint, once `stop` is not empty."""
    torch.manual_seed(args.seed)
    model = GMVAE(splits["train"].shape[-1], args.hidden_size, args.latent_size, not args.no_set_attention, bf16).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    generator = torch.Generator(device).manual_seed(args.seed + 2**31)  # other draws than the weights'
    parts = {"model": model, "optimizer": optimizer, "generator": generator}
    if args.ema_decay:
        parts["average"] = copy.deepcopy(model)
    evaluated = parts.get("average", model)
    if args.compile:
        model.compile(mode="reduce-overhead")  # few passes over memory and, on a GPU, few launches instead of hundreds

    last, images = args.save_dir / "last.pt", splits["train"].flatten(0, 1)
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
    highest = images.max().item()
    found = f"; features up to {highest:.4g} found, of a few units expected"
    cause = f"{found}: divide them all by one number" if highest > 100 else ""
    heap, losses = Heap(), LossLog(("reconstruction", "kl"), tensorboard, cause)
    log_every = 50 if device.type == "cuda" else 1
    quiet = 0.1 if sys.stderr.isatty() else 30  # seconds between updates of the bar
    bar = tqdm(total=args.train_iters, initial=start, desc=args.save_dir.name, unit="step", mininterval=quiet, dynamic_ncols=True)
    for step in range(start + 1, args.train_iters + 1):
        model.train()
        x = draw_sets(images, args.batch_size, args.sample_size, generator)
        losses.add(*train_step(model, optimizer, x, step, args, generator))
        if args.ema_decay:
            update_average(evaluated, model, step, args)
        heap.tidy()
        bar.update()
        validating = step % args.freq_iters == 0 or step == args.train_iters
        stopping = bool(stop)  # read once: a signal from here on is for the next step
        saving = validating or stopping or time.monotonic() - saved > SAVE_SECONDS
        if saving or step % log_every == 0:
            terms = losses.flush(step)
            bar.set_postfix({name: f"{value:.2f}" for name, value in terms.items()}, refresh=False)
        if saving and not all(p.isfinite().all() for p in model.parameters()):
            found = ", ".join(f"{name} {value}" for name, value in terms.items())
            raise UserError(f"step {step}: a weight is not finite ({found}), finite ones expected{cause}")
        if validating:
            results = validate(evaluated, splits["val"], step, history, args)
            history.append({"step": step, "seconds": round(time.monotonic() - began, 1), **terms, **results})
            for name, r in results.items():
                tensorboard.add_scalar(f"validation/{name}", r["accuracy"], step)
        if saving:
            progress = {"step": step, "seconds": time.monotonic() - began, "history": history}
            save_checkpoint(last, snapshot(parts) | progress | {"sizes": model.sizes})
            write_metrics(args.save_dir, history)
            saved = time.monotonic()
        if validating:  # said once it is saved
            scores = "  ".join(f"{name} {r['accuracy']:.2f} ± {r['ci95']:.2f}" for name, r in results.items())
            bar.write(f"step {step}  {scores}  reconstruction {terms['reconstruction']:.1f}  KL {terms['kl']:.1f}")
        if stopping:
            break
    bar.close()
    tensorboard.close()
    if stop:
        print(f"stopped after step {progress['step']}; --resume continues", file=sys.stderr)
        sys.exit(128 + stop[0])


def check_encoder(described, path, data_dir):
    """Raises UserError if the features are of another encoder than those that a checkpoint was trained on, as far as both are known."""
    trained_on = (read_config(path.parent) or {}).get("features", {})
    for name, unit in (("train_epochs", "epochs of SimCLR"), ("encoder_crc32", "as the encoder's checksum")):
        found, expected = (of.get(name) for of in (described, trained_on))
        if found and expected and found != expected:
            raise UserError(f"{data_dir / 'features.json'}: features of {found} {unit} found, of {expected} expected, as {path} was trained on")


def load_splits(args, described):
    """The arrays this run needs, checked against its flags, {split: tensor}; `described` from `read_description`. Raises UserError."""
    names = ["test"] if args.eval_only else ["train", "val", "test"]
    splits = {}
    for name in names:
        given, expected = args.images_per_class, described.get("images_per_class", {}).get(name)
        if given and expected and given != expected:
            raise UserError(f"--images-per-class: {given} found, {expected} expected as {args.data_dir / 'features.json'} says")
        known = expected or given
        if not known and name != "train" and not (args.data_dir / f"{name}_labels.npy").exists():
            found = f"neither features.json nor {name}_labels.npy found in {args.data_dir}"
            raise UserError(f"--images-per-class: {found}, the number of images of a class expected (600 in Mini-ImageNet)")
        splits[name] = load_split(args.data_dir, name, known or 1, described.get("crc32", {}).get(name))
        if known and name != "train" and splits[name].shape[1] != known:
            found = f"{splits[name].shape[1]} images a class found in {name}_labels.npy"
            raise UserError(f"{args.data_dir}: {found}, {known} expected as --images-per-class or features.json say")
    check_apart(args.data_dir, splits)
    check_episodes(args.data_dir, "test", splits["test"], args.test_way, args.test_shot, args.query)
    if not args.eval_only:
        for name in ("val", "test"):
            check_width(args.data_dir, name, splits[name], splits["train"].shape[-1], "train_features.npy")
        check_episodes(args.data_dir, "val", splits["val"], [args.way], [args.shot], args.query)
        found, needed = splits["train"].shape[:2].numel(), args.batch_size * args.sample_size
        if found < needed:
            raise UserError(f"{args.data_dir}/train_features.npy: {found} images found, at least --batch-size x --sample-size = {needed} expected")
        most = args.sample_size * args.train_mc_sample_size
        if args.way > most:
            raise UserError(f"--way: {args.way} found, at most --sample-size x --train-mc-sample-size = {most} expected: a component starts at a sample")
    return splits


def main():
    keep_memory()
    print_in_any_encoding()
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 is float32 on a GPU too
    args = parse_args()
    with one_line_errors():
        device = choose_device(args.device)
        bf16 = use_bf16(args.precision, device)
        if args.compile and not args.eval_only:
            check_compiler(device)
        if args.eval_only:
            path = best_checkpoint(args)
            width = load_model(path, GMVAE).sizes["feature_size"]  # refused before anything is written
            args.test_way = args.test_way or [validated_way(path) or args.way]
        described = read_description(args.data_dir)
        splits = load_splits(args, described)
        run = describe_run(args, device, bf16, splits) | {"features": described}
        splits = {name: images.to(device) for name, images in splits.items()}
        print(f"{run['device']}, {'testing in fp32' if args.eval_only else 'training in ' + run['precision']}")
        if args.eval_only:
            check_width(args.data_dir, "test", splits["test"], width, path)
            check_encoder(described, path, args.data_dir)
            open_test_folder(args.save_dir, run, TEST_FLAGS)
        else:
            config = open_folder(args.save_dir, run, args.resume, FREE_ON_RESUME)
            with catch_stop() as stop:
                train(splits, device, bf16, config, stop, args)
        test(splits["test"], device, args)


if __name__ == "__main__":
    main()
