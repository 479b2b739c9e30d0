"""The same images in two splits: what a test would know from training is refused, a few that recur are
not."""

import numpy as np
import pytest
import torch

from conftest import load, needs_shared_data

SHAPES = {"omniglot": (28, 28, 1), "mimgnet": (32,), "simclr": (84, 84, 3)}


def splits(folder, classes=(6, 5, 8), members=20):
    """{split: (classes, members, ...)} of noise."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(count, members, *SHAPES[folder]) for count in classes]
    arrays = [torch.randint(256, shape, generator=generator, dtype=torch.uint8) for shape in shapes]
    return dict(zip(("train", "val", "test"), [x.float() if folder == "mimgnet" else x for x in arrays]))


@pytest.fixture(params=SHAPES)
def folder(request):
    return request.param


def refused(folder, found, words):
    dataloader = load(folder, "dataloader")
    with pytest.raises(dataloader.UserError) as caught:
        dataloader.check_apart("some/data", found)
    assert str(caught.value) == f"some/data: {words}, different ones in each split expected"


def test_a_split_that_is_another(folder):
    found = splits(folder)
    refused(folder, found | {"test": found["train"]}, "120 images of train found in test too")
    refused(folder, found | {"val": found["test"][:5].flip(0, 1)}, "100 images of val found in test too")


def test_a_class_of_many_and_images_of_many_classes(folder):
    found = splits(folder, (150, 5, 150), 4)
    found["train"][149] = found["test"][3].flip(0)
    refused(folder, found, "4 images of train found in test too")
    found = splits(folder, (150, 5, 150), 4)
    found["test"][:7, 0] = found["train"][20:27, 3]
    refused(folder, found, "7 images of train found in test too")


def test_what_is_accepted(folder):
    check = load(folder, "dataloader").check_apart
    found = splits(folder, (150, 150, 150), 4)
    found["test"][:6, 0] = found["train"][20:26, 3]  # 1 %
    check("some/data", found)
    found = splits(folder)
    for images in found.values():
        images[:3, :12] = 0  # blank
    check("some/data", found)
    found = splits(folder)
    found["test"][4, 5] = found["train"][1, 19]
    check("some/data", found)
    check("some/data", {name: torch.ones_like(images) for name, images in found.items()})  # of a dead encoder
    check("some/data", {"test": found["test"]})


def test_floats_are_compared_with_bytes():
    found = splits("omniglot")
    refused(
        "omniglot", found | {"test": found["train"].float() / 255}, "120 images of train found in test too"
    )


def test_features_of_training_without_classes():
    found = splits("mimgnet")
    found["train"] = found["train"].reshape(1, 120, 32)
    load("mimgnet", "dataloader").check_apart("some/data", found)
    found["train"][0, 3:23] = found["val"][2]
    refused("mimgnet", found, "20 images of train found in val too")


@needs_shared_data
def test_real_omniglot_is_apart(omniglot_dir):
    dataloader = load("omniglot", "dataloader")
    found = {
        name: torch.from_numpy(np.load(omniglot_dir / f"{name}.npy")) for name in ("train", "val", "test")
    }
    dataloader.check_apart(omniglot_dir, found)
