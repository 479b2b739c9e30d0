"""Measure how good features are: few-shot classifiers on them, and their accuracy over episodes."""

import numpy as np
import torch
from tqdm import tqdm

from dataloader import draw_episodes
from machine import BAR_SECONDS


def standardise(features, reference):
    """Subtract each feature's mean in `reference` and divide by its standard deviation there."""
    mean, std = reference.flatten(0, -2).mean(0), reference.flatten(0, -2).std(0)
    return (features - mean) / std.clamp_min(1e-6)


def nearest_mean(features, episodes, shot):
    """Return each episode's accuracy in percent if a query goes to the class with the nearest mean: (count,).

    features (images, width), episodes (count, way, shot + query) from `draw_episodes`.
    """
    accuracies = []
    labels = torch.arange(episodes.shape[1], device=features.device).unsqueeze(-1)
    for index in episodes.to(features.device).split(50):
        h = features[index]  # (count, way, shot + query, width)
        mean, query = h[:, :, :shot].mean(2), h[:, :, shot:]
        score = query.flatten(1, 2) @ mean.mT - 0.5 * mean.square().sum(-1).unsqueeze(1)
        accuracies.append(100 * (score.argmax(-1).view(query.shape[:3]) == labels).float().mean((1, 2)))
    return torch.cat(accuracies).cpu()


def logistic_regression(features, episodes, shot):
    """Return each episode's accuracy in percent, by logistic regression on its support images: (count,)."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    way, members = episodes.shape[1:]
    features, y = features.cpu().numpy(), np.arange(way)
    y_support, y_query = y.repeat(shot), y.repeat(members - shot)
    accuracies = []
    with threadpool_limits(1):  # the problems are so small that threads would mostly wait for each other
        for index in tqdm(episodes.numpy(), desc=f"{way}-way {shot}-shot", mininterval=BAR_SECONDS):
            support, query = features[index[:, :shot].ravel()], features[index[:, shot:].ravel()]
            fitted = LogisticRegression(max_iter=1000).fit(support, y_support)
            accuracies.append(100 * fitted.score(query, y_query))
    return torch.tensor(accuracies)


def evaluate(features, classify, shots, seed, args):
    """Return {'5way1shot': {accuracy, ci95, episodes}, ...}: mean and 1.96 std / sqrt(episodes), in percent.

    features (classes, n, width), on scales that `classify` may compare.
    """
    results = {}
    for shot in shots:
        episodes = draw_episodes(features, args.way, shot, args.query, args.eval_episodes, seed)
        accuracy = classify(features.flatten(0, 1), episodes, shot)
        ci95 = 1.96 * accuracy.std(correction=0).item() / len(accuracy) ** 0.5
        results[f"{args.way}way{shot}shot"] = {
            "accuracy": accuracy.mean().item(),
            "ci95": ci95,
            "episodes": len(accuracy),
        }
    return results
