"""Images that lie near each other in the features: positives beside an image's own views; not the paper's."""

import torch

from dataloader import SIZE, send
from export import encode_all, with_directions

REFRESH_EPOCHS = 4  # epochs for which the neighbours found are used
DIRECTIONS = 128


@torch.no_grad()
def find_neighbours(encoder, images, count, strength):
    """Find each image's neighbours among images (N, 84, 84, 3): `mutual` on features projected by `lda`.

    Its directions are found from views of the training's `strength`.
    """
    width = min(DIRECTIONS, encoder.width(SIZE))
    found = with_directions(encoder, images, SIZE, width, strength)
    return mutual(encode_all(found, images.unsqueeze(0), SIZE, "neighbours")[0], count)


def mutual(h, count):
    """Find the images that are among the `count` nearest of each other: (N, count), -1 where one is not.

    h (N, width), rows of one norm: the nearest by distance are those of the largest products.
    """
    rows = torch.arange(len(h), device=h.device)
    nearest = torch.cat([
        (h[some] @ h.T).scatter_(1, some.unsqueeze(1), -torch.inf).topk(count).indices
        for some in rows.split(1000)
    ])  # fmt: skip
    returned = (nearest[nearest] == rows.view(-1, 1, 1)).any(-1)
    return nearest.masked_fill(~returned, -1)


def draw_partners(rows, neighbours, generator):
    """Draw one of the neighbours of each image, or the image itself if it has none: (n,) -> (n,)."""
    near = neighbours[rows]
    draw = send(torch.rand(near.shape, generator=generator), near.device).masked_fill(near < 0, -1)
    partner = near.gather(1, draw.argmax(1, keepdim=True)).squeeze(1)
    return torch.where(partner < 0, rows, partner)
