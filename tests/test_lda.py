"""Linear discriminant analysis of views: against literal definitions, and in the program."""

import json

import numpy as np
import pytest
import torch

from conftest import fails, load, run
from test_simclr_cli import data_dir, read_features, source_dir, whole_run  # noqa: F401

export, model = load("simclr", "export"), load("simclr", "model")


def covariances(h):
    """The covariance of an image's views, with its ridge, and that of the images' means, by loops."""
    views, images, width = h.shape
    means = h.mean(0)
    within, between = torch.zeros(2, width, width, dtype=h.dtype)
    for j in range(images):
        between += torch.outer(means[j] - means.mean(0), means[j] - means.mean(0)) / (images - 1)
        for i in range(views):
            within += torch.outer(h[i, j] - means[j], h[i, j] - means[j]) / (images * (views - 1))
    return within + 0.5 * torch.eye(width) * within.trace() / width, between


def test_directions_are_the_best_of_the_generalised_eigenvalue_problem():
    torch.manual_seed(0)
    h = torch.randn(3, 1, 6, dtype=torch.float64) + torch.randn(3, 40, 6) * torch.arange(1, 7)
    h = h + torch.randn(40, 6) @ torch.randn(6, 6)
    centre, p = model.lda(h, 4)
    within, between = covariances(h)
    best = np.sort(np.linalg.eigvals(np.linalg.solve(within.numpy(), between.numpy())).real)[::-1]
    assert centre.allclose(h.mean((0, 1)).float())
    assert torch.allclose(p.T.double() @ within @ p.double(), torch.eye(4).double(), atol=1e-5)
    assert np.allclose(p.T.double() @ between @ p.double(), np.diag(best[:4]), rtol=1e-4, atol=1e-4)


def test_what_differs_in_views_of_an_image_is_left_out():
    torch.manual_seed(0)
    h = torch.zeros(4, 200, 3)
    h[..., 0] = torch.randn(200)  # an image's own
    h[..., 1] = 3 * torch.randn(4, 200)  # another in every view, and the largest
    h[..., 2] = 0.1 * torch.randn(4, 200)
    (_, p), x = model.lda(h, 1), h[0]
    assert abs(torch.corrcoef(torch.stack([(x @ p)[:, 0], x[:, 0]]))[0, 1]) > 0.99


def test_features_that_do_not_vary_have_no_directions():
    with pytest.raises(model.UserError, match="--lda: the same features"):
        model.lda(torch.ones(4, 50, 16), 3)


def test_features_on_directions_have_the_same_norm():
    encoder = model.Encoder(4, directions=(16, 3))
    assert encoder.width(84) == 16 and encoder.width(128) == 64
    encoder.centre.normal_(), encoder.directions.normal_()
    x = torch.randn(2, 3, 84, 84)
    h = encoder.eval()(x)
    y = (h - encoder.centre) @ encoder.directions
    assert encoder.features(x).allclose(y * 3**0.5 / y.norm(dim=1, keepdim=True))
    assert model.Encoder(4).eval().features(x).shape == (2, 16)


def test_the_exported_encoder_has_its_directions(whole_run, tmp_path):  # noqa: F811
    folder, features, flags = whole_run
    place = ["--save-dir", tmp_path / "s", "--feature-save-dir", tmp_path / "f"]
    place += ["--export-only", "--checkpoint"]
    result = run("simclr", *flags, *place, folder / "encoder.pt", "--lda", 3)
    assert result.returncode == 0, result.stderr
    found = read_features(tmp_path / "f")
    assert json.loads((tmp_path / "f/features.json").read_text())["lda"] == 3
    assert all(np.allclose((x**2).sum(1), 3, atol=1e-4) and x.shape[1] == 3 for x in found.values())
    # Each image's features come from its own, without another training.
    old, encoder = read_features(features), model.load_model(tmp_path / "s/encoder.pt")
    y = (torch.from_numpy(old["val"]) - encoder.centre) @ encoder.directions
    assert np.allclose(found["val"], y * 3**0.5 / y.norm(dim=1, keepdim=True), atol=1e-4)
    # Again, from the encoder that has them: the same bits. Not for images of another size.
    place[1], place[3] = tmp_path / "again", tmp_path / "g"
    result = run("simclr", *flags, *place, tmp_path / "s/encoder.pt")
    assert result.returncode == 0, result.stderr
    assert all((x == found[split]).all() for split, x in read_features(tmp_path / "g").items())
    for wrong in (["--feature-size", 100], ["--lda", 2]):
        result = run("simclr", *flags, *place, tmp_path / "s/encoder.pt", *wrong)
        fails(result, "encoder.pt", f"{wrong[0]} {wrong[1]}", "its 3 directions in 16 features")
    fails(run("simclr", *flags, *place, folder / "encoder.pt", "--lda", 17), "--lda: 17 found", "16 features")
    torch.save(torch.load(folder / "encoder.pt") | {"training": {}}, tmp_path / "bare.pt")
    result = run("simclr", *flags, *place, tmp_path / "bare.pt", "--lda", 3)
    fails(result, "bare.pt", "no settings of its training")
    fails(run("simclr", *flags, "--lda", 17), "--lda: 17 found, at most the 16 features")


def test_views_have_the_strength_of_the_training(monkeypatch):
    seen = []
    monkeypatch.setattr(export, "LDA_IMAGES", 8)
    views = lambda x, _, *how: seen.append(how) or torch.rand(4 * len(x), 3, 64, 64)  # noqa: E731
    monkeypatch.setattr(export, "training_views", views)
    images = torch.zeros(20, 84, 84, 3, dtype=torch.uint8)
    found = export.with_directions(model.Encoder(4), images, 64, 2, (0.5, 0.1, 0.2))
    assert seen == [(64, 4, (0.5, 0.1, 0.2))] and found.sizes["directions"] == [16, 2]
