"""Our programs and the plain version side by side: the same weights, inputs and draws at the published
settings.

bench.py times these pairs; test_bench.py runs them in small and compares what they return.
"""

import shlex
from functools import partial
from typing import NamedTuple

import torch
from PIL import Image
from torchvision import transforms

import plain
from folders import ROOT, load

EPISODES = 1000  # of an evaluation
# On a CPU torch sums batch norm's statistics in float32, one value after the other, where channels come last:
# five million values a channel, as at S=32, leave an error of 0.5 % in the variance. The small sizes of the
# tests agree to 1e-5.
FP32 = 1e-3


class Pair(NamedTuple):
    """One measurement. Each version is {part: (call, how often a whole needs it)}.

    A call returns a tensor; those of the last parts are the same but for `tolerance`. Evaluation and export
    are float32 in any run, as the programs have them.
    """

    title: str
    unit: str
    items: int  # of that unit in a whole
    precision: str
    ours: dict
    plain: dict
    tolerance: float  # of `difference`
    warm_up: int = 0  # calls of ours before it is as fast as it will be


def difference(ours, other):
    """Mean distance of the two versions' results, relative where they are large; ours may hold more than the
    plain version computed."""
    return ((ours[: len(other)].float() - other).abs() / (1 + other.abs())).mean().item()


def random_bytes(*shape):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def random_features(*shape):
    """Non-negative, as an encoder that ends in a ReLU makes them."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).relu()


def networks(folder, args, bf16, device, **sizes):
    """Our network and the plain one with the same weights."""
    torch.manual_seed(0)
    sizes |= {"hidden_size": args.hidden_size, "latent_size": args.latent_size}
    ours = load(folder, "model").GMVAE(**sizes, bf16=bf16)
    oracle = (plain.ImageGMVAE if folder == "omniglot" else plain.FeatureGMVAE)(**sizes)
    oracle.load_state_dict(ours.state_dict())
    return ours.to(device), oracle.to(device)


def gmvae_step(folder, title, flags, images, device, bf16, **sizes):
    """A training step of omniglot/ or mimgnet/, drawing the sets included; images (N, ...) to draw them
    from."""
    main, draw_sets = load(folder, "main"), load(folder, "dataloader").draw_sets
    args, images = main.parse_args(flags), images.to(device)
    ours, oracle = networks(folder, args, bf16, device, **sizes)
    adam = {"lr": args.lr, "weight_decay": args.weight_decay}
    our_adam, plain_adam = (
        torch.optim.Adam(ours.parameters(), fused=True, **adam),
        torch.optim.Adam(oracle.parameters(), **adam),
    )
    if args.compile:
        ours.compile(mode="reduce-overhead")
    our_draws, plain_draws = (torch.Generator(device).manual_seed(0) for _ in range(2))

    def our_step():
        x = draw_sets(images, args.batch_size, args.sample_size, our_draws)
        return torch.stack(main.train_step(ours, our_adam, x, 1, args, our_draws)).detach()

    def plain_step():
        x, S = draw_sets(images, args.batch_size, args.sample_size, plain_draws), args.train_mc_sample_size
        noise = torch.randn(*x.shape[:2], S, args.latent_size, device=device, generator=plain_draws)
        first = plain.starting_samples(
            torch.rand(*x.shape[:2], S, device=device, generator=plain_draws), args.way
        )
        decoded = args.decode_samples
        if decoded:
            decoded = torch.rand(noise.shape[:3], device=device, generator=plain_draws).topk(decoded).indices
        losses = plain.loss_terms(oracle, x, noise, first, args.unsupervised_em_iters, decoded=decoded)
        plain_adam.zero_grad()
        sum(losses).backward()
        plain_adam.step()
        return torch.stack(losses).detach()

    title += f" step, {args.batch_size} x {args.sample_size}, S={args.train_mc_sample_size}, K={args.way}"
    title += f", {args.decode_samples} decoded" * bool(args.decode_samples) + ", compiled" * args.compile
    precision, tolerance = ("bf16", 2e-2) if bf16 else ("fp32", FP32)
    warm_up = 4 if args.compile else 0  # it compiles, tries, records CUDA graphs and replays them
    return Pair(
        title, "step", 1, precision, {"step": (our_step, 1)}, {"step": (plain_step, 1)}, tolerance, warm_up
    )


def omniglot_step(flags, tiny, device, bf16):
    flags = flags + (" --hidden-size 8 --latent-size 6 --batch-size 2 --sample-size 12" if tiny else "")
    return gmvae_step(
        "omniglot", "Omniglot", flags.split(), random_bytes(200 if tiny else 96000, 28, 28, 1), device, bf16
    )


def mimgnet_step(flags, tiny, device, bf16):
    flags, width = (
        (flags + " --hidden-size 16 --batch-size 3 --train-mc-sample-size 8", 32) if tiny else (flags, 256)
    )
    features = random_features(200 if tiny else 38400, width)
    return gmvae_step("mimgnet", "Mini-ImageNet", flags.split(), features, device, bf16, feature_size=width)


def prediction(folder, title, way, shot, flags, images, count, device, **sizes):
    """A test of EPISODES episodes, timed on `count`; images (classes, members, ...). Omniglot's encodes every
    image first, once.

    The plain version takes a few whole episodes at once, encoder included; the noise is drawn before, for
    both.
    """
    at_once = 32 if device.type == "cuda" else 4  # enough to fill a GPU
    main, dataloader, evaluation = (load(folder, name) for name in ("main", "dataloader", "evaluate"))
    args, images = main.parse_args(flags), images.to(device)
    ours, oracle = (network.eval() for network in networks(folder, args, False, device, **sizes))
    S, iters = args.test_mc_sample_size, args.semisupervised_em_iters
    episodes = dataloader.draw_episodes(images, way, shot, args.query, count, seed=0)
    members = shot + args.query
    pool = evaluation.NOISE_POOL, count, way, shot, members, S, args.latent_size
    noise = plain.episode_noise(*pool, at_once).to(device)
    flat, labels = images.flatten(0, 1), torch.arange(way, device=device).repeat_interleave(args.query)
    as_float = getattr(dataloader, "as_float", lambda x: x)
    features = flat if folder == "mimgnet" else evaluation.encode_all(ours, images)

    def our_episodes():
        return evaluation.evaluate(ours, features, episodes, shot, S, iters)

    @torch.no_grad()
    def plain_episodes():
        x = as_float(flat[episodes[:at_once].to(device)])
        found = plain.predict_episodes(oracle, x, shot, noise, iters).argmax(-1)
        return (
            100 * (found == labels).float().mean(-1).cpu()
        )  # of each episode, in percent, as `evaluate` returns it

    encode = {} if folder == "mimgnet" else {"encode": (lambda: evaluation.encode_all(ours, images), 1)}
    fast = encode | {"episodes": (our_episodes, EPISODES / count)}
    title = f"{title} prediction, {way}-way {shot}-shot, S={S}"
    return Pair(
        title, "episodes", EPISODES, "fp32", fast, {"episodes": (plain_episodes, EPISODES / len(noise))}, 5e-2
    )


def timed(count, device):
    """Of how many episodes: a GPU takes all in less than a second."""
    return EPISODES if device.type == "cuda" else count


def omniglot_eval(way, count, tiny, device, bf16):
    flags, classes = ("--hidden-size 8 --latent-size 6 --test-mc-sample-size 4", 25) if tiny else ("", 1292)
    return prediction(
        "omniglot", "Omniglot", way, 1, flags.split(), random_bytes(classes, 20, 28, 28, 1),
        12 if tiny else timed(count, device), device,
    )  # fmt: skip


def mimgnet_eval(shot, count, tiny, device, bf16):
    flags, width = ("--hidden-size 16 --test-mc-sample-size 4", 32) if tiny else ("", 256)
    features = random_features(20, 80 if tiny else 600, width)
    return prediction(
        "mimgnet", "Mini-ImageNet", 5, shot, flags.split(), features, 12 if tiny else timed(count, device),
        device, feature_size=width,
    )  # fmt: skip


def encoders(args, bf16, device):
    torch.manual_seed(0)
    model = load("simclr", "model")
    ours, oracle = model.Encoder(args.hidden_size, bf16), plain.Encoder(args.hidden_size)
    oracle.load_state_dict(ours.state_dict())
    heads = [model.projection_head(args.hidden_size) for _ in range(2)]
    heads[1].load_state_dict(heads[0].state_dict())
    return ours.to(device), heads[0].to(device), torch.nn.Sequential(oracle, heads[1]).to(device)


def simclr_step(flags, tiny, device, bf16):
    """A step with its views. The plain version makes them one by one through Pillow, in this process, without
    a loader's workers; decoding the files is left out, which favours it. Its step is compared, and timed, on
    views of ours."""
    main, data = load("simclr", "main"), load("simclr", "dataloader")
    args = main.parse_args(shlex.split(f"{flags} {'--hidden-size 8 --batch-size 16' * tiny}"))
    strength, size = (args.crop_scale, args.jitter, args.hue), args.view_size
    images = random_bytes(args.batch_size, data.SIZE, data.SIZE, 3)
    encoder, projection, oracle = encoders(args, bf16, device)
    criterion, plain_loss = main.nt_xent, plain.nt_xent
    if args.loss == "prototypical":  # of the features themselves
        projection, oracle = torch.nn.Identity(), oracle[0]
        criterion, plain_loss = (
            partial(loss, views=args.views) for loss in (main.prototypical, plain.prototypical)
        )
    parameters = [*encoder.parameters(), *projection.parameters()]
    our_adam, plain_adam = (
        torch.optim.Adam(parameters, lr=args.lr, fused=True),
        torch.optim.Adam(oracle.parameters(), lr=args.lr),
    )
    network = torch.nn.Sequential(encoder, projection)
    on_device, draws = images.to(device), torch.Generator().manual_seed(0)
    x = data.training_views(
        on_device, torch.Generator().manual_seed(0), size, args.views, strength
    ).contiguous()
    view = transforms.Compose([
        transforms.RandomResizedCrop(size, scale=(args.crop_scale, data.SCALE[1])),
        transforms.RandomHorizontalFlip(data.P_FLIP),
        transforms.RandomApply([transforms.ColorJitter(*[args.jitter] * 3, args.hue)], data.P_JITTER),
        transforms.RandomGrayscale(data.P_GREY), transforms.ToTensor(), transforms.Normalize(data.MEAN,
        data.STD),
    ])  # fmt: skip

    def our_step():
        views = data.training_views(on_device, draws, size, args.views, strength)
        return (
            main.train_step(network, our_adam, views, args.lr, args.temperature, criterion, args.views)
            .detach()
            .view(1)
        )

    def plain_views():
        return torch.stack(
            [view(Image.fromarray(image)) for _ in range(args.views) for image in images.numpy()]
        ).to(device)

    def plain_step():
        loss = plain_loss(oracle(x), temperature=args.temperature)
        plain_adam.zero_grad()
        loss.backward()
        plain_adam.step()
        return loss.detach().view(1)

    precision, tolerance = ("bf16", 2e-2) if bf16 else ("fp32", FP32)
    several = "" if args.views == 2 else f" x {args.views} of {size} pixels"
    title = f"SimCLR step, batch {args.batch_size}{several}, with augmentation"
    return Pair(
        title,
        "step",
        1,
        precision,
        {"step": (our_step, 1)},
        {"views": (plain_views, 1), "step": (plain_step, 1)},
        tolerance,
    )


def simclr_export(tiny, device, bf16):
    main, data, features = (load("simclr", name) for name in ("main", "dataloader", "export"))
    args = main.parse_args("--hidden-size 8".split() if tiny else [])
    images = random_bytes(4, 4 if tiny else 250, data.SIZE, data.SIZE, 3)
    encoder, _, oracle = encoders(args, False, device)
    oracle, on_device = oracle[0].eval(), images.to(device)
    read = transforms.Compose([transforms.ToTensor(), transforms.Normalize(data.MEAN, data.STD)])

    @torch.no_grad()
    def plain_export():
        batches = images.flatten(0, 1).split(100)
        return torch.cat(
            [
                oracle(torch.stack([read(Image.fromarray(i.numpy())) for i in batch]).to(device))
                for batch in batches
            ]
        )

    def our_export():
        return features.encode_all(encoder, on_device, 84).flatten(0, 1)

    return Pair(
        "SimCLR feature export",
        "images",
        images.shape[:2].numel(),
        "fp32",
        {"export": (our_export, 1)},
        {"export": (plain_export, 1)},
        1e-5,
    )


PAIRS = {
    "omniglot-5way": (omniglot_step, "--way 5 --sample-size 200"),
    "omniglot-20way": (omniglot_step, "--way 20 --sample-size 300"),
    "omniglot-decode-1": (omniglot_step, "--way 5 --sample-size 200 --decode-samples 1"),
    "omniglot-S1": (omniglot_step, "--way 5 --sample-size 200 --train-mc-sample-size 1"),
    "omniglot-eval-5way": (omniglot_eval, 5, 1000),
    "omniglot-eval-20way": (omniglot_eval, 20, 250),
    "mimgnet-step": (mimgnet_step, ""),
    "mimgnet-eval-1shot": (mimgnet_eval, 1, 500),
    "mimgnet-eval-50shot": (mimgnet_eval, 50, 200),
    "simclr-step": (simclr_step, ""),
    "simclr-prototypical": (simclr_step, shlex.quote(f"@{ROOT}/simclr/recipes/prototypical.txt")),
    "simclr-export": (simclr_export,),
    "omniglot-5way-compiled": (omniglot_step, "--way 5 --sample-size 200 --compile"),
    "mimgnet-step-compiled": (mimgnet_step, "--compile"),
}
COMPILED = [name for name in PAIRS if name.endswith("-compiled")]
