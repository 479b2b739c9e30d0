"""Train on the processes that torchrun starts, by torch.distributed. The same file in every folder.

Each process makes the random draws of the whole step and keeps its share; the first one validates and writes.
With one process nothing here has an effect.
"""

import os
import signal
import sys
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from machine import UserError, choose_device, in_short

PATIENCE = timedelta(hours=1)  # the others wait while the first process validates


def rank():
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def join(name, batch_size, compiling=False):
    """Join the other processes, if there are any, and yield this one's device, from `choose_device`.

    A batch size of 0 means no training: the first process goes on alone and the others exit. An error of
    several processes is printed by one. Raises UserError, also if another process has ended.
    """
    number = int(os.environ.get("RANK", 0))
    count = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
    if count == 1 or not (batch_size or number):
        yield choose_device(name, compiling)
        return
    if not batch_size:
        sys.exit()
    sys.stdout = open(os.devnull, "w") if number else sys.stdout
    store = next(dist.rendezvous("env://"))[0]  # torchrun's store outlives the processes
    try:
        if batch_size % count:
            expected = f"a multiple of the {count} processes expected"
            raise UserError(f"--batch-size: {batch_size} found, {expected}")
        if name not in ("auto", "cpu", "cuda"):
            raise UserError(f"--device: {name} found, auto, cpu or cuda of {count} processes expected")
        if name != "cpu" and torch.cuda.is_available():
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        device, backend, ours = choose_device(name, compiling), "gloo", {}
        if device.type == "cuda":
            torch.cuda.set_device(device)
            backend, ours = "nccl", {"device_id": device}
        place = {"store": store, "rank": number, "world_size": count}
        dist.init_process_group(backend, timeout=PATIENCE, **place, **ours)
        yield device
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun may send one before the error is printed
        ended = isinstance(error, dist.DistError)
        ended |= isinstance(error, RuntimeError) and "gloo" in str(error)
        said, alike = store.add("said", 1), store.add(in_short(error), 1)
        if isinstance(error, Exception):
            if (said if ended else alike) > 1:
                sys.exit(2)
            number and print(file=sys.stderr)  # the first process's bar may be on this line
        if not ended:
            raise
        found = f"another process of the run ended ({in_short(error).split('. ')[0]})"
        raise UserError(f"{found}; --resume continues from last.pt") from None
    finally:
        if dist.is_initialized() and dist.get_backend() == "gloo":  # its threads abort an exit; NCCL may hang
            dist.destroy_process_group()


def wait(this=True):
    """Wait for the other processes, if `this` is true."""
    if this and world() > 1:
        dist.barrier()


def part(stop):
    """Wait for all processes; then the first goes on alone and the others exit."""
    number = rank()
    wait()
    if world() > 1:
        dist.destroy_process_group()
    if number:
        sys.exit(128 + stop[0] if stop else 0)


def share(x, dim=0):
    """Return this process's consecutive part of x along a dimension."""
    return x if world() == 1 else x.chunk(world(), dim)[rank()]


class ShareOfDraws(TorchFunctionMode):
    """Let torch.rand and torch.randn draw the rows of all processes, and return only this one's."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function not in (torch.rand, torch.randn):
            return function(*args, **(kwargs or {}))
        return share(function(args[0] * world(), *args[1:], **(kwargs or {})))


def share_of_draws():
    return nullcontext() if world() == 1 else ShareOfDraws()


def wrap(model):
    """Average a model's gradients over all processes; compute batch norm's statistics from all images.

    The latter works on GPUs only. On a CPU torch has no such layer: each process normalises its own share,
    and the first one's running statistics are saved.
    """
    if world() == 1:
        return model
    if next(model.parameters()).is_cuda:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return DistributedDataParallel(model)


def gather(h, views):
    """Gather the rows h (views * n, width) of all processes in the order of one: (views * N, width).

    Each process computes the loss of all rows, so the gradient of its own rows needs no communication. It is
    multiplied by the number of processes, because `wrap` averages where a sum is needed.
    """
    if world() == 1:
        return h
    rows = [torch.empty_like(h, memory_format=torch.contiguous_format) for _ in range(world())]
    dist.all_gather(rows, h.detach().contiguous())
    rows[rank()] = h
    if h.requires_grad:
        h.register_hook(lambda gradient: gradient * world())
    return torch.cat([part.unflatten(0, (views, -1)) for part in rows], 1).flatten(0, 1)


def mean(*terms):
    """Return the means of scalars over all processes, without gradient."""
    if world() > 1:
        terms = torch.stack(terms).detach()
        dist.all_reduce(terms)
        terms = terms.div_(world()).unbind()
    return terms


def stopping(stop, now=True):
    """Tell whether to stop. Several processes check together if `now` is true: a signal to one stops all."""
    if world() == 1:
        return bool(stop)
    if not now:
        return False
    signum = torch.tensor(stop[0] if stop else 0, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(signum, dist.ReduceOp.MAX)
    if signum and not stop:
        stop.append(signum.item())
    return bool(signum)
