"""Measure time and memory of the programs on this machine, at the published settings and on random inputs.

    python bench.py                   # every measurement, some minutes
    python bench.py --baseline        # and the plain version of tests/plain.py beside it, 17 to 25 minutes

Prints a table and writes results/bench/<device>-<precision>.json (on a CPU with its threads). A time is the
median of several after a warm-up. The baseline is eager float32 written from the equations; it has to give
the same results. Both run in the same process, on the same inputs and draws, and are timed by turns. Each
measurement has a process of its own: the heap left by an earlier one made the plain version twice as fast or
slow.
"""

import os

# Use huge pages, as the programs do. torch reads this once, so the plain version profits from them too.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import ctypes
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torchvision
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.utils.flop_counter import FlopCounterMode

sys.path[:0] = [str(Path(__file__).resolve().parent / name) for name in ("tests", "results")]
from folders import ROOT, load
from pairs import COMPILED, PAIRS, difference
from speed import speed_table

machine, runtime = load("omniglot", "machine"), load("omniglot", "runtime")
SECONDS = 12  # of timing per part of a measurement, but at least 6 calls, 3 of the plain version


# --- measuring ------------------------------------------------------------------------------------


def glibc():
    """Return the C library if it is glibc, whose allocator can be set; otherwise None."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
    except OSError:
        return None


def use_allocator(version):
    """Set `keep_memory` for our version, the stock allocator at its highest thresholds for the plain one."""
    libc = glibc()
    _global_optimizer_post_hooks.clear()  # that of an earlier `keep_memory`: it would trim the other's heap
    if version == "ours":
        machine.keep_memory()
    elif libc:
        trim_threshold, mmap_threshold, mmap_max, arena_max = -1, -3, -4, -8  # malloc.h
        libc.mallopt(mmap_max, 65536)
        libc.mallopt(mmap_threshold, 32 * 2**20)
        libc.mallopt(trim_threshold, 64 * 2**20)
        libc.mallopt(arena_max, 0)
        libc.malloc_trim(0)


def resident(field):
    """Ask Linux for VmRSS or VmHWM (its peak) of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{field}:\s*(\d+)", status, re.MULTILINE)[1])


def peak_of(call, device):
    """Return (result, peak of the memory that a call adds, in bytes; None if unknown)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return call(), torch.cuda.max_memory_allocated(device) - before
    libc = glibc()
    try:
        if libc:
            libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = resident("VmRSS")
    except OSError:
        return call(), None
    return call(), resident("VmHWM") - before


def seconds(call, device, repeat=1):
    """Return the seconds per call of `repeat` calls in a row; wait for a GPU only before and after."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    wait(device)
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    wait(device)
    return (time.perf_counter() - start) / repeat


def first_calls(call, device, warm_up):
    """Warm up; return (first result, FLOP of products and convolutions, peak memory or None, seconds)."""
    observed = [peak_of(call, device) for _ in range(warm_up)]
    with FlopCounterMode(display=False) as counter:  # under it torch.compile has no effect
        took = seconds(lambda: observed.append(peak_of(call, device)), device)
    if took < 10 or device.type == "cuda":  # again, without what the first call loads or chooses
        took = seconds(lambda: observed.append(peak_of(call, device)), device)
    memory = observed[0 if warm_up else -1][1]  # CUDA graphs keep their memory from the first call on
    return observed[0][0], counter.get_total_flops(), memory, took


def measure(pair, device, baseline, repeat):
    """Measure a pair; return its row of the JSON file. `difference` has to be at most `tolerance`."""
    versions = {"ours": pair.ours} | ({"plain": pair.plain} if baseline else {})
    rounds = 3 if baseline else 1  # a shared machine has fast and slow periods
    results, plans, samples = {}, {}, {}
    row = {"title": pair.title, "unit": pair.unit, "items": pair.items, "precision": pair.precision}
    for version, parts in versions.items():
        use_allocator(version)
        row[version], memories = {"flop": 0}, []
        for part, (call, times) in parts.items():
            warm_up = pair.warm_up if version == "ours" else 0
            results[version], flop, memory, took = first_calls(call, device, warm_up)
            count = repeat or int(min(max(SECONDS / took, 6 if version == "ours" else 3), 30))
            plans[version, part] = call, math.ceil(count / rounds), max(1, int(0.05 / took))
            row[version]["flop"] += int(times * flop)
            memories.append(memory)
        row[version]["memory_bytes"] = None if None in memories else max(memories)
    if baseline:
        row |= {"difference": difference(results["ours"], results["plain"]), "tolerance": pair.tolerance}
    for _ in range(rounds):
        for (version, part), (call, count, in_a_row) in plans.items():
            use_allocator(version)
            # The plain version is timed with torch's default; the results above are without TF32.
            torch.backends.cudnn.allow_tf32 = version == "plain"
            # Ours regains its pages, lost in the other's turn; with TF32 cuDNN chooses its kernels anew.
            for _ in range({"ours": 3 if baseline else 0, "plain": int(device.type == "cuda")}[version]):
                call()
            timed = [seconds(call, device, in_a_row) for _ in range(count)]
            samples.setdefault((version, part), []).extend(timed)
    torch.backends.cudnn.allow_tf32 = False
    for version, parts in versions.items():
        medians = {part: statistics.median(samples[version, part]) for part in parts}
        row[version]["seconds"] = sum(times * medians[part] for part, (_, times) in parts.items())
        row[version]["rate"] = pair.items / row[version]["seconds"]
        row[version]["parts"] = {}
        for part, (_, times) in parts.items():
            took = samples[version, part]
            spread = {"seconds": medians[part], "least": min(took), "most": max(took)}
            row[version]["parts"][part] = spread | {"times": times, "samples": len(took)}
    if baseline:
        row["speedup"] = row["plain"]["seconds"] / row["ours"]["seconds"]
    return row


def matmul_rate(precision, device, size):
    """Return FLOP per second of a large square matrix product, the best of several."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    best = min(seconds(lambda: a @ a, device) for _ in range(8))
    return 2 * size**3 / best


# --- the report -----------------------------------------------------------------------------------


def bench(args, device, bf16):
    """Measure, print the table, and return what the JSON file holds."""
    size = 256 if args.tiny else 8192 if device.type == "cuda" else 2048
    precisions = ["fp32", "bf16"] if bf16 else ["fp32"]
    rates = {precision: matmul_rate(precision, device, size) for precision in precisions}
    rows, names = {}, args.only or [name for name in PAIRS if name not in COMPILED or device.type == "cuda"]
    for name in names:
        print(f"{name} ...", file=sys.stderr)
        if len(names) > 1:
            row = measure_apart(name)
        else:
            build, *settings = PAIRS[name]
            row = measure(build(*settings, args.tiny, device, bf16), device, args.baseline, args.repeat)
        rows[name] = row
    found = {"matmul_flop_per_second": rates, "measurements": rows}
    report = {**about(args, device), "precision": precisions[-1], **found}
    print(speed_table(report))
    return report


def measure_apart(name):
    """Measure one row of the report by this command in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", name, "--out", folder]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        report = next(Path(folder).glob("*.json"), None)
        if report is None:
            sys.stderr.write(done.stderr)
            sys.exit(done.returncode)
        return json.loads(report.read_text())["measurements"][name]


def about(args, device):
    """Say where and how it was measured."""
    described = runtime.describe_run({}, device, None, {})
    return {
        "command": described["command"],
        "git_commit": described["git_commit"],
        "device": described["device"].partition(",")[0],
        "threads": torch.get_num_threads(),
        "versions": described["versions"] | {"torchvision": torchvision.__version__},
        "tiny": args.tiny,
    }


def parse_args(argv=None):
    count, precisions = machine.number(int, 1), ["auto", "fp32", "bf16"]
    these = f"measure these alone: {', '.join(PAIRS)} (default: all; compiled ones only on a GPU)"
    repeat = f"timings of each part (default: {SECONDS} seconds' worth)"
    p = machine.Parser(description=__doc__.split("\n")[0])
    # fmt: off
    add = p.add_argument
    add("--only", nargs="+", choices=PAIRS, metavar="NAME", help=these)
    add("--baseline", action="store_true", help="measure the plain version as well and print the ratios")
    add("--repeat", type=count, help=repeat)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--precision", choices=precisions, default="auto", help="of our training; auto: bf16 where fast")
    add("--out", type=machine.user_path, help="JSON file's folder (results/bench; none for --only, --tiny)")
    add("--tiny", action="store_true", help="show that everything runs and agrees; its times mean nothing")
    # fmt: on
    args = p.parse_args(argv)
    if args.out is None and not args.only and not args.tiny:  # part of a table must not replace a whole one
        args.out = ROOT / "results/bench"
    return args


def main():
    args = parse_args()
    with machine.program():  # the programs' settings of torch, which also help the plain version
        device = machine.choose_device(args.device)
        bf16 = machine.use_bf16(args.precision, device)
        if args.out:
            try:
                args.out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                found = f"{args.out} is no folder to write to ({error.strerror})"
                raise machine.UserError(f"--out: {found}") from None
        report = bench(args, device, bf16)
        if args.out:
            threads = "" if device.type == "cuda" else f" {report['threads']} threads"
            name = f"{report['device']}{threads} {report['precision']}"
            path = args.out / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.json"
            runtime.write_json(path, report)
            print(path)
        for row in report["measurements"].values():
            if "difference" in row and not row["difference"] <= row["tolerance"]:
                found = f"results {row['difference']:.2g} from the plain version's found"
                raise machine.UserError(f"{row['title']}: {found}, at most {row['tolerance']} expected")


if __name__ == "__main__":
    main()
