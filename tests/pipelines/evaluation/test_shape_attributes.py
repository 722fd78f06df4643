"""The judge of captioned shapes is right about what was drawn, also if noisy or blurred, and sees nothing in noise."""

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, pad

from pipelines.evaluation.shape_attributes import NONE, judge_shapes, map_overlap
from twostage.core.data.captioned_shapes import ATTRIBUTES, caption_shapes, draw_captioned_shapes, shape_attributes

COUNT = 400
"""A quarter of all combinations of attributes."""


@cache
def drawn() -> tuple[Tensor, Tensor, dict[str, np.ndarray]]:
    pixels, maps = draw_captioned_shapes(0, COUNT, (32, 32), 3, seed=1)
    return torch.from_numpy(pixels), torch.from_numpy(maps), shape_attributes(0, COUNT, seed=1)


def noise(images: Tensor, std: float) -> Tensor:
    added = std * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + added).round().clamp(0, 255).byte()


def blur(images: Tensor) -> Tensor:
    return avg_pool2d(pad(images.float(), (1, 1, 1, 1), mode="replicate"), 3, stride=1).round().byte()


CHANGES = {
    "as drawn": (lambda images: images, 0.995),
    "noise": (lambda images: noise(images, 6), 0.95),
    "blur": (blur, 0.95),
    "blur and noise": (lambda images: noise(blur(images), 6), 0.95),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_attribute_is_found(change):
    images, maps, attributes = drawn()
    edit, right = CHANGES[change]
    found = judge_shapes(edit(images))
    for name in ATTRIBUTES:
        share = (found[name].numpy() == attributes[name]).mean()
        assert share >= right, (name, share)
    overlap = map_overlap(found["mask"], maps)
    assert overlap.mean() > (0.99 if change == "as drawn" else 0.85)


@pytest.mark.parametrize(("size", "unseen"), [((64, 64), False), ((32, 48), False), ((32, 32), True)])
def test_other_sizes_and_unseen_combinations(size, unseen):
    images = torch.from_numpy(draw_captioned_shapes(0, 80, size, 3, 2, unseen)[0])
    found, attributes = judge_shapes(images), shape_attributes(0, 80, 2, unseen)
    assert min((found[name].numpy() == attributes[name]).mean() for name in ATTRIBUTES) >= 0.99


def test_the_captions_of_what_is_found_are_those_of_the_image():
    images, _, attributes = drawn()
    found = judge_shapes(images[:80])
    assert caption_shapes({name: found[name].numpy() for name in ATTRIBUTES}) == caption_shapes(attributes)[:80]


def uniform(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 256, (count, 3, 1, 1), generator=generator).expand(-1, -1, 32, 32)


def pure_noise(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), generator=generator)


def clouds(count: int, generator: torch.Generator) -> Tensor:
    return (128 + 60 * interpolate(torch.randn(count, 3, 8, 8, generator=generator), size=32, mode="bicubic")).clamp(
        0, 255
    )


def two_shapes(count: int, generator: torch.Generator) -> Tensor:
    """The left half of one image beside the right half of another, on the same ground, with a shape in each."""
    images, _, attributes = drawn()
    place, ground = attributes["place"], attributes["ground"]
    left, right = (np.flatnonzero((place == at) & (ground == 1) & (attributes["size"] == 0))[:count] for at in (0, 3))
    return torch.cat([images[left, :, :, :16], images[right, :, :, 16:]], dim=3)


@pytest.mark.parametrize("make", [uniform, pure_noise, clouds, two_shapes])
def test_nothing_is_found_where_there_is_no_single_shape(make):
    images = make(8, torch.Generator().manual_seed(0)).byte()
    found = judge_shapes(images)
    assert {name: (found[name] == NONE).all().item() for name in ATTRIBUTES} == dict.fromkeys(ATTRIBUTES, True)


def test_a_shape_between_two_places_has_no_place():
    images, _, attributes = drawn()
    rows = np.flatnonzero((attributes["place"] == 4) & (attributes["size"] == 0))[:20]
    found = judge_shapes(images[rows].roll(-6, dims=3))  # from the centre to the left
    assert (found["place"] == NONE).all()
    assert np.array_equal(found["shape"].numpy(), attributes["shape"][rows])


def test_an_image_is_judged_alone():
    images, _, _ = drawn()
    together = judge_shapes(images[:260])
    for name, found in judge_shapes(images[250:260]).items():
        assert torch.equal(found, together[name][250:]), name


def test_overlap():
    mask = torch.zeros(3, 4, 4, dtype=torch.bool)
    mask[0, :2], mask[1, 0] = True, True
    maps = torch.zeros(3, 4, 4, dtype=torch.uint8)
    maps[0, :2], maps[1, :4] = 3, 1
    assert map_overlap(mask, maps).tolist() == [1.0, 0.25, 0.0]
