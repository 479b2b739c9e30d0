"""Handle errors, signals, memory, files, flags and devices. The same file in every folder."""

import argparse
import ctypes
import math
import os
import platform
import re
import shlex
import signal
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
NO_MEMORY = "can't allocate memory|out of memory|ALLOC_FAILED|unable to find an engine"  # in torch's errors
BAR_SECONDS = 0.1 if sys.stderr and sys.stderr.isatty() else 30  # between updates of a progress bar


class UserError(Exception):
    """An error that the user can fix; one line says what was found and what was expected."""


def in_short(error):
    """Return the first line of what an error says, the second after a colon, its kind if it says nothing."""
    first, *more = (str(error) or type(error).__name__).splitlines()
    return more[0].strip() if first.endswith(":") and more else first


def lenient(method):
    """Make a method drop what it cannot write (closed pipe, full disk), so that the run goes on."""

    def call(*args):
        with suppress(OSError):
            return method(*args)

    return call


@contextmanager
def program():
    """Set up the process; on a UserError or out of memory, print one line and exit with status 2."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # None if it is closed
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # print ? if the encoding has no ±
        stream.write, stream.flush = lenient(stream.write), lenient(stream.flush)
        setattr(sys, name, stream)
    keep_memory()
    torch.set_flush_denormal(True)  # on a CPU, products with responsibilities of 1e-40 are slow
    torch.backends.cudnn.benchmark = True  # the shapes never change
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # float32 on a GPU too
    try:
        yield
    except (UserError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search(NO_MEMORY, str(error)):
            raise
        said = error
        if not isinstance(error, UserError):
            said = f"not enough memory for these sizes ({in_short(error)})"
        line = f"{Path(sys.argv[0]).name}: error: {said}"
        tqdm.write(line, file=sys.stderr)  # below a progress bar, not on it
        sys.exit(2)
    except KeyboardInterrupt:  # outside of training, where there is nothing to save
        sys.exit(130)


def keep_memory():
    """Make glibc keep the pages of freed tensors: clearing them again would take half of a CPU step.

    Not every hole between kept pages fits a later tensor, so the number of pages grows. When it exceeds 1.5
    times that of the first optimizer step, the free pages are given back.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-1, -1), (-4, 0), (-8, 1)):  # M_TRIM_THRESHOLD: none, M_MMAP_MAX, M_ARENA_MAX
            libc.mallopt(option, value)
    except (OSError, AttributeError):
        return  # not glibc: slower, otherwise the same
    most = []

    def tidy(*_):
        held = int(Path("/proc/self/statm").read_text().split()[1])
        if not most:
            most.append(1.5 * held)
        if held > most[0]:
            libc.malloc_trim(0)

    register_optimizer_step_post_hook(tidy)


@contextmanager
def catch_stop(several=False):
    """Yield a list that receives SIGINT and SIGTERM; the same signal again ends the program at once.

    With `several` processes it does not: one may get a signal from torchrun and one from elsewhere.
    """
    received = []

    def handler(signum, _):
        received.append(signum)
        if several:
            return
        signal.signal(signum, signal.SIG_DFL)
        with suppress(OSError):
            os.write(2, b"\nstopping after this step\n")  # print is not safe in a handler

    before = {signum: signal.signal(signum, handler) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, earlier in before.items():
            signal.signal(signum, earlier)


def write(path, data):
    """Write bytes or text; after a kill the file is the old one or the whole new one. Raises UserError."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: not written ({error.strerror or error})") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


# --- flags ----------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Parse flags, also those of a file given as @file: one flag per line, its reason after #."""

    def __init__(self, **kwargs):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(formatter_class=formatter, allow_abbrev=False, fromfile_prefix_chars="@", **kwargs)

    def convert_arg_line_to_args(self, line):
        line.encode()  # since Python 3.12 argparse hides here what is not UTF-8; before, it raises itself
        try:
            return shlex.split(re.sub(r"(^|\s)#.*", "", line))  # a name may have a # inside
        except ValueError as error:
            self.error(f"{line}: {error} found, a flag and its value expected")

    def parse_known_args(self, *args, **kwargs):
        try:
            return super().parse_known_args(*args, **kwargs)
        except UnicodeError as error:
            self.error(f"@: {error} found, a file of flags in UTF-8 expected")

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def names(self, *groups):
        """Return the names of the flags in these groups, as in the parsed namespace."""
        return {
            a.dest for group in self._action_groups if group.title in groups for a in group._group_actions
        }


def user_path(text):
    """Parse a path and expand `~`, which a shell leaves alone after an equals sign."""
    try:
        text.encode()
    except UnicodeEncodeError:  # TensorBoard cannot write there
        raise argparse.ArgumentTypeError(f"{text!a} found, a name in UTF-8 expected") from None
    return Path(os.path.expanduser(text))


def number(kind, low, below=math.inf):
    """Make an argparse type: an int or float with low <= value < below."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value < below:
            limit = f"of at least {low}" + ("" if below == math.inf else f" and below {below}")
            one = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text} found, {one} {limit} expected")
        return value

    return parse


# --- device ---------------------------------------------------------------------------------------


def choose_device(name, compiling=False):
    """Return the torch.device of `auto`, `cpu`, `cuda`, `cuda:N` or `mps`, after running a kernel there.

    Raises UserError, also if torch.compile is asked for and does not work.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?|mps", name):
        raise UserError(f"--device: {name} found, auto, cpu, cuda, cuda:N or mps expected")
    try:
        tried = torch.ones(2, device=name)
        tried.sum().item()
    except (RuntimeError, AssertionError) as error:
        expected = f"a device of this machine expected ({in_short(error)})"
        raise UserError(f"--device: {name} found, {expected}") from None
    try:
        compiling and torch.compile(torch.Tensor.square)(tried)  # importing it takes a second
    except RuntimeError as error:
        expected = "a C++ compiler (a GPU: Triton) expected"
        raise UserError(f"--compile: {in_short(error)} found, {expected}") from None
    return tried.device


def cpu_facts():
    """Return what Linux says about the processor; an empty string elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def device_name(device):
    """Return the name of the device, for a CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"{platform.machine()} MPS"
    named = re.search(r"^model name\s*: (.*)$", cpu_facts(), re.MULTILINE)
    return f"{named[1] if named else platform.machine()} CPU, {torch.get_num_threads()} threads"


def use_bf16(precision, device):
    """Tell whether the networks run under bfloat16 autocast; `auto`: if the hardware has it.

    Raises UserError on MPS, where only float32 is known to work.
    """
    if precision == "bf16" and device.type == "mps":
        raise UserError("--precision: bf16 found, fp32 expected for --device mps")
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and "avx512_bf16" in cpu_facts()
