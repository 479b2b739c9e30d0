"""Run a program on a pretended GPU: python pretend.py SCRIPT FLAGS.

Its tensors say that they are on cuda, but are computed on the CPU. An operation on a tensor of cuda and one
of the CPU raises, as on a GPU (here also an index), and so does a generator of the CPU for a tensor of cuda.
At its end the program prints where it would have waited for the GPU, and how often. What only a real GPU
shows is not tested: its kernels, bfloat16, memory, speed.
"""

import runpy
import sys
import traceback
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda:0")
WAITING = {"_local_scalar_dense", "nonzero", "equal", "_unique2", "masked_select"}
waits = Counter()


def wait(name):
    """Count a wait in the program's line that causes it."""
    lines = [frame for frame in traceback.extract_stack() if Path(frame.filename).parent == Path.cwd()]
    waits[f"{Path(lines[-1].filename).name} {lines[-1].name} {name}" if lines else name] += 1


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        self = super().__new__(cls)
        self.of = torch.device(device).type
        return self


class CudaTensor(torch.Tensor):
    """A tensor that says it is on cuda; it holds one of the CPU, with which it is computed."""

    device, is_cuda = CUDA, True
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __new__(cls, held):
        shape = held.shape, held.stride(), held.storage_offset()
        self = torch.Tensor._make_wrapper_subclass(cls, *shape, dtype=held.dtype)
        self.held = held
        return self

    def __reduce_ex__(self, protocol):  # for torch.save
        return self.held.clone().__reduce_ex__(protocol)

    def numpy(self):
        raise TypeError("a tensor of cuda as a NumPy array")

    def tolist(self):
        return self.cpu().tolist()

    def cpu(self):
        wait("to the CPU")
        return self.held.clone()

    def to(self, *args, **kwargs):
        here = "cpu" in map(str, (*args, *kwargs.values()))
        return self.cpu() if here else super().to(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


def compute(operation, args, kwargs):
    """Run an operation with the tensors held; its results are on cuda if an argument or `device` is."""
    name, leaves = operation.overloadpacket.__name__, tree_leaves((args, kwargs))
    ours = {id(leaf.held): leaf for leaf in leaves if isinstance(leaf, CudaTensor)}
    others = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, CudaTensor)]
    device = kwargs.get("device")
    on_cuda = bool(ours) or (device is not None and device.type == "cuda")
    if name in ("copy_", "_to_copy"):
        if on_cuda and others and not kwargs.get("non_blocking"):
            wait(name)
    elif ours and any(other.ndim for other in others):
        raise RuntimeError(f"{name}: tensors of cuda and of the CPU")
    if any(leaf.of != ("cuda" if on_cuda else "cpu") for leaf in leaves if isinstance(leaf, Generator)):
        raise RuntimeError(f"{name}: a generator of another device")
    if ours and name in WAITING:
        wait(name)
    args, kwargs = tree_map(lambda x: x.held if isinstance(x, CudaTensor) else x, (args, kwargs))
    out = operation(*args, **(kwargs | {"device": torch.device("cpu")} if device else kwargs))
    if not on_cuda or any(out is other for other in others):  # the latter: copied to the CPU
        return out

    def wrap(x):
        if not isinstance(x, torch.Tensor):
            return x
        return ours[id(x)] if id(x) in ours else CudaTensor(x)

    return tree_map(wrap, out)


class Pretend(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


def main():
    script = Path(sys.argv[1]).resolve()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(script.parent))
    torch.Generator = Generator
    torch.Tensor.pin_memory = lambda tensor: tensor
    torch.cuda._lazy_init = lambda: None
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_name = lambda device: "a pretended GPU"
    for name in ("_accelerator", "_cuda"):  # of newer and older versions of torch
        setattr(torch.optim.Optimizer, f"{name}_graph_capture_health_check", lambda optimizer: None)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with Pretend():
        runpy.run_path(str(script), run_name="__main__")
    print(*(f"waited {count} times: {place}" for place, count in sorted(waits.items())), sep="\n")


if __name__ == "__main__":
    main()
