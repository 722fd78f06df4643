"""Captioned shapes are a function of seed and number alone, balanced, and what their captions and maps say."""

from collections import Counter
from itertools import product

import numpy as np
import pytest

from twostage.core.data.captioned_shapes import (
    ATTRIBUTES,
    COLOURS,
    GROUNDS,
    MAP_NAMES,
    UNSEEN,
    caption_shapes,
    draw_captioned_shapes,
    place_centres,
    shape_attributes,
)
from twostage.core.data.shapes import CLASS_NAMES

COUNT = 1600
"""Images after which all combinations but the unseen ones have occurred."""


def words(attributes: dict[str, np.ndarray]) -> list[tuple[str, ...]]:
    return list(zip(*(np.array(ATTRIBUTES[name])[found].tolist() for name, found in attributes.items()), strict=True))


@pytest.mark.parametrize("start", [0, 100, 319, 1599, 1600])
@pytest.mark.parametrize("unseen", [False, True])
def test_image_depends_on_its_number_alone(start, unseen):
    several = draw_captioned_shapes(0, 1700, (8, 8), 3, 3, unseen)
    for part, whole in zip(draw_captioned_shapes(start, 9, (8, 8), 3, 3, unseen), several, strict=True):
        assert np.array_equal(part, whole[start : start + 9])
    attributes = shape_attributes(0, 1700, 3, unseen)
    for name, found in shape_attributes(start, 9, 3, unseen).items():
        assert np.array_equal(found, attributes[name][start : start + 9])


def test_drawing_again_gives_the_same_and_another_seed_others():
    (first, _), (again, _), (other, _) = (draw_captioned_shapes(0, 16, (16, 16), 3, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert all((a != b).any() for a, b in zip(first, other, strict=True))


def test_a_block_has_every_combination_once():
    found = Counter(words(shape_attributes(COUNT, COUNT, 5)))
    assert set(found.values()) == {1}
    assert len(found) == COUNT
    assert {(colour, shape) for shape, colour, *_ in found} == {*product(COLOURS, CLASS_NAMES)} - UNSEEN


def test_every_run_of_eight_has_all_shapes():
    assert np.array_equal(shape_attributes(3, 40)["shape"], np.arange(3, 43) % 8)


def test_few_images_are_balanced_too():
    attributes = shape_attributes(0, 800)
    for name, values in ATTRIBUTES.items():
        expected = 800 / len(values)
        counts = np.bincount(attributes[name], minlength=len(values))
        assert (abs(counts - expected) < 0.25 * expected).all(), (name, counts)


def test_unseen_combinations_are_one_of_each_shape_and_one_or_two_of_each_colour():
    assert Counter(shape for _, shape in UNSEEN) == dict.fromkeys(CLASS_NAMES, 1)
    assert set(Counter(colour for colour, _ in UNSEEN)) == set(COLOURS)
    assert set(Counter(colour for colour, _ in UNSEEN).values()) == {1, 2}


def test_unseen_images_have_unseen_combinations_alone_and_all_other_attributes():
    found = Counter(words(shape_attributes(0, 320, 2, unseen=True)))
    assert set(found.values()) == {1}
    assert {(colour, shape) for shape, colour, *_ in found} == UNSEEN
    assert {tuple(others) for _, _, *others in found} == {
        *product(ATTRIBUTES["size"], ATTRIBUTES["place"], ATTRIBUTES["ground"])
    }


def test_captions_say_every_attribute_and_nothing_else():
    attributes = shape_attributes(0, COUNT)
    captions = caption_shapes(attributes)
    for values, several in zip(words(attributes), captions, strict=True):
        assert len(set(several)) == 4
        for caption in several:
            assert all(value in caption for value in values)
            for name, value in zip(ATTRIBUTES, values, strict=True):
                assert [other for other in ATTRIBUTES[name] if other in caption] == [value], caption
    vocabulary = {word for several in captions for caption in several for word in caption.replace(",", "").split()}
    assert len(vocabulary) == 34  # without it, a closed vocabulary would grow unnoticed
    assert "a small red heart at the top left, on white" in {several[0] for several in captions}


@pytest.mark.parametrize("size", [(32, 32), (48, 20)])
def test_pixels_have_the_colours_and_the_place_of_the_attributes(size):
    pixels, maps = draw_captioned_shapes(0, 400, size, 3)
    attributes = shape_attributes(0, 400)
    inks, grounds = (np.array(list(palette.values()))[attributes[name]] for palette, name in
                     ((COLOURS, "colour"), (GROUNDS, "ground")))  # fmt: skip
    assert (abs(pixels[..., 0, 0] - grounds) <= 1).mean() > 0.99  # a large star may touch a corner
    assert ["ground", *CLASS_NAMES] == MAP_NAMES
    y, x = np.indices(size) + 0.5
    for i, (image, labels) in enumerate(zip(pixels, maps, strict=True)):
        inside = labels > 0
        assert set(labels[inside]) == {attributes["shape"][i] + 1}
        distances = [((image.transpose(1, 2, 0).astype(int) - colour[i]) ** 2).sum(-1) for colour in (inks, grounds)]
        assert ((distances[0] < distances[1]) == inside).mean() > 0.995, i  # but for shares near 1/2, after rounding
        middle = np.array([x[inside].mean(), y[inside].mean()])
        nearest = np.hypot(*(place_centres(size) - middle).T).argmin()
        assert nearest == attributes["place"][i]


def test_large_shapes_are_clearly_larger():
    maps, attributes = draw_captioned_shapes(0, 800, (64, 64), 3)[1], shape_attributes(0, 800)
    area = (maps > 0).sum((1, 2))
    for shape in range(len(CLASS_NAMES)):
        small, large = (area[(attributes["shape"] == shape) & (attributes["size"] == size)] for size in (0, 1))
        assert large.min() > 1.5 * small.max()


def test_the_whole_shape_is_inside_the_image():
    maps = draw_captioned_shapes(0, COUNT, (64, 64), 3)[1]
    border = np.concatenate([maps[:, 0], maps[:, -1], maps[:, :, 0], maps[:, :, -1]], axis=1)
    assert not border.any()


def test_alpha_is_opaque():
    opaque, maps = draw_captioned_shapes(5, 3, (16, 16), 4)
    pixels, same_maps = draw_captioned_shapes(5, 3, (16, 16), 3)
    assert (opaque[:, 3] == 255).all()
    assert np.array_equal(opaque[:, :3], pixels)
    assert np.array_equal(maps, same_maps)
