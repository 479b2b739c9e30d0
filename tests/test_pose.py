"""omniglot/pose.py: poses by their definition, what a canonical image forgets and keeps, laws of warps."""

import math

import numpy as np
import pytest
import torch
from conftest import load

pose = load("omniglot", "pose")
centres = (2 * torch.arange(28, dtype=torch.float64) + 1) / 28 - 1


def blob(x=0.0, y=0.0, wide=0.25, tall=0.1, turn=0.6):
    """A Gaussian blob with a tail, drawn analytically: (1, 28, 28, 1); `wide` and `tall` are its size."""
    u, v = torch.meshgrid(centres - x, centres - y, indexing="xy")
    along, across = math.cos(turn) * u + math.sin(turn) * v, math.cos(turn) * v - math.sin(turn) * u
    body = torch.exp(-((along / wide) ** 2 + (across / tall) ** 2) / 2)
    tail = torch.exp(-(((along - wide) / (wide / 2)) ** 2 + ((across - 2 * tall) / tall) ** 2) / 2)
    return ((body + tail) / 1.2).clamp(max=1).float()[None, :, :, None]


def odd_images():
    """Images that a formula may trip over: empty, dot, a faint dot, an edge, full, lines, noise, corners."""
    x = torch.zeros(9, 28, 28, 1)
    x[1, 3, 20], x[2, 27, 0], x[3, :, 27], x[4] = 1, 1 / 255, 1, 1
    x[5, 14], x[6, :, :, 0] = 1, torch.eye(28)
    x[7] = torch.rand(28, 28, 1, generator=torch.Generator().manual_seed(0))
    x[8, ::27, ::27] = 1  # larger than the largest size
    return x


def by_definition(image, shape):
    """The pose of one image (28, 28) with loops, in float64, by eigenvectors."""
    mass, first, second = 0.0, np.zeros(2), np.zeros((2, 2))
    points = [(float(image[i, j]), np.array([centres[j], centres[i]])) for i in range(28) for j in range(28)]
    for ink, u in points:
        mass, first = mass + ink, first + ink * u
    centre = first / mass
    for ink, u in points:
        second += ink * np.outer(u - centre, u - centre)
    covariance = second / mass + 2e-3 * np.eye(2)
    values, vectors = np.linalg.eigh(covariance)
    size = np.clip(np.sqrt(np.trace(covariance)), 0.15, 1) / 0.55
    return centre, size * vectors @ np.diag((values / values.mean()) ** shape) @ vectors.T


@pytest.mark.parametrize("shape", [0, 0.25, 0.5])
def test_the_pose_is_its_definition(shape):
    x = torch.cat([odd_images()[1:], blob(), blob(0.4, -0.3, 0.1, 0.1), blob(-0.6, 0.6, 0.4, 0.05, 2.0)])
    centre, matrix = pose.pose(x, shape)
    for image, c, m in zip(x[..., 0], centre, matrix, strict=True):
        expected_centre, expected_matrix = by_definition(image, shape)
        assert np.allclose(c, expected_centre, atol=1e-5) and np.allclose(m, expected_matrix, atol=1e-4)


def test_without_shape_only_position_and_size_are_left():
    matrix = pose.pose(torch.cat([odd_images(), blob()]), shape=0)[1]
    assert torch.allclose(matrix, matrix[:, :1, :1] * torch.eye(2), atol=1e-6)
    assert len(matrix[:, 0, 0].unique()) > 4  # the sizes do differ


def test_odd_images_give_finite_results():
    x = odd_images()
    found = pose.pose(x)
    drawn = pose.canonical(x, found)
    assert found[0][0].tolist() == [0, 0]  # the empty one
    assert torch.isfinite(found[0]).all() and torch.isfinite(found[1]).all()
    for image in (drawn, pose.put_back(drawn, found)):
        assert image.shape == x.shape and image.dtype == torch.float32
        assert 0 <= image.min() and image.max() <= 1 + 1e-6  # NaN fails both
        assert image[0].max() == 0 < image[1:].flatten(1).amax(1).min()


def test_colours_are_refused():
    with pytest.raises(ValueError):
        pose.pose(torch.rand(2, 28, 28, 3))


def test_autocast_does_not_make_the_pose_coarser():
    x = torch.cat([odd_images(), blob()])
    expected = pose.pose(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = pose.pose(x)
        drawn, back = pose.canonical(x, found), pose.put_back(x, found)
        warped = pose.warp(x, "elastic", torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(drawn, pose.canonical(x, expected)) and torch.equal(back, pose.put_back(x, expected))
    assert torch.equal(warped, pose.warp(x, "elastic", torch.Generator().manual_seed(0)))


# --- what the canonical image forgets and keeps ---------------------------------------------------


def without_pose(x, shape=0.25):
    return pose.canonical(x, pose.pose(x, shape))


@pytest.mark.parametrize("shape", [0, 0.25])
def test_a_moved_or_magnified_drawing_has_the_same_canonical_image(shape):
    expected = without_pose(blob(), shape)
    pixel = 2 / 28
    by_pixels = blob(3 * pixel, -2 * pixel)
    assert torch.allclose(without_pose(by_pixels, shape), expected, atol=1e-2)  # but for the cut tail
    larger, smaller = blob(0, 0, 0.25 * 1.25, 0.1 * 1.25), blob(-0.1, 0.1, 0.25 * 0.85, 0.1 * 0.85)
    for other in (blob(0.13, 0.21), larger, smaller):
        assert (other - blob()).abs().max() > 0.25
        assert (without_pose(other, shape) - expected).abs().max() < 0.12
        assert (without_pose(other, shape) - expected).abs().mean() < 0.01


def test_a_canonical_image_is_centred_of_one_size_and_of_half_the_slant():
    x = blob(0.2, -0.15, 0.3, 0.12)
    centre, matrix = pose.pose(without_pose(x, shape=0), shape=0)
    assert centre.abs().max() < 0.01
    before = pose.pose(x, shape=0)[1]
    assert abs(matrix[0, 0, 0] - 1) < 0.06 < abs(before[0, 0, 0] - 1)  # r = 0.55, but for the 2e-3

    def ratio(image):
        """The logarithm of the ratio of the standard deviations, from W = C / mean eigenvalue."""
        values = torch.linalg.eigvalsh(pose.pose(image, shape=1)[1])[0]
        return 0.5 * (values[1] / values[0]).log().item()

    for shape, kept in ((0, 1), (0.25, 0.5), (0.5, 0)):
        assert abs(ratio(without_pose(x, shape)) - kept * ratio(x)) < 0.06


def test_canonical_commutes_with_quarter_turns_and_mirrors():
    x = torch.cat([odd_images(), blob(0.2, 0.1)])
    turns = [lambda x, k=k: x.rot90(k, (1, 2)) for k in (1, 2, 3)]
    for move in (*turns, lambda x: x.flip(1), lambda x: x.transpose(1, 2)):
        assert (move(x) - x).abs().max() > 0.5
        assert torch.allclose(without_pose(move(x)), move(without_pose(x)), atol=1e-4)


def test_put_back_draws_a_smooth_drawing_where_it_was():
    x = torch.cat([blob(), blob(0.3, -0.2), blob(-0.1, 0.2, 0.3, 0.15, 2.0)])
    found = pose.pose(x)
    canonical = pose.canonical(x, found)
    error = (pose.put_back(canonical, found) - x).abs()
    assert error.max() < 0.15 and error.mean() < 0.01
    assert (canonical - x).abs().mean() > 5 * error.mean()  # it was elsewhere in between


# --- warps ----------------------------------------------------------------------------------------


def ramp(count):
    """Images of the coordinates themselves, x and y: bilinear sampling reads a warp's grid from them."""
    u, v = torch.meshgrid(centres.float(), centres.float(), indexing="xy")
    return (image.expand(count, 28, 28).unsqueeze(-1) for image in (u, v))


def grid_of(strength, count=3000):
    """The points that the central 4 pixels of warped images read: (count, 2, 2, 2), rows, columns, (x, y)."""
    warped = [pose.warp(x, strength, torch.Generator().manual_seed(0)) for x in ramp(count)]
    return torch.cat(warped, -1)[:, 13:15, 13:15]


def uniform_within(values, bound):
    assert values.abs().max() <= bound * (1 + 1e-3)
    assert abs(values.mean()) < 5 * bound / 3**0.5 / len(values) ** 0.5
    assert abs(values.std() * 3**0.5 / bound - 1) < 0.05


def test_an_affine_warp_is_a_turn_a_shear_scales_and_a_shift_within_their_bounds():
    grid = grid_of("affine")
    for shift in grid.mean((1, 2)).unbind(-1):
        uniform_within(shift, 0.2)
    A = torch.stack([(grid[:, :, 1] - grid[:, :, 0]).mean(1), (grid[:, 1] - grid[:, 0]).mean(1)], -1) * 14
    turn = torch.atan2(A[:, 1, 0], A[:, 0, 0])  # A = rotation [[wide, shear tall], [0, tall]]
    wide, tall = A[:, :, 0].norm(dim=1), torch.linalg.det(A) / A[:, :, 0].norm(dim=1)
    shear = (A[:, :, 0] * A[:, :, 1]).sum(1) / (wide * tall)
    factors = [turn / math.radians(15), wide.log() / 0.2, tall.log() / 0.2, shear / 0.2]
    for factor in factors:
        uniform_within(factor, 1)
    correlation = torch.corrcoef(torch.stack([*factors, *grid.mean((1, 2)).unbind(-1)]))
    assert (correlation - torch.eye(6)).abs().max() < 5 / 3000**0.5


def test_an_elastic_warp_adds_a_smooth_displacement():
    field = grid_of("elastic") - grid_of("affine")  # the affine part is drawn first, so it is the same
    assert field.mean((0, 1, 2)).abs().max() < 5 * 0.08 / 3000**0.5
    assert ((field.std(0) / 0.08 - 1).abs() < 0.07).all()  # the image's centre is a point of the 5 x 5
    assert abs(torch.corrcoef(field[:, 0, 0].T)[0, 1]) < 5 / 3000**0.5
    step = (field[:, :, 1] - field[:, :, 0]).std()
    assert 0.005 < step < 0.03  # smooth, but not one shift


@pytest.mark.parametrize("strength", ["affine", "elastic"])
def test_warps_follow_the_generator_alone_and_differ_from_image_to_image(strength):
    x = blob().repeat(6, 1, 1, 1)
    draw = lambda generator: pose.warp(x, strength, generator)  # noqa: E731
    first, second = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    a = draw(first)
    torch.manual_seed(1)
    assert torch.equal(a, draw(second))
    assert a.shape == x.shape and a.dtype == torch.float32 and 0 <= a.min() and a.max() <= 1 + 1e-6
    for other in (draw(first), draw(torch.Generator().manual_seed(4)), x, a.roll(1, 0)):
        assert (a - other).abs().flatten(1).amax(1).min() > 0.02
    assert pose.warp(torch.ones_like(x), strength, first).min() == 0  # zero outside, no border drawn on
