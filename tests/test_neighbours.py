"""Neighbours as positives: found and drawn as they are defined, and what a step then sees."""

import signal

import pytest
import torch

from conftest import load
from test_simclr_cli import TINY
from test_simclr_cli import data_dir, source_dir  # noqa: F401

neighbours, model, export = (load("simclr", name) for name in ("neighbours", "model", "export"))
main, dataloader = load("simclr", "main"), load("simclr", "dataloader")


def test_mutual_neighbours_by_brute_force():
    torch.manual_seed(0)
    h = torch.nn.functional.normalize(torch.randn(1100, 5), dim=1)  # more than one part
    found = neighbours.mutual(h, 4)
    distance = torch.cdist(h.double(), h.double()).fill_diagonal_(torch.inf)
    nearest = [set(row.tolist()) for row in distance.argsort(1)[:, :4]]
    for i, row in enumerate(found.tolist()):
        assert {j for j in row if j >= 0} == {j for j in nearest[i] if i in nearest[j]}
        assert len(row) == 4
    assert (found < 0).all(1).any() and (found >= 0).all(1).any()


def test_partners_are_drawn_from_the_neighbours():
    table = torch.tensor([[1, 2, -1], [-1, -1, -1], [0, -1, 3], [-1, 2, 0]])
    rows = torch.tensor([3, 1, 0]).repeat(3000)
    drawn = neighbours.draw_partners(rows, table, torch.Generator().manual_seed(0))
    seen = {i: drawn[rows == i].bincount(minlength=4).tolist() for i in (0, 1, 3)}
    assert seen[1] == [0, 3000, 0, 0]  # it has none
    for i, (one, other) in {0: (1, 2), 3: (0, 2)}.items():
        assert seen[i][one] + seen[i][other] == 3000 and abs(seen[i][one] - 1500) < 150


def test_neighbours_of_images_are_those_of_their_features():
    """The encoder's own features are compared, on directions of their views: not those of another encoder."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (60, 84, 84, 3), dtype=torch.uint8)
    one, other = model.Encoder(4, bf16=True), model.Encoder(4)
    strength = 0.2, 0.4, 0.1
    found = {encoder: neighbours.find_neighbours(encoder, images, 4, strength) for encoder in (one, other)}
    assert one.bf16 and not found[one].equal(found[other])
    one.bf16 = False
    projected = export.with_directions(one, images, 84, 16, strength)
    h = torch.cat([projected.features(dataloader.plain_views(image[None])) for image in images]).detach()
    near = (h @ h.T).fill_diagonal_(-torch.inf).topk(4).indices
    for i, row in enumerate(found[one].tolist()):
        assert {j for j in row if j >= 0} == {j for j in near[i].tolist() if i in near[j]}


def test_half_the_views_of_a_step_are_of_neighbours(monkeypatch, tmp_path):
    flags = "--loss prototypical --views 4 --neighbours 1 --batch-size 5 --hidden-size 4 --view-size 64"
    args = main.parse_args([*flags.split(), "--save-dir", str(tmp_path)])
    images = torch.arange(10, dtype=torch.uint8).view(1, 10, 1, 1, 1).expand(1, 10, 84, 84, 3)
    seen, views = [], main.training_views
    monkeypatch.setattr(main, "training_views", lambda x, *how: seen.append((x, how)) or views(x, *how))
    monkeypatch.setattr(main, "find_neighbours", lambda *_: (torch.arange(10) + 1).unsqueeze(1) % 10)
    with pytest.raises(SystemExit):  # a signal: one step and last.pt
        main.train({"train": images}, torch.device("cpu"), False, {}, [signal.SIGTERM], args)
    (own, how), (others, how_others) = seen
    own, others = own[:, 0, 0, 0], others[:, 0, 0, 0]
    assert len(own.unique()) == 5 and others.equal((own + 1) % 10)
    assert how[1:3] == how_others[1:3] == (64, 2)
    assert load("simclr", "runtime").load_checkpoint(tmp_path / "last.pt")["near"].shape == (10, 1)


def test_neighbours_need_one_process(monkeypatch, data_dir, tmp_path):  # noqa: F811
    monkeypatch.setattr(export, "world", lambda: 2)
    args = main.parse_args(["--data-dir", str(data_dir), *map(str, TINY), "--neighbours", "1"])
    with pytest.raises(export.UserError, match="--neighbours: 2 processes found, one expected"):
        export.load_splits(args)
