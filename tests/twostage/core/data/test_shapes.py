"""Shapes are a function of seed and number alone, and a person could tell them apart."""

from itertools import combinations

import numpy as np
import pytest

from twostage.core.data.shapes import CLASS_NAMES, SHAPES, draw_shapes


@pytest.mark.parametrize("start", [0, 100, 511, 1023])
def test_image_depends_on_its_number_alone(start):
    several = draw_shapes(0, 1030, (8, 8), 1, seed=3)
    assert np.array_equal(draw_shapes(start, 7, (8, 8), 1, seed=3), several[start : start + 7])


def test_drawing_again_gives_the_same_and_another_seed_others():
    first, again, other = (draw_shapes(0, 16, (16, 16), 3, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert all((a != b).any() for a, b in zip(first, other, strict=True))


def test_no_two_images_are_alike():
    images = np.concatenate([draw_shapes(0, 600, (8, 8), 3, seed) for seed in (0, 1)])
    assert len(np.unique(images.reshape(1200, -1), axis=0)) == 1200


def test_the_eight_outlines_differ_and_fit_the_unit_circle():
    x, y = np.meshgrid(*[np.linspace(-1.2, 1.2, 121)] * 2)
    filled = {name: distance(x, y) < 0 for name, distance in SHAPES.items()}
    assert list(filled) == CLASS_NAMES
    assert len(CLASS_NAMES) == 8
    for name, mask in filled.items():
        assert mask.mean() > 0.1, name
        assert (np.hypot(x, y)[mask] < 1.05).all(), name
    for one, other in combinations(CLASS_NAMES, 2):
        overlap = (filled[one] & filled[other]).sum() / (filled[one] | filled[other]).sum()
        assert overlap < 0.9, (one, other)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_and_sizes(channels):
    images = draw_shapes(5, 3, (10, 20), channels)
    assert (images.shape, images.dtype) == ((3, channels, 10, 20), np.uint8)
    if channels == 4:
        assert (images[:, 3] == 255).all()
        assert np.array_equal(images[:, :3], draw_shapes(5, 3, (10, 20), 3))
    if channels == 1:
        luminance = np.tensordot([0.299, 0.587, 0.114], draw_shapes(5, 3, (10, 20), 3).astype(float), axes=(0, 1))
        assert np.abs(luminance - images[:, 0]).max() <= 1.5


def test_edges_are_antialiased():
    small, large = (draw_shapes(0, 64, (side, side), 3).astype(float) for side in (16, 64))
    averaged = large.reshape(64, 3, 16, 4, 16, 4).mean((3, 5))
    assert np.abs(small - averaged).mean() < 1.5  # 4 with hard edges


def test_shapes_stand_out_from_their_ground():
    images = draw_shapes(0, 200, (32, 32), 3).astype(int)
    spread = np.ptp(images.reshape(200, 3, -1), axis=2).max(1)  # the strongest channel's
    assert spread.min() > 40
