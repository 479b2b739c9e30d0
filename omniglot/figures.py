"""Draw three figures of a trained model: drawings of each component, the latent space, the training curves.

    python figures.py --checkpoint runs/5way/5shot_best.pt --data-dir ../data/omniglot

Writes components.png, latents.png and, where a metrics.jsonl lies beside the checkpoint, curves.png.
"""

import io
import json

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from dataloader import as_float, check_episodes, draw_episodes, load_split
from mixture import adapt, sample_posterior
from machine import HERE, Parser, UserError, number, program, user_path, write
from model import load_model
from pose import canonical, pose, put_back
from runtime import describe_run, read_config, say_other_data

COLOURS = plt.get_cmap("tab10").colors


def parse_args(argv=None):
    """Parse the command line."""
    count, natural = number(int, 1, below=2**31), number(int, 0, below=2**31)
    data = HERE.parent / "data/omniglot"
    p = Parser(description=__doc__.split("\n")[0])
    add = p.add_argument
    add("--checkpoint", type=user_path, required=True, help="a model, e.g. runs/5way/5shot_best.pt")
    add("--data-dir", type=user_path, default=data, help="folder with test.npy")
    add("--out", type=user_path, help="folder for the figures; not given: the checkpoint's")
    add("--way", type=number(int, 2, below=11), default=5, help="classes of the episode")
    add("--shot", type=count, default=1, help="support images per class")
    add("--query", type=count, default=15, help="query images per class")
    add("--samples", type=count, default=32, help="Monte-Carlo samples per image")
    add("--episode", type=natural, default=0, help="seed of the episode of test classes")
    args = p.parse_args(argv)
    args.out = args.out or args.checkpoint.parent
    return args


@torch.no_grad()
def fit_episode(model, images, args, reading="unit"):
    """Adapt to an episode by EM with a reading of `adapt`.

    Returns its drawings (way, members, 28, 28), their latent means, the class means before and after EM, and
    the variances.
    """
    index = draw_episodes(images, args.way, args.shot, args.query, 1, args.episode)[0]
    x = as_float(images.flatten(0, 1)[index])  # (way, members, 28, 28, 1)
    generator = torch.Generator().manual_seed(args.episode)
    mean, log_var = model.posterior(model.encode(x.flatten(0, 1)).unsqueeze(0))
    noise = torch.randn(*mean.shape[:2], args.samples, mean.shape[-1], generator=generator)
    z = sample_posterior(mean, log_var, noise).unflatten(1, x.shape[:2])  # (1, way, members, S, D)
    support, query = z[:, :, : args.shot], z[:, :, args.shot :]
    before = support.flatten(2, 3).mean(2)[0]
    mu, var = adapt(support.flatten(2, 3), query.flatten(1, 3), 10, reading, args.samples)
    if var.ndim == 4:  # a covariance of all classes
        var = var.diagonal(dim1=-2, dim2=-1).expand_as(mu)
    return x.squeeze(-1), mean[0].unflatten(0, x.shape[:2]), before, mu[0], var[0]


def save(figure, path):
    """Write a figure as a small PNG, for a README, and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, bbox_inches="tight")
    write(path, buffer.getbuffer())
    plt.close(figure)
    print(path)


@torch.no_grad()
def components(model, x, mu, var, path, shape=None):
    """Draw each class's real images beside images decoded from z ~ N(mu_k, var_k) of its fitted component.

    x (way, members, 28, 28). `shape` is the --target-shape of a model that decodes canonical drawings;
    it adds the real ones without their pose, and the decoded ones in the pose of the real ones.
    """
    columns = min(8, x.shape[1])
    noise = torch.randn(len(mu), columns, mu.shape[1], generator=torch.Generator().manual_seed(0))
    z = mu.unsqueeze(1) + var.sqrt().unsqueeze(1) * noise
    real, drawn = x[:, :columns].reshape(-1, 28, 28, 1), model.decode(z.flatten(0, 1)).sigmoid()
    panels = {"real drawings of the episode": real, "generated from each component": drawn}
    if shape is not None:
        poses = pose(real, shape)
        panels = {
            "real drawings of the episode": real, "without their pose": canonical(real, poses),
            "generated from each component": drawn, "in the pose of the real ones": put_back(drawn, poses),
        }  # fmt: skip
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 0.62 * len(mu) + 0.6))
    ticks = {
        "yticks": [14 + 28 * k for k in range(len(mu))],
        "yticklabels": [f"class {k + 1}" for k in range(len(mu))],
    }
    for axis, (title, images) in zip(axes, panels.items()):
        rows = images.view(len(mu), columns, 28, 28)
        axis.imshow(1 - rows.permute(0, 2, 1, 3).flatten(2).flatten(0, 1), cmap="gray", vmin=0, vmax=1)
        axis.set(title=title, xticks=[], **ticks)
    save(figure, path)


def latents(mean, before, mu, path):
    """Draw posterior means, and class means before and after EM, on the plane that best separates classes."""
    centre = mean.flatten(0, 1).mean(0)
    plane = torch.linalg.svd(mean.mean(1) - centre, full_matrices=False).Vh[:2].T  # (D, 2)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), sharex=True, sharey=True)
    for axis, means, title in zip(axes, (before, mu), ("before EM: support means", "after EM")):
        for k in range(len(mean)):
            images, star = ((points[k] - centre) @ plane for points in (mean, means))
            axis.scatter(*images.mT, s=18, color=COLOURS[k], alpha=0.7, label=f"class {k + 1}")
            axis.scatter(*star, s=220, marker="*", color=COLOURS[k], edgecolor="black")
        axis.set(title=title, xlabel="first axis")
    axes[0].set_ylabel("second axis")
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), title="dot: image\nstar: component")
    save(figure, path)


def curves(metrics, path):
    """Draw validation accuracy and both loss terms over the training steps."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [line["step"] for line in lines]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2))
    for name in (name for name in lines[-1] if "shot" in name):
        accuracy, ci95 = ([line[name][key] for line in lines] for key in ("accuracy", "ci95"))
        axes[0].errorbar(steps, accuracy, ci95, marker=".", label=name)
    axes[0].legend()
    axes[1].plot(steps, [line["reconstruction"] for line in lines], marker=".")
    axes[2].plot(steps, [line["kl"] for line in lines], marker=".")
    titles, units = ("validation accuracy", "reconstruction term", "KL term"), ("%", *["nats an image"] * 2)
    for axis, title, unit in zip(axes, titles, units):
        axis.set(title=title, xlabel="step", ylabel=unit)
    figure.tight_layout()
    save(figure, path)


def main():
    args = parse_args()
    with program():
        model, images = load_model(args.checkpoint), load_split(args.data_dir, "test")
        if model.sizes["latent_size"] < 2:
            found = f"a latent space of {model.sizes['latent_size']} dimension found"
            raise UserError(f"{args.checkpoint}: {found}, at least 2 expected to draw a plane of")
        check_episodes(args.data_dir, "test", images, [args.way], [args.shot], args.query)
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            found = f"{args.out} found, a folder to write to expected ({error.strerror})"
            raise UserError(f"--out: {found}") from None
        say_other_data(args.checkpoint, describe_run({}, images.device, "fp32", {"test": images})["data"])
        trained = read_config(args.checkpoint.parent, strict=False).get("args", {})
        x, mean, before, mu, var = fit_episode(model, images, args, trained.get("e_step", "unit"))
        shape = trained.get("target_shape") if trained.get("target") == "canonical" else None
        components(model, x, mu, var, args.out / "components.png", shape)
        latents(mean, before, mu, args.out / "latents.png")
        metrics = args.checkpoint.parent / "metrics.jsonl"
        if metrics.exists() and metrics.stat().st_size:  # empty before the first validation
            try:
                curves(metrics, args.out / "curves.png")
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{metrics}: not readable, the validations of main.py expected") from None


if __name__ == "__main__":
    main()
