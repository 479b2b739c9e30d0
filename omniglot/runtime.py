"""Keep a run safe and repeatable: files, checkpoints, its folder. The same file in every folder."""

import io
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from machine import HERE, UserError, device_name, in_short, lenient, write
from parallel import world

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def write_json(path, value):
    write(path, json.dumps(value, indent=1) + "\n")


def write_metrics(folder, history):
    write(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))


def save_checkpoint(path, checkpoint):
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write(path, buffer.getbuffer())


def load_checkpoint(path):
    """Load a checkpoint onto the CPU, without pickle's code execution. Raises UserError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: not found, a checkpoint expected") from None
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(f"{path}: not a readable checkpoint ({in_short(error)})") from None


def snapshot(parts):
    """Return the state of {name: module, optimizer or generator}, as a checkpoint stores it."""
    generators = {name: part.get_state() for name, part in parts.items() if isinstance(part, torch.Generator)}
    return {name: part.state_dict() for name, part in parts.items() if name not in generators} | generators


def restore(parts, path, progress):
    """Load the parts from a last.pt and return its progress; return `progress` if there is no last.pt.

    Raises UserError if another program wrote it, or another kind of device whose random state it holds.
    """
    if not path.exists():
        return progress
    checkpoint = load_checkpoint(path)
    try:
        for name, part in parts.items():
            (part.set_state if isinstance(part, torch.Generator) else part.load_state_dict)(checkpoint[name])
        return {name: checkpoint[name] for name in progress}
    except (IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: not a checkpoint of this run and device ({in_short(error)})") from None


def describe_run(args, device, precision, arrays):
    """Describe a run for config.json: command, flags, precision, device, versions, commit, data.

    args {name: value}; arrays {split: tensor on the CPU}: their shapes and checksums are kept.
    """
    describe = "git describe --always --dirty --abbrev=40 --exclude=*"  # -dirty: files differ from the commit
    commit, sums = "", {split: zlib.crc32(array.contiguous().numpy()) for split, array in arrays.items()}
    with suppress(OSError):
        commit = subprocess.run(describe.split(), cwd=HERE, capture_output=True, text=True).stdout.strip()
        known = subprocess.run(["git", "ls-files", "main.py"], cwd=HERE, capture_output=True).stdout
        commit += "-untracked" * bool(commit and not known)  # of a copied folder, which no commit has
    return {
        "command": shlex.join(["python", *sys.argv]),
        "args": {name: str(value) if isinstance(value, Path) else value for name, value in args.items()},
        "precision": precision,
        "device": f"{world()} x " * (world() > 1) + device_name(device),
        "versions": dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__),
        "git_commit": commit or None,
        "data": {split: {"shape": list(arrays[split].shape), "crc32": crc} for split, crc in sums.items()},
    }


def read_config(folder, strict=True):
    """Read config.json of a run; {} where there is none. Raises UserError if it is damaged and `strict`."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        parts = {"args": dict(config["args"]), "data": dict(config.get("data", {}))}
        return config | parts | {"precision": config["precision"]}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError):
        if not strict:  # what lies beside weights may be of something else
            return {}
        raise UserError(f"{path}: not readable, the flags of the run in {folder} expected") from None


def differences(config, before, free):
    """Return a line on how two runs differ, without the `free` flags; empty if they do not differ."""
    facts = []
    for c in (config, before):
        flags = {f"{name}: ": value for name, value in c["args"].items() if name not in free}
        data = {f"data_dir: {name} data of ": v for name, v in c["data"].items() if name != "test"}
        facts.append(flags | data | {"precision: ": c["precision"]})
    found, expected = facts  # a flag newer than the run is not compared
    flags = {k: "--" + k.replace("_", "-") for k, value in found.items() if expected.get(k, value) != value}
    return "; ".join(f"{flag}{found[k]} found, {expected[k]} expected" for k, flag in flags.items())


def say_other_data(place, data):
    """Print a line if `data`, from `describe_run`, are not those of the run at `place`."""
    folder = place if place.is_dir() else place.parent
    trained_on = read_config(folder, strict=False).get("data", {})
    other = [split for split, of in data.items() if trained_on.get(split, of) != of]
    if other:
        print(f"other {', '.join(other)} data than those of the run in {folder}, as its config.json says")


def open_folder(folder, config, resume=False, free=(), testing=False):
    """Lock the folder of a run for this process; return the content of its config.json.

    A resumed run may change the `free` flags only; its config.json lists the new start under `resumed`. A run
    that ended before its first checkpoint is replaced; a test replaces a test. Raises UserError.
    """
    before, last = read_config(folder), folder / "last.pt"
    signs = ("last.pt", "metrics.jsonl") if testing else ("last.pt", "metrics.jsonl", "test.json")
    held = any((folder / name).exists() for name in signs)
    if held and not resume:
        kind, hint = ("a training", "") if testing else ("another", "; --resume continues it" * last.exists())
        raise UserError(f"--save-dir: {folder} holds {kind} run, another folder expected{hint}")
    if held and not (before and last.exists()):
        missing = folder / ("last.pt" if before else "config.json")
        raise UserError(f"{missing}: not found, the state of the run expected to --resume it")
    if differing := held and differences(config, before, free):
        raise UserError(f"{differing}, as the run in {folder} was started")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fcntl and fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--save-dir: {folder} is written by another process, another expected") from None
    except OSError as error:
        if not folder.is_dir():  # otherwise the file system has no locks
            raise UserError(f"--save-dir: {folder} is no folder to write to ({error.strerror})") from None
    if testing:  # if interrupted, it leaves no earlier numbers beside its config.json
        with suppress(OSError):  # where it cannot be removed, nothing can be written either
            (folder / "test.json").unlink()
    if not held:
        return config
    say_other_data(folder, config["data"])  # the test data may differ
    now = {name: config[name] for name in ("command", "device", "versions", "git_commit")}
    return before | {k: config[k] for k in ("args", "data")} | {"resumed": [*before.get("resumed", []), now]}


class Log:
    """Losses, read from the device many steps at once; drawn by TensorBoard if there is a folder."""

    def __init__(self, folder, names, parameters, step, hint=""):
        self.names, self.parameters, self.pending, self.hint = names, list(parameters), [], hint
        self.add_scalar = lambda *_: None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(folder / "tb_log", purge_step=step + 1)
            self.add_scalar = lenient(writer.add_scalar)  # a full disk ends the curves, not the run
        except (ImportError, OSError) as error:
            print(f"no curves in tb_log: {in_short(error)}", file=sys.stderr)

    def add(self, *terms):
        self.pending.append(torch.stack(terms).detach())

    def flush(self, step):
        """Return the losses of `step`, the latest, as {name: float}; draw all since the last call.

        Raises UserError for a loss or a weight that is not finite.
        """
        rows, self.pending = torch.stack(self.pending).tolist(), []
        weights = all(p.isfinite().all() for p in self.parameters)
        for i, row in enumerate(rows, start=step + 1 - len(rows)):
            terms = dict(zip(self.names, row))
            if not all(map(math.isfinite, row)) or (i == step and not weights):
                found = ", ".join(f"{name} {value}" for name, value in terms.items())
                what = "a weight" if all(map(math.isfinite, row)) else "the loss"
                raise UserError(f"step {i}: {what} is not finite ({found}), finite ones expected{self.hint}")
            for name, value in terms.items():
                self.add_scalar(f"train/{name}", value, i)
        return terms
