"""Drawn sources are split, labelled and, if captioned, come with captions and maps of the same images."""

import numpy as np
import pytest
import torch
from messages import assert_names

from twostage.core.config.sections import parse_config
from twostage.core.data.captioned_shapes import UNSEEN, caption_shapes, draw_captioned_shapes
from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images, load_larger
from twostage.core.data.drawn_sources import split_attributes
from twostage.core.data.image_data import ImageData
from twostage.core.data.shapes import CLASS_NAMES, draw_shapes
from twostage.core.errors import InputError


def load(**settings) -> ImageData:
    document = {"source": "captioned_shapes", "image_size": 8, "num_images": 1600} | settings
    return load_images(parse_config(DataConfig, document, "data"))


@pytest.fixture(scope="module")
def captioned() -> ImageData:
    return load()


def test_shapes_are_as_ever():
    data = load(source="shapes", num_images=100)
    for seed, name in enumerate(["train", "test"]):
        split = data.splits[name]
        assert torch.equal(split.pixels, torch.from_numpy(draw_shapes(0, len(split), (8, 8), 3, seed)))
        assert (split.captions, split.map_form) == (None, None)


def test_splits_of_captioned_shapes(captioned):
    assert {name: len(split) for name, split in captioned.splits.items()} == {"train": 1600, "test": 160, "unseen": 160}
    assert captioned.validation_name == "test"
    assert captioned.class_names == CLASS_NAMES
    assert captioned.untrained_classes == []
    assert list(captioned.identity()) == ["classes", "train", "test", "unseen"]


def test_pixels_labels_captions_and_maps_belong_together(captioned):
    for seed, (name, split) in enumerate(captioned.splits.items()):
        pixels, maps = draw_captioned_shapes(0, len(split), (8, 8), 3, seed, unseen=name == "unseen")
        attributes = split_attributes(name, len(split))
        assert np.array_equal(split.pixels, pixels)
        assert np.array_equal(split.read_maps(torch.arange(len(split))), maps)
        assert np.array_equal(split.labels, attributes["shape"])
        assert split.captions == caption_shapes(attributes)


def test_unseen_combinations_are_in_no_caption_of_the_other_splits(captioned):
    found = {
        name: {
            (colour, shape) for colour, shape in UNSEEN for texts in split.captions if f"{colour} {shape}" in texts[0]
        }
        for name, split in captioned.splits.items()
    }
    assert found == {"train": set(), "test": set(), "unseen": UNSEEN}


def test_no_two_images_are_alike(captioned):
    pixels = torch.cat([split.pixels for split in load(image_size=16).splits.values()])
    assert len(pixels.flatten(1).unique(dim=0)) == len(pixels)


def test_larger_images_have_larger_maps(captioned):
    larger = load_larger(captioned, (12, 12))
    rows = torch.arange(1600)
    pixels, maps = draw_captioned_shapes(0, 1600, (12, 12), 3)
    assert np.array_equal(larger.read(rows), pixels)
    assert np.array_equal(larger.read_maps(rows), maps)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"channels": 1}, ["data.channels", "1", "captioned_shapes", "data.channels=3"]),
        ({"label_column": "shape"}, ["data.label_column", "'shape'", "captioned_shapes", "Remove"]),
        ({"caption_column": None}, ["data.caption_column", "None", "captioned_shapes", "Remove"]),
        ({"maps": "masks"}, ["data.maps", "'masks'", "captioned_shapes", "Remove"]),
        ({"source": "shapes", "vector_column": "v"}, ["data.vector_column", "'v'", "data.source=shapes", "Remove"]),
    ],
)
def test_settings_that_do_not_apply(settings, named):
    with pytest.raises(InputError) as raised:
        load(**settings)
    assert_names(str(raised.value), *named)
