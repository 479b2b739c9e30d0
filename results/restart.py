"""Make a folder that `omniglot/main.py --resume` continues from a run's shipped weights.

    python results/restart.py results/omniglot/published-5way/seed0 --out runs/published-5way

A shipped run has no last.pt. The new one starts with the weights of the last step, which are stored in half
precision. Adam's moments start at zero and the random draws anew; config.json lists the step under
`restarted`. It works on a CPU, for runs without --ema-decay that keep the weights of their last step.
--precision is for a machine without fast bfloat16; config.json then says under `precision_until` what the run
had before.
"""

import shutil
import sys

import torch

from ablations import RESULTS, read_lines

sys.path.insert(0, str(RESULTS.parent / "omniglot"))
from machine import Parser, UserError, program, user_path  # noqa: E402
from model import load_model  # noqa: E402
from runtime import load_checkpoint, read_config, save_checkpoint, snapshot  # noqa: E402
from runtime import write_json, write_metrics  # noqa: E402


def restart(run, out, precision=None):
    """Write config.json, metrics.jsonl and last.pt into `out`. Raises UserError."""
    if (out / "last.pt").exists() or (out / "metrics.jsonl").exists():
        raise UserError(f"--out: {out} holds a run, another folder expected")
    config = read_config(run)
    if not config or not (run / "metrics.jsonl").exists():
        raise UserError(f"{run}: no run found, a folder with config.json and metrics.jsonl expected")
    history, args = read_lines(run / "metrics.jsonl"), config["args"]
    if args.get("ema_decay"):
        raise UserError(f"{run}: a run with --ema-decay found, one without expected")
    if not history:
        raise UserError(f"{run / 'metrics.jsonl'}: no validation found, at least one expected")
    step, seconds = history[-1]["step"], history[-1]["seconds"]
    steps = {path: load_checkpoint(path).get("step") for path in sorted(run.glob("*.pt"))}
    weights = next((path for path in steps if steps[path] == step), None)
    if weights is None:
        raise UserError(f"{run}: weights of steps {[*steps.values()]} found, of step {step} expected")
    model = load_model(weights)
    adam = {"lr": args["lr"], "weight_decay": args["weight_decay"]}
    optimizer = torch.optim.Adam(model.parameters(), **adam, fused=True)
    generator = torch.Generator().manual_seed(args["seed"] + 2**31 + step)
    parts = snapshot({"model": model, "optimizer": optimizer, "generator": generator})
    progress = {"step": step, "seconds": seconds, "history": history}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {out} is no folder to write to ({error.strerror})") from None
    config = config | {"restarted": [*config.get("restarted", []), step]}
    if precision not in (None, config["precision"]):
        until = config.get("precision_until", {}) | {str(step): config["precision"]}
        args["precision"] = precision
        config = config | {"precision": precision, "precision_until": until}
    write_json(out / "config.json", config)
    write_metrics(out, history)
    for path in run.glob("*best.pt"):
        shutil.copy(path, out)
    save_checkpoint(out / "last.pt", parts | progress | {"sizes": model.sizes, "way": args["way"]})


def main():
    p = Parser(description=__doc__.split("\n")[0])
    p.add_argument("run", type=user_path, help="folder of a run, with weights of its last step")
    p.add_argument("--out", type=user_path, required=True, help="output folder, for this run alone")
    p.add_argument("--precision", choices=["fp32", "bf16"], help="from here on; not given: as before")
    args = p.parse_args()
    with program():
        restart(args.run, args.out, args.precision)


if __name__ == "__main__":
    main()
