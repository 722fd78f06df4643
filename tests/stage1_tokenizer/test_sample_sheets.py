"""The sample sheets of a training show all classes, and the same images every time."""

import numpy as np
import torch

from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.autoencoder_config import AutoencoderConfig
from stage1_tokenizer.sample_sheets import MAX_POINTS, draw_images
from twostage.core.config.sections import parse_config
from twostage.core.data.data_config import DataConfig
from twostage.core.data.image_data import ImageData, ImageSplit

CLASSES = 5


class Watched(ImageSplit):
    """Records the rows that are read."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.rows: list[int] = []

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        self.rows += rows.tolist()
        return super().read(rows)


def sorted_data(each: int) -> ImageData:
    """Held-out images of 8x8, sorted by class; the brightness of an image encodes its class."""
    labels = np.arange(CLASSES).repeat(each)
    pixels = np.empty((len(labels), 1, 8, 8), dtype=np.uint8)
    pixels[:] = (20 * labels)[:, None, None, None]
    config = DataConfig(image_size=8, channels=1)
    splits = {"train": ImageSplit(labels, pixels, None, config), "test": Watched(labels, pixels, None, config)}
    return ImageData("sorted", splits, [f"class {i}" for i in range(CLASSES)])


def autoencoder(bottleneck: str) -> Autoencoder:
    backbone = {"type": "mlp", "hidden_sizes": [4]} if bottleneck == "identity" else {"type": "conv", "channels": 8}
    model = {"latent_channels": 2, "backbone": backbone, "bottleneck": {"type": bottleneck}}
    document = {"image_size": [8, 8], "channels": 1, "model": model, "loss": {}}
    return Autoencoder(parse_config(AutoencoderConfig, document, "test"))


def test_twelve_held_out_images_cover_all_classes_and_stay_the_same():
    model, data = autoencoder("vector"), sorted_data(100)
    shown = np.asarray(draw_images(model, data, seed=0)[""])
    left = shown.shape[1] - 12 * (88 + 4) - 4
    brightness = [int(shown[10, left + 4 + column * 92 + 44, 0]) for column in range(12)]
    assert brightness == [20 * (column % CLASSES) for column in range(12)]
    assert np.array_equal(np.asarray(draw_images(model, data, seed=0)[""]), shown)


def test_the_latent_plane_shows_every_class_of_a_large_split():
    """The first `MAX_POINTS` rows would only cover two of the classes."""
    model, data = autoencoder("identity"), sorted_data(MAX_POINTS // 2)
    assert "scatter" in draw_images(model, data, seed=0)
    split = data.validation
    assert isinstance(split, Watched)
    assert split.labels is not None
    counts = torch.bincount(split.labels[split.rows[12:]])
    assert counts.tolist() == [MAX_POINTS // CLASSES] * CLASSES
