"""Meta-GMVAE on Omniglot: meta-train without labels, validate and test few-shot classification.

    python main.py --data-dir ../data/omniglot --save-dir runs/5way --way 5 --sample-size 200

The published recipe is the default. The folder `--save-dir` receives config.json, metrics.jsonl, last.pt,
1shot_best.pt, 5shot_best.pt, test.json and tb_log/. See README.md for the data and for the fast recipe.
"""

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for large CPU tensors; read when torch first allocates

import argparse
import ctypes
import json
import math
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from dataloader import DataError, as_float, check_episodes, draw_episodes, draw_sets, load_split
from model import GMVAE, classify, loss_terms, sample_posterior

HERE = Path(__file__).resolve().parent
VALIDATION_SHOTS = (1, 5)
SAVE_SECONDS = 300  # at most this much work is lost to a kill
# What a resumed run may change: where and how it runs and what it is tested on, not what it trains.
FREE_ON_RESUME = {"data_dir", "save_dir", "device", "resume", "eval_only", "checkpoint", "test_way", "test_shot"}


class UserError(Exception):
    """Ends the program in one line with exit status 2."""


# --- command line ---------------------------------------------------------------------------------


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} found, an integer of at least 1 expected")
    return value


def natural(text):
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} found, an integer of at least 0 expected")
    return value


def rate(text):
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{value} found, a finite number of at least 0 expected")
    return value


def fraction(text):
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{value} found, a number from 0 up to, not including, 1 expected")
    return value


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_args(argv=None):
    p = Parser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    g = p.add_argument_group("files")
    g.add_argument("--data-dir", type=Path, default=HERE.parent / "data/omniglot", help="folder with train.npy, val.npy, test.npy")
    g.add_argument("--save-dir", type=Path, default=Path("runs/default"), help="folder this run writes; must not hold another run")
    g.add_argument("--resume", action="store_true", help="continue the run in --save-dir from its last.pt")
    g.add_argument("--eval-only", action="store_true", help="no training: test --checkpoint, write test.json into --save-dir")
    g.add_argument("--checkpoint", type=Path, help="weights for --eval-only; without it, the best ones of --save-dir")
    g = p.add_argument_group("model")
    g.add_argument("--hidden-size", type=positive, default=64, help="channels of the convolutions; the set network is 4 times as wide")
    g.add_argument("--latent-size", type=positive, default=64, help="dimensions of the latent space")
    g = p.add_argument_group("training")
    g.add_argument("--batch-size", type=positive, default=4, help="sets a step")
    g.add_argument("--sample-size", type=positive, default=200, help="images a set (published: 200 for 5-way, 300 for 20-way)")
    g.add_argument("--train-mc-sample-size", type=positive, default=32, help="Monte-Carlo samples an image in training")
    g.add_argument("--unsupervised-em-iters", type=natural, default=10, help="EM iterations on each training set")
    g.add_argument("--fix-pi", action="store_true", help="keep the mixture weights uniform in training")
    g.add_argument("--train-iters", type=positive, default=60000, help="training steps")
    g.add_argument("--lr", type=rate, default=1e-3, help="Adam's learning rate")
    g.add_argument("--lr-schedule", choices=["constant", "cosine"], default="constant", help="cosine: from --lr to zero at the last step")
    g.add_argument("--weight-decay", type=rate, default=1e-6, help="Adam's L2 penalty")
    g.add_argument("--kl-warmup-iters", type=natural, default=0, help="steps over which the KL term's weight rises from 0.02 to --kl-weight")
    g.add_argument("--kl-weight", type=rate, default=1.0, help="final weight of the KL term; 1 is the evidence lower bound")
    g.add_argument("--ema-decay", type=fraction, default=0.0, help="validate and test an exponential moving average of the weights; 0: off")
    g = p.add_argument_group("evaluation")
    g.add_argument("--way", type=positive, default=5, help="mixture components in training, classes of a validation episode")
    g.add_argument("--query", type=positive, default=15, help="query images a class")
    g.add_argument("--freq-iters", type=positive, default=1000, help="steps between validations")
    g.add_argument("--eval-episodes", type=positive, default=1000, help="episodes of a validation or test, for each shot")
    g.add_argument("--test-mc-sample-size", type=positive, default=32, help="Monte-Carlo samples an image in evaluation")
    g.add_argument("--semisupervised-em-iters", type=natural, default=10, help="EM iterations on each episode")
    g.add_argument("--e-step", choices=["unit", "learned"], default="unit", help="variance in the episode's E-step: 1 (published) or learned")
    g.add_argument("--test-way", type=positive, nargs="+", help="ways to test, any number of classes (default: --way)")
    g.add_argument("--test-shot", type=positive, nargs="+", default=[1, 5], help="shots to test")
    g = p.add_argument_group("machine")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    g.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="of the training networks; auto: bf16 where it is fast")
    g.add_argument("--seed", type=natural, default=0, help="of weights, batches and noise; episodes are the same for all seeds")
    g.add_argument("--debug", action="store_true", help="smoke run: 4 steps, 2 validations of 10 episodes, 2 Monte-Carlo samples")
    args = p.parse_args(argv)
    if args.debug:
        args.train_iters, args.freq_iters, args.eval_episodes = 4, 2, 10
        args.train_mc_sample_size = args.test_mc_sample_size = 2
    if args.checkpoint and not args.eval_only:
        p.error("--checkpoint goes with --eval-only; to continue a run use --resume")
    args.test_way = args.test_way or [args.way]
    return args


def choose_device(name):
    """`auto`, or a name torch knows -> torch.device, tried once. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device: {name} found, a device of this machine expected ({str(error).splitlines()[0]})") from None


def use_bf16(precision, device):
    """Whether the networks train under bfloat16 autocast: asked for, or `auto` on hardware with bf16 arithmetic."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and "avx512_bf16" in cpu_flags()


def cpu_flags():
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def keep_memory():
    """Have glibc keep freed pages: half of a plain CPU step is the kernel clearing gigabyte tensors again."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # not glibc: slower, otherwise the same
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # malloc.h
    for option, value in ((trim_threshold, 2**31 - 1), (mmap_max, 0), (arena_max, 1)):
        mallopt(option, value)


# --- files ----------------------------------------------------------------------------------------


def write_atomically(path, write):
    """`write(temporary path)`, then rename: a kill at any moment leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def write_text(path, text):
    write_atomically(path, lambda temporary: temporary.write_text(text))


def save_checkpoint(path, checkpoint):
    write_atomically(path, lambda temporary: torch.save(checkpoint, temporary))


def load_checkpoint(path):
    """A checkpoint on the CPU, without pickle's code execution. Raises UserError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: not found, a checkpoint expected") from None
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(f"{path}: not a checkpoint of this program ({str(error).splitlines()[0]})") from None


def load_model(path):
    """The network of a checkpoint in evaluation mode, sized as it was trained. Raises UserError."""
    checkpoint = load_checkpoint(path)
    try:
        model = GMVAE(**checkpoint["sizes"])
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: not a checkpoint of this program ({str(error).splitlines()[0]})") from None
    return model.eval()


def git_commit():
    result = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return result.stdout.strip() or None


def describe_run(args, device, bf16):
    """Everything that made a run: flags, versions, device, commit."""
    return {
        "args": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "precision": "bf16" if bf16 else "fp32",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "git_commit": git_commit(),
    }


# --- evaluation -----------------------------------------------------------------------------------


@torch.no_grad()
def encode_all(model, images, batch=1000):
    """Features of every image: in evaluation mode each image is encoded alone, so once is enough.

    images (classes, drawings, 28, 28, 1) -> (classes * drawings, width).
    """
    return torch.cat([model.encode(as_float(x)) for x in images.flatten(0, 1).split(batch)])


@torch.no_grad()
def evaluate(model, features, episodes, shot, samples, em_iters, learned_e_step, seed=0):
    """Accuracy of every episode, in percent: (episodes,).

    features (images, width) from `encode_all`; episodes (count, way, shot + query) from `draw_episodes`.
    Support and query pass the set network together (transductive). One draw of noise, made on the CPU,
    serves all episodes: every device and every validation sees the same.
    """
    count, way, members = episodes.shape
    noise = torch.randn(way, members, samples, model.sizes["latent_size"], generator=torch.Generator().manual_seed(seed))
    noise, labels = noise.to(features.device), torch.arange(way, device=features.device).repeat_interleave(members - shot)
    correct = []
    for batch in episodes.to(features.device).split(max(1, 20000 // (way * members * samples) + 1)):
        mean, log_var = model.posterior(features[batch.flatten(1)])  # (B, way * members, D)
        z, _ = sample_posterior(mean, log_var, noise.flatten(0, 1))
        z = z.unflatten(1, (way, members))  # (B, way, members, S, D)
        probabilities = classify(z[:, :, :shot], z[:, :, shot:].flatten(1, 2), em_iters, learned_e_step)
        correct.append((probabilities.argmax(-1) == labels).float().mean(-1))
    return 100 * torch.cat(correct).cpu()


def evaluate_split(model, images, ways, shots, args, seed):
    """{'5way1shot': {accuracy, ci95, episodes}, ...} in percent, ci95 = 1.96 std / sqrt(episodes)."""
    model.eval()
    bf16, model.bf16 = model.bf16, False  # so that accuracies do not depend on the training machine
    features, results = encode_all(model, images), {}
    for way in ways:
        for shot in shots:
            episodes = draw_episodes(images, way, shot, args.query, args.eval_episodes, seed)
            accuracy = evaluate(model, features, episodes, shot, args.test_mc_sample_size, args.semisupervised_em_iters, args.e_step == "learned")
            ci95 = 1.96 * accuracy.std(correction=0).item() / len(accuracy) ** 0.5
            results[f"{way}way{shot}shot"] = {"accuracy": accuracy.mean().item(), "ci95": ci95, "episodes": len(accuracy)}
    model.bf16 = bf16
    return results


def test(images, args, device, checkpoint_of):
    """Tests every way and shot with the checkpoint of that shot, prints the table and returns it."""
    results = {}
    for shot in args.test_shot:
        model = load_model(checkpoint_of(shot)).to(device)
        results |= evaluate_split(model, images, args.test_way, [shot], args, seed=2)
    for name, r in results.items():
        print(f"{name:>14}  {r['accuracy']:6.2f} ± {r['ci95']:.2f} %  ({r['episodes']} test episodes)")
    return results


# --- training -------------------------------------------------------------------------------------


def learning_rate(step, args):
    return args.lr if args.lr_schedule == "constant" else 0.5 * args.lr * (1 + math.cos(math.pi * (step - 1) / args.train_iters))


def kl_weight(step, args):
    """Linear warm-up from 0.02: with full weight from the start the posterior hides in the prior for thousands of steps."""
    rise = min(1.0, step / args.kl_warmup_iters) if args.kl_warmup_iters else 1.0
    return args.kl_weight * (0.02 + 0.98 * rise) if rise < 1 else args.kl_weight


def train_step(model, optimizer, x, step, args, generator):
    """One step of Adam on the (KL-weighted) negative evidence lower bound; returns both terms, on the device."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, args)
    recon, kl = loss_terms(model, x, args.train_mc_sample_size, args.way, args.unsupervised_em_iters, args.fix_pi, generator)
    optimizer.zero_grad()
    (recon + kl_weight(step, args) * kl).backward()
    optimizer.step()
    return torch.stack([recon, kl]).detach()


def train(args, device, bf16, splits):
    """The run: trains from the start or from last.pt, leaving its files in args.save_dir."""
    torch.manual_seed(args.seed)
    model = GMVAE(args.hidden_size, args.latent_size, bf16).to(device)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay), use_buffers=True) if args.ema_decay else None
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=device.type in ("cuda", "cpu"))
    generator = torch.Generator(device).manual_seed(args.seed)
    images = splits["train"].flatten(0, 1)
    last, history, seconds = args.save_dir / "last.pt", [], 0.0
    start = 0
    if last.exists():
        state = load_checkpoint(last)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        if average:
            average.load_state_dict(state["average"])
        start, history, seconds = state["step"], state["history"], state["seconds"]
    write_text(args.save_dir / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))
    evaluated = average.module if average else model
    best = {shot: max((line[f"{args.way}way{shot}shot"]["accuracy"] for line in history), default=-1.0) for shot in VALIDATION_SHOTS}
    tensorboard = SummaryWriter(args.save_dir / "tb_log", purge_step=start + 1)

    stopped = []
    for number in (signal.SIGINT, signal.SIGTERM):  # the first asks for a checkpoint, a second one kills
        signal.signal(number, lambda received, _: (stopped.append(received), signal.signal(received, signal.SIG_DFL)))
    log_every = 50 if device.type == "cuda" else 1  # reading a loss waits for the GPU; on the CPU it costs nothing
    recent, began, saved = [], time.monotonic() - seconds, time.monotonic()
    bar = tqdm(total=args.train_iters, initial=start, desc=args.save_dir.name, unit="step", dynamic_ncols=True)
    for step in range(start + 1, args.train_iters + 1):
        model.train()
        x = draw_sets(images, args.batch_size, args.sample_size, generator)
        recent.append(train_step(model, optimizer, x, step, args, generator))
        if average:
            average.update_parameters(model)
        validate = step % args.freq_iters == 0 or step == args.train_iters
        save = validate or bool(stopped) or time.monotonic() - saved > SAVE_SECONDS
        bar.update()
        if save or step % log_every == 0:
            terms = torch.stack(recent).tolist()
            for i, (recon, kl) in enumerate(terms, start=step + 1 - len(terms)):
                if not math.isfinite(recon + kl):
                    raise UserError(f"step {i}: the loss is not finite (reconstruction {recon}, KL {kl}); {last.name} keeps the last good checkpoint")
                tensorboard.add_scalar("train/reconstruction", recon, i)
                tensorboard.add_scalar("train/kl", kl, i)
            bar.set_postfix(recon=f"{recon:.1f}", kl=f"{kl:.2f}", refresh=False)
            recent = []
        if save and not all(p.isfinite().all() for p in model.parameters()):
            raise UserError(f"step {step}: weights are not finite (reconstruction {recon}, KL {kl}); {last.name} keeps the last good checkpoint")
        if validate:
            results = evaluate_split(evaluated, splits["val"], [args.way], VALIDATION_SHOTS, args, seed=1)
            line = {"step": step, "seconds": round(time.monotonic() - began, 1), "reconstruction": recon, "kl": kl, **results}
            history.append(line)
            for shot in VALIDATION_SHOTS:
                r = results[f"{args.way}way{shot}shot"]
                tensorboard.add_scalar(f"validation/{args.way}way{shot}shot", r["accuracy"], step)
                if r["accuracy"] > best[shot]:
                    best[shot] = r["accuracy"]
                    save_checkpoint(args.save_dir / f"{shot}shot_best.pt", {"model": evaluated.state_dict(), "sizes": model.sizes, "step": step, "validation": results})
            text = "  ".join(f"{k} {r['accuracy']:.2f} ± {r['ci95']:.2f}" for k, r in results.items())
            bar.write(f"step {step}  {text}  reconstruction {recon:.1f}  KL {kl:.2f}")
        if save:
            state = {"model": model.state_dict(), "sizes": model.sizes, "optimizer": optimizer.state_dict(), "generator": generator.get_state()}
            state |= {"average": average.state_dict()} if average else {}
            save_checkpoint(last, state | {"step": step, "history": history, "seconds": time.monotonic() - began})
            write_text(args.save_dir / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))
            saved = time.monotonic()
        if stopped and step < args.train_iters:
            bar.close()
            print(f"stopped at step {step}; continue with --resume", file=sys.stderr)
            sys.exit(128 + stopped[0])
    bar.close()
    tensorboard.close()


# --- program --------------------------------------------------------------------------------------


def check_folder(args, config):
    """Refuses a folder that holds another run, and a resume that would train something else. Raises UserError."""
    path = args.save_dir / "config.json"
    if not path.exists():
        return
    if not args.resume:
        raise UserError(f"{args.save_dir}: holds another run ({path.name}), an empty folder expected; --resume continues it")
    before = json.loads(path.read_text())["args"]
    for name, value in config["args"].items():
        if name not in FREE_ON_RESUME and before.get(name) != value:
            raise UserError(f"--{name.replace('_', '-')}: {value} found, {before.get(name)} expected, as the run in {args.save_dir} was started")


def main():
    keep_memory()
    args = parse_args()
    try:
        device = choose_device(args.device)
        torch.backends.cudnn.benchmark = True  # shapes never change
        bf16 = use_bf16(args.precision, device)
        config = describe_run(args, device, bf16)
        names = ["test"] if args.eval_only else ["train", "val", "test"]
        splits = {name: load_split(args.data_dir, name) for name in names}
        check_episodes(args.data_dir, "test", splits["test"], args.test_way, args.test_shot, args.query)
        if not args.eval_only:
            check_episodes(args.data_dir, "val", splits["val"], [args.way], VALIDATION_SHOTS, args.query)
            found, needed = splits["train"].shape[:2].numel(), args.batch_size * args.sample_size
            if found < needed:
                raise UserError(f"{args.data_dir / 'train.npy'}: {found} images, at least --batch-size x --sample-size = {needed} expected")
            if args.sample_size * args.train_mc_sample_size < args.way:
                raise UserError(f"--way: {args.way} found, at most {args.sample_size * args.train_mc_sample_size} samples of a set expected")
            check_folder(args, config)
        splits = {name: images.to(device) for name, images in splits.items()}
        args.save_dir.mkdir(parents=True, exist_ok=True)
        if not args.eval_only:
            write_text(args.save_dir / "config.json", json.dumps(config, indent=1) + "\n")
            train(args, device, bf16, splits)
        best = lambda shot: args.checkpoint or args.save_dir / f"{1 if shot == 1 else 5}shot_best.pt"
        results = test(splits["test"], args, device, best)
        write_text(args.save_dir / "test.json", json.dumps(results, indent=1) + "\n")
    except (UserError, DataError) as error:
        print(f"main.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
