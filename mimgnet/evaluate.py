"""Few-shot evaluation: episodes of a split, the accuracy of each, their mean and interval."""

import functools

import torch

from dataloader import draw_episodes
from runtime import UserError

NOISE_POOL = 4096  # images' worth of Monte-Carlo noise that episodes draw from


@functools.lru_cache(maxsize=1)
def noise_pool(samples, latent_size, device):
    """Draw NOISE_POOL images' worth of Monte-Carlo noise (NOISE_POOL, S, D); return the generator's state after it too.

    Kept from one evaluation to the next.
    """
    generator = torch.Generator().manual_seed(0)
    return torch.randn(NOISE_POOL, samples, latent_size, generator=generator).to(device), generator.get_state()


def split(members, shot):
    """Split episodes (B, way, shot + query, ...) into support (B, way, shot, ...) and query (B, way query, ...)."""
    return members[:, :, :shot], members[:, :, shot:].flatten(1, 2)


@torch.no_grad()
def evaluate(model, features, episodes, shot, samples, em_iters, reading="unit"):
    """Return the accuracy of each episode, in percent: (episodes,).

    features (images, width); episodes (count, way, shot + query) from `draw_episodes`.
    Support and query pass the set network together (transductive). Every episode picks its images' noise from
    one pool made on the CPU, so that every device and every validation sees the same. Raises UserError for NaN.
    """
    count, way, members = episodes.shape
    generator = torch.Generator()
    pool, state = noise_pool(samples, model.sizes["latent_size"], features.device)
    generator.set_state(state)
    picks = torch.randint(NOISE_POOL, (count, way * members), generator=generator).to(features.device)
    labels = torch.arange(way, device=features.device).repeat_interleave(members - shot)
    at_once = 2**20 if features.is_cuda else 2**14  # samples; on a CPU: what its caches hold
    at_once = max(1, at_once // (way * members * samples))
    accuracies, finite = [], []
    for index, pick in zip(episodes.flatten(1).to(features.device).split(at_once), picks.split(at_once)):
        support, query = split(features[index].unflatten(1, (way, members)), shot)
        first, second = split(pool[pick].unflatten(1, (way, members)), shot)
        noise = torch.cat([first.flatten(1, 2), second], 1)
        probabilities = model.predict_encoded(support, query, noise, em_iters, reading)
        accuracies.append(100 * (probabilities.argmax(-1) == labels).float().mean(-1))
        finite.append(probabilities.isfinite().all())
    if not torch.stack(finite).all():  # NaN would count as the first class
        found = "class probabilities that are NaN found, finite ones expected"
        raise UserError(f"evaluation: {found}; are the weights or the data too large?")
    return torch.cat(accuracies).cpu()


def evaluate_split(model, images, ways, shots, seed, args):
    """Return {'5way1shot': {accuracy, ci95, episodes}, ...}: mean and 1.96 std / sqrt(episodes), in percent.

    In float32 whatever the training's precision, so that a checkpoint scores the same on every machine.
    """
    model.eval()
    trained_in, model.bf16 = model.bf16, False
    features, results = images.flatten(0, 1), {}
    for way in ways:
        for shot in shots:
            episodes = draw_episodes(images, way, shot, args.query, args.eval_episodes, seed)
            sizes = args.test_mc_sample_size, args.semisupervised_em_iters
            accuracy = evaluate(model, features, episodes, shot, *sizes, args.e_step)
            ci95 = 1.96 * accuracy.std(correction=0).item() / len(accuracy) ** 0.5
            cell = {"accuracy": accuracy.mean().item(), "ci95": ci95, "episodes": len(accuracy)}
            results[f"{way}way{shot}shot"] = cell
    model.bf16 = trained_in
    return results
