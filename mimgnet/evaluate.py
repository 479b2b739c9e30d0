"""Evaluate few-shot episodes: accuracies, mean, interval. The same file in omniglot/ and mimgnet/."""

import functools
import json

import torch

from dataloader import draw_episodes
from machine import UserError, write
from model import load_model

TEST_SEED = 2  # of the episodes: the same for every run
NOISE_POOL = 4096  # images for which the pool has Monte-Carlo noise


@torch.no_grad()
def encode_all(model, images):
    """Encode every image once: in evaluation mode its features do not depend on other images.

    images (classes, members, ...) -> (classes * members, width). cuDNN's search for the fastest kernels is
    off meanwhile: other kernels next time would change the last bits.
    """
    at_once = 1000 if images.is_cuda else 200
    searching, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    features = torch.cat([model.encode(batch) for batch in images.flatten(0, 1).split(at_once)])
    torch.backends.cudnn.benchmark = searching
    return features


@functools.lru_cache(maxsize=1)
def noise_pool(samples, latent_size, device):
    """Draw Monte-Carlo noise for NOISE_POOL images, (NOISE_POOL, S, D); kept for the next evaluation."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(NOISE_POOL, samples, latent_size, generator=generator).to(device)


@torch.no_grad()
def evaluate(model, features, episodes, shot, samples, em_iters, reading="unit"):
    """Return the accuracy of each episode, in percent: (episodes,).

    features (images, width) from `encode_all`; episodes (count, way, shot + query) from `draw_episodes`.
    Support and query pass the set network together (transductive). Each episode takes its noise from a random
    place in one pool made on the CPU, the same on every device. Raises UserError for NaN.
    """
    count, way, members = episodes.shape
    pool = noise_pool(samples, model.sizes["latent_size"], features.device)
    somewhere = torch.randint(NOISE_POOL, (count, 1), generator=torch.Generator().manual_seed(1))
    picks = ((somewhere + torch.arange(way * members)) % NOISE_POOL).to(features.device)
    episodes = torch.cat([part.flatten(1) for part in episodes.split([shot, members - shot], -1)], 1)
    labels = torch.arange(way, device=features.device).repeat_interleave(members - shot)
    at_once = 2**20 if features.is_cuda else 2**14  # samples; on a CPU as many as fit its caches
    at_once = max(1, at_once // (way * members * samples))
    accuracies = []
    for index, pick in zip(episodes.to(features.device).split(at_once), picks.split(at_once)):
        probabilities = model.predict_encoded(features[index], way, shot, pool[pick], em_iters, reading)
        accuracy = 100 * (probabilities.argmax(-1) == labels).float().mean(-1)
        accuracies.append(accuracy.where(probabilities.isfinite().all(-1).all(-1), torch.nan))
    accuracies = torch.cat(accuracies).cpu()
    if accuracies.isnan().any():  # else NaN would count as the first class
        found = "class probabilities that are NaN found, finite ones expected"
        raise UserError(f"evaluation: {found}; are the weights or the data too large?")
    return accuracies


def summary(accuracies):
    """Return mean and 95 % interval, 1.96 std / sqrt(episodes), in percent."""
    ci95 = 1.96 * accuracies.std(correction=0).item() / len(accuracies) ** 0.5
    return {"accuracy": accuracies.mean().item(), "ci95": ci95, "episodes": len(accuracies)}


def evaluate_split(model, images, ways, shots, seed, args):
    """Return {'5way1shot': accuracies of the episodes, ...}.

    It runs in float32 whatever the training's precision: hardware with bfloat16 changes no score.
    """
    model.eval()
    trained_in, model.bf16 = model.bf16, False
    features, results = encode_all(model, images), {}
    for way in ways:
        for shot in shots:
            episodes = draw_episodes(images, way, shot, args.query, args.eval_episodes, seed)
            sizes = args.test_mc_sample_size, args.semisupervised_em_iters
            results[f"{way}way{shot}shot"] = evaluate(model, features, episodes, shot, *sizes, args.e_step)
    model.bf16 = trained_in
    return results


def test(weights, images, args):
    """Test checkpoints, {path: shots}; print the table, write it with every accuracy to test.json."""
    cells = {}
    for path, shots in weights.items():
        model = load_model(path).to(images.device)
        model.sizes["set_attention"] &= not args.no_set_attention
        for name, accuracies in evaluate_split(model, images, args.test_way, shots, TEST_SEED, args).items():
            cells[name] = summary(accuracies) | {"accuracies": [round(a, 2) for a in accuracies.tolist()]}
    for name, r in cells.items():
        print(f"test  {name:>12}  {r['accuracy']:6.2f} ± {r['ci95']:.2f} %  ({r['episodes']} episodes)")
    lines = ",\n".join(f'"{name}": {json.dumps(cell)}' for name, cell in cells.items())
    write(args.save_dir / "test.json", f"{{\n{lines}\n}}\n")
