"""Make the tables of results/bench from the files of bench.py."""

from ablations import RESULTS, read_json
from pages import grid


def speed_table(path):
    """Make a table of a file of bench.py, with times from before a change if there is such a file.

    "products alone" is the speed-up there would be if our matrix products alone took time.
    """
    bench, before = read_json(path), path.with_name(f"{path.stem}-before.json")
    old = read_json(before)["measurements"] if before.exists() else {}
    threads = f", {bench['threads']} threads" if bench["device"].endswith("CPU") else ""
    where = f"{bench['device']}{threads}, torch {bench['versions']['torch']}"
    header = ["", "here", "plain float32", "speed-up", "products alone", "peak memory", "plain's"]
    header += ["here, before"] if old else []
    lines = []
    for name, row in bench["measurements"].items():
        speedup = alone = ""
        if "plain" in row:
            products = row["ours"]["flop"] / bench["matmul_flop_per_second"][row["precision"]]
            speedup, alone = f"{row['speedup']:.1f} ×", f"{row['plain']['seconds'] / products:.1f} ×"
        line = [row["title"], pace(row, "ours"), pace(row, "plain"), speedup, alone]
        line += [memory(row, "ours"), memory(row, "plain")]
        lines.append(line + ([pace(old.get(name, {}), "ours")] if old else []))
    return f"{where}, networks in {bench['precision']}: `{bench['command']}`\n\n{grid(header, lines)}"


def pace(row, version):
    """Say how long a step takes, or how many items a second are done."""
    if version not in row:
        return ""
    seconds, rate = row[version]["seconds"], row[version]["rate"]
    if row["items"] == 1:
        return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"
    return f"{rate:,.{0 if rate >= 10 else 1}f} {row['unit']}/s"


def memory(row, version):
    found = row.get(version, {}).get("memory_bytes")
    if not found:
        return ""
    return f"{found / 2**30:.1f} GiB" if found >= 2**30 else f"{found / 2**20:.0f} MiB"


def speed_tables():
    """Make a table of every machine and precision."""
    paths = sorted(RESULTS.glob("bench/*.json"))
    return "\n\n".join(speed_table(path) for path in paths if not path.stem.endswith("-before"))
