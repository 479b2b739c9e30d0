"""What keeps a run fast, safe and repeatable: flags, device, files, checkpoints, signals (the same text in every experiment)."""

import argparse
import ctypes
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import numpy as np
import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
NO_MEMORY = "can't allocate memory|out of memory|ALLOC_FAILED|unable to find an engine"  # torch's words: of a CPU, and of a GPU's libraries


class UserError(Exception):
    """Something the user can put right: ends the program in one line (what was found, what was expected), exit status 2."""


def in_short(error):
    """The first line of what an error says, or its kind if it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]


@contextmanager
def one_line_errors():
    """Ends the program as `UserError` says on one, on an error of the operating system, and where memory does not suffice."""
    try:
        yield
    except (UserError, OSError, RuntimeError) as error:
        no_memory = re.search(NO_MEMORY, str(error))
        if isinstance(error, RuntimeError) and not no_memory:
            raise
        said = f"not enough memory for these sizes ({in_short(error)})" if no_memory else error
        tqdm.write(f"{Path(sys.argv[0]).name}: error: {said}", file=sys.stderr)  # on a line of its own, where a progress bar stands
        sys.exit(2)
    except KeyboardInterrupt:  # outside of training, where there is nothing to save
        sys.exit(130)


# --- flags ----------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Parse flags, also from files named as @file: one flag a line, the rest of a line after # is its reason.

    Shows every default in --help and says an error in one line.
    """

    def __init__(self, **kwargs):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(formatter_class=formatter, allow_abbrev=False, fromfile_prefix_chars="@", **kwargs)

    def convert_arg_line_to_args(self, line):
        return shlex.split(line, comments=True)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def user_path(text):
    """Parse a path, `~` included, which a shell leaves alone after an equals sign."""
    return Path(text).expanduser()


def number(kind, low, below=math.inf):
    """An argparse type: an int or float with low <= value < below."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value < below:
            limit = "" if below == math.inf else f" and below {below}"
            raise argparse.ArgumentTypeError(f"{text} found, {'an integer' if kind is int else 'a number'} of at least {low}{limit} expected")
        return value

    return parse


# --- machine --------------------------------------------------------------------------------------


def choose_device(name):
    """Return the torch.device of `auto`, `cpu`, `cuda`, `cuda:N` or `mps`, once a kernel has run there. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?|mps", name):
        raise UserError(f"--device: {name} found, auto, cpu, cuda, cuda:N or mps expected")
    try:
        tried = torch.ones(2, device=name)
        tried.sum().item()
        return tried.device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device: {name} found, a device of this machine expected ({in_short(error)})") from None


def use_bf16(precision, device):
    """Whether to run the networks under bfloat16 autocast: as asked, or for `auto` where the hardware multiplies bf16."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and "avx512_bf16" in cpu_facts()


def check_compiler(device):
    """Raises UserError where torch.compile does not work: a first small function has it look for what it needs."""
    try:
        torch.compile(torch.Tensor.square)(torch.ones(2, device=device))
    except RuntimeError as error:
        raise UserError(f"--compile: {in_short(error)} found, a C++ compiler expected, and Triton for a GPU") from None


def cpu_facts():
    """What Linux says of the processor; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def cpu_name():
    named = re.search(r"^model name\s*: (.*)$", cpu_facts(), re.MULTILINE)
    return f"{named[1] if named else platform.machine()} CPU"


class Lenient:
    """A stream that loses what it cannot write, to a closed pipe or a full disk: no reason to end a run."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with suppress(OSError):
            self.stream.flush()


def print_in_any_encoding():
    """Have output that nobody can read end no run: a sign that its encoding lacks is shown as ?, the rest is lost."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # None where it is closed
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
        setattr(sys, name, Lenient(stream))


def keep_memory():
    """Has glibc keep freed pages: half of a plain CPU step is the kernel clearing the same large tensors again."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # not glibc: slower, otherwise the same
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # malloc.h
    for option, value in ((trim_threshold, -1), (mmap_max, 0), (arena_max, 1)):  # -1: never
        mallopt(option, value)


class Heap:
    """Bounds what `keep_memory` keeps: holes in the heap that no tensor fits make it grow, to three times the need within an hour."""

    def __init__(self):
        self.most = None
        try:
            self.trim = ctypes.CDLL("libc.so.6").malloc_trim
        except (OSError, AttributeError):
            self.most = math.inf  # nothing is kept

    def tidy(self):
        """To call after every step: gives all free pages back once the process holds 1.5 times what it held after the first."""
        if self.most != math.inf:
            held = int(Path("/proc/self/statm").read_text().split()[1])  # resident pages
            self.most = self.most or 1.5 * held
            if held > self.most:
                self.trim(0)


# --- files ----------------------------------------------------------------------------------------


def write_atomically(path, write):
    """`write(temporary path)`, then rename: a kill or a power cut at any moment leaves the old file or the new one, whole.

    Raises UserError if the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: not written ({error.strerror or error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    write_atomically(path, lambda temporary: temporary.write_text(text))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_metrics(save_dir, history):
    """metrics.jsonl: a line for each validation."""
    write_text(save_dir / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))


def save_checkpoint(path, checkpoint):
    try:
        write_atomically(path, lambda temporary: torch.save(checkpoint, temporary))
    except RuntimeError as error:  # torch's word for a full disk
        raise UserError(f"{path}: not written, room on the disk expected ({in_short(error)})") from None


def load_checkpoint(path):
    """A checkpoint, on the CPU, without pickle's code execution. Raises UserError."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: not found, a checkpoint expected") from None
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(f"{path}: not a readable checkpoint ({in_short(error)})") from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: not a checkpoint (a {type(checkpoint).__name__} found, a dictionary expected)")
    return checkpoint


def load_model(path, network):
    """`network` built with the sizes stored in a checkpoint, with its weights, in evaluation mode. Raises UserError.

    Of a last.pt with a moving average of the weights, the average: it is what the run validates.
    """
    checkpoint = load_checkpoint(path)
    try:
        model = network(**checkpoint["sizes"])
        weights = checkpoint.get("average") or checkpoint["model"]
        # DataParallel and torch.compile put a word before each name.
        model.load_state_dict({re.sub(r"^((module|_orig_mod)\.)+", "", name): of for name, of in weights.items()})
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: not a checkpoint of this experiment ({in_short(error)})") from None
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"{path}: weights that are NaN or infinite found, finite ones expected")
    return model.eval()


def validated_way(path):
    """The number of ways of a checkpoint's validation episodes; None for a last.pt before its first validation. Raises UserError."""
    checkpoint = load_checkpoint(path)
    line = checkpoint.get("validation") or (checkpoint.get("history") or [{}])[-1]  # {"5way1shot": ..., ...}
    return next((int(name.partition("way")[0]) for name in line if name.endswith("shot")), None)


def snapshot(parts):
    """State of {name: module, optimizer, generator, ...}, as a checkpoint stores it."""
    return {name: part.get_state() if isinstance(part, torch.Generator) else part.state_dict() for name, part in parts.items()}


def restore(parts, checkpoint, path):
    """The reverse of `snapshot`, in place; `path` is where the checkpoint came from.

    Raises UserError if it is another program's, or of another kind of device, whose random numbers cannot be continued.
    """
    try:
        for name, part in parts.items():
            part.set_state(checkpoint[name]) if isinstance(part, torch.Generator) else part.load_state_dict(checkpoint[name])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: not a checkpoint of this run on this kind of device ({in_short(error)})") from None


# --- runs -----------------------------------------------------------------------------------------


def git_commit():
    """Name the commit of this file's repository, with -dirty if files differ from it; None without git or a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=HERE, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def describe_run(args, device, bf16, arrays):
    """What made a run, for config.json: the command, every flag, the precision chosen, device, versions, commit, data.

    arrays {split: tensor on the CPU}, of which it keeps shapes and checksums.
    """
    return {
        "command": shlex.join(["python", *sys.argv]),
        "args": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "precision": "bf16" if bf16 else "fp32",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "git_commit": git_commit(),
        "data": {split: {"shape": list(array.shape), "crc32": zlib.crc32(array.contiguous().numpy())} for split, array in arrays.items()},
    }


def read_config(save_dir):
    """config.json of a run; None where there is none. Raises UserError if it is damaged."""
    path = save_dir / "config.json"
    try:
        config = json.loads(path.read_text())
        return config | {"args": dict(config["args"]), "precision": config["precision"]}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not readable, the flags of the run in {save_dir} expected") from None


def open_folder(save_dir, config, resume, free):
    """Makes a training run's folder, or opens it again; `free` flags may then differ from the first time.

    Returns the config.json to write once the run's state is restored: `config` or, of a resumed run, its first one with this
    time added to `resumed`. Raises UserError if the folder holds another run, or if a resumed one would train something else
    or on something else. A folder whose run ended before its first checkpoint counts as empty.
    """
    try:
        str(save_dir).encode()
    except UnicodeEncodeError:  # TensorBoard cannot write there
        raise UserError(f"--save-dir: {save_dir} found, a name in UTF-8 expected") from None
    before = read_config(save_dir)
    if not before and (save_dir / "last.pt").exists():
        raise UserError(f"{save_dir}: last.pt found without its config.json, an empty folder or a whole run expected")
    if not any((save_dir / name).exists() for name in ("last.pt", "metrics.jsonl", "test.json")):
        before = None
    if before and not resume:
        unfinished = "; --resume continues it" if (save_dir / "last.pt").exists() else ""
        raise UserError(f"{save_dir}: holds another run (config.json), an empty folder expected{unfinished}")
    if before:
        found, expected = ({**c["args"], "precision": c["precision"]} for c in (config, before))
        for name, value in found.items():
            if name not in free and expected.get(name, value) != value:  # a flag that is newer than the run had its default
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag}: {value} found, {expected[name]} expected, as the run in {save_dir} was started")
        for split in [name for name in ("train", "val") if name in before.get("data", {})]:  # an older run kept no checksums
            found, expected = (f"shape {c['data'][split]['shape']}, crc32 {c['data'][split]['crc32']}" for c in (config, before))
            if found != expected:
                raise UserError(f"--data-dir: {split} data of {found} found, {expected} expected, as the run in {save_dir} was started")
        if not (save_dir / "last.pt").exists():
            raise UserError(f"{save_dir / 'last.pt'}: not found, the state of the run expected to --resume it; a new run needs another --save-dir")
        say_other_data(save_dir, config["data"])  # those of the test may differ
        again = {name: config[name] for name in ("command", "device", "versions", "git_commit")}
        config = {**before, "args": config["args"], "resumed": [*before.get("resumed", []), again]}
    save_dir.mkdir(parents=True, exist_ok=True)
    lock(save_dir)
    return config


def lock(save_dir):
    """Keeps the folder for this process until it ends. Raises UserError if another one has it."""
    if fcntl:
        folder = os.open(save_dir, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--save-dir: {save_dir} is written by another process, a folder of this run's own expected") from None
        except OSError:
            pass  # a file system without locks


def say_other_data(checkpoint, data):
    """Print a line if `data`, as `describe_run` has them, are not those of the run that a checkpoint lies in."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    try:
        trained_on = read_config(folder)["data"]
        other = [split for split in data if trained_on.get(split, data[split]) != data[split]]
    except (UserError, KeyError, TypeError, AttributeError):
        return  # weights alone, or of an older run: nothing is known
    if other:
        found = f"other {', '.join(other)} data than those of the run in {folder}"
        print(f"{found}, as the checksums in its config.json say")


def open_test_folder(save_dir, config, used):
    """Makes the folder of a test of --checkpoint, with its config.json: of all flags those that are `used`, and float32.

    Replaces an earlier test. Says if its data are others than the run's. Raises UserError if a training run is there.
    """
    before = read_config(save_dir)
    if before and not (before["args"].get("eval_only") or before["args"].get("export_only")):
        raise UserError(f"--save-dir: {save_dir} holds a training run, another folder expected for what is made of --checkpoint")
    save_dir.mkdir(parents=True, exist_ok=True)
    (save_dir / "test.json").unlink(missing_ok=True)  # an interrupted test must not leave an earlier one's numbers beside its config
    args = {name: value for name, value in config["args"].items() if name in used}
    write_json(save_dir / "config.json", {**config, "args": args, "precision": "fp32"})
    say_other_data(Path(config["args"]["checkpoint"]), config["data"])


@contextmanager
def catch_stop():
    """Within it, a list receives the first SIGINT or SIGTERM; a second one ends the program at once."""
    received, signals = [], (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(signum) for signum in signals]

    def handler(signum, _):
        received.append(signum)
        signal.signal(signum, signal.SIG_DFL)
        with suppress(OSError):
            os.write(2, b"\nstopping after this step\n")  # print is not safe in a handler

    for signum in signals:
        signal.signal(signum, handler)
    try:
        yield received
    finally:
        for signum, earlier in zip(signals, before):
            signal.signal(signum, earlier)


class LossLog:
    """Losses of the latest steps, kept on the device: reading one waits for the GPU, so they are read many at a time."""

    def __init__(self, names, tensorboard, cause=""):
        self.names, self.tensorboard, self.cause, self.pending = names, tensorboard, cause, []

    def add(self, *terms):
        self.pending.append(torch.stack(terms).detach())

    def flush(self, step):
        """Writes the pending losses, the last of which is of `step`, and returns that one as {name: float}.

        Raises UserError for a loss that is not finite, with its step, all its terms and what may be the cause.
        """
        rows = torch.stack(self.pending).tolist()
        self.pending = []
        for i, row in enumerate(rows, start=step + 1 - len(rows)):
            if not all(map(math.isfinite, row)):
                terms = ", ".join(f"{name} {value}" for name, value in zip(self.names, row))
                raise UserError(f"step {i}: the loss is not finite ({terms}), a finite one expected{self.cause}")
            for name, value in zip(self.names, row):
                self.tensorboard.add_scalar(f"train/{name}", value, i)
        return dict(zip(self.names, row))
