"""Neighbours as positives: found and drawn as they are defined, and what a step then sees."""

import torch

from conftest import load

neighbours, model = load("simclr", "neighbours"), load("simclr", "model")


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
    """Copies of an image find each other; the encoder's own features are what is compared."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (20, 84, 84, 3), dtype=torch.uint8)
    training = {"crop_scale": 0.2, "jitter": 0.4, "hue": 0.1}
    found = neighbours.find_neighbours(model.Encoder(4), torch.cat([images, images]), 1, training)
    assert found.flatten().tolist() == [*range(20, 40), *range(20)]
