"""Make the tables of results/bench from the files of bench.py."""

from ablations import RESULTS, read_json
from pages import grid


def speed_table(bench):
    """Make a table of a report of bench.py.

    "products alone" is the speed-up there would be if our matrix products alone took time.
    """
    threads = f", {bench['threads']} threads" if bench["device"].endswith("CPU") else ""
    where = f"{bench['device']}{threads}, torch {bench['versions']['torch']}"
    header = ["", "here", "plain float32", "speed-up", "products alone", "peak memory", "plain's"]
    lines = []
    for row in bench["measurements"].values():
        speedup = alone = ""
        if "plain" in row:
            products = row["ours"]["flop"] / bench["matmul_flop_per_second"][row["precision"]]
            speedup, alone = f"{row['speedup']:.1f} ×", f"{row['plain']['seconds'] / products:.1f} ×"
        line = [row["title"], pace(row, "ours"), pace(row, "plain"), speedup, alone]
        lines.append(line + [memory(row, "ours"), memory(row, "plain")])
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
    return "\n\n".join(speed_table(read_json(path)) for path in sorted(RESULTS.glob("bench/*.json")))
