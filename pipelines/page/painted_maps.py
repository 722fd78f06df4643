"""Maps on the page: the colours of labels, and what is painted.

Axes: C channels, H and W pixels of a map.
"""

import colorsys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.files.given_conditions import read_map_file
from twostage.core.conditions.map_condition import NO_LABEL, MapConditionConfig

__all__ = ["LABEL_COLOURS", "MapCanvas", "hex_colour", "number_colour", "painted_image", "painted_labels"]

BLANK = 255
"""The value of all pixels of an editor that was cleared, and of an empty map that is an image."""
OPAQUE = 128
"""The alpha value from which a pixel of a layer counts as painted."""


def number_colour(number: int) -> tuple[int, int, int]:
    """Light enough for a black number; consecutive numbers get very different colours (the golden angle)."""
    turn = number * 0.61803398875
    lightness, saturation = 0.62 + 0.2 * (turn * 7 % 1), 0.45 + 0.4 * (turn * 3 % 1)
    red, green, blue = colorsys.hls_to_rgb(turn % 1, lightness, saturation)
    return round(255 * red), round(255 * green), round(255 * blue)


LABEL_COLOURS = [(226, 232, 240), *map(number_colour, range(1, NO_LABEL)), (248, 250, 252)]
"""By label. 0 is often the ground, so it is grey; `NO_LABEL` is nearly white. None is `BLANK`."""


def hex_colour(label: int) -> str:
    """The colour of a label, as in `#e2e8f0`."""
    return "#{:02x}{:02x}{:02x}".format(*LABEL_COLOURS[label])


class MapCanvas:
    """What maps look like on the page, and which map was painted, for a model that is conditioned on maps.

    Maps are (H, W) uint8 with labels, or (C, H, W) uint8 if they are images.
    """

    def __init__(self, config: MapConditionConfig) -> None:
        assert config.size is not None
        self._config, self._channels, self._size = config, config.channels, config.size
        self.labels = list(config.labels)
        """Those that can be painted; none if maps are images."""
        names = dict(enumerate(config.names))
        self.names = [f"{label} {names[label]}" if label in names else str(label) for label in self.labels]
        """What the page calls them: the number and, if it is known, the name."""

    def empty(self) -> np.ndarray:
        """A map of the smallest label alone, usually the ground; or a white image."""
        shape = self._size if self._channels is None else (self._channels, *self._size)
        return np.full(shape, self.labels[0] if self.labels else BLANK, dtype=np.uint8)

    def read(self, path: str) -> np.ndarray:
        """An uploaded map.

        Raises:
            InputError: see `read_map_file`; a map that the model was not trained with.
        """
        found = read_map_file(Path(path), Path(path).name, self._channels)
        self._config.read_map(found)
        return found

    def draw(self, found: np.ndarray) -> Tensor:
        """A map as an image (C, H, W) uint8."""
        if self._channels is not None:
            return torch.from_numpy(found.copy())
        return torch.tensor(LABEL_COLOURS, dtype=torch.uint8)[torch.from_numpy(found.astype(np.int64))].permute(2, 0, 1)

    def painted(
        self, uploaded: np.ndarray | None, below: np.ndarray | None, layers: list[np.ndarray]
    ) -> np.ndarray | None:
        """The map that was painted on ``uploaded``, or on an empty one; None if nothing was painted or uploaded.

        Args:
            below: what the editor shows below the ``layers``; if it was cleared, nothing or `BLANK`, and then the
                uploaded map no longer counts.
            layers: (height, width, 4) uint8 RGBA each, transparent where nothing is painted.
        """
        if below is None or (below == BLANK).all():
            uploaded = None
        if uploaded is None and not any(layer[..., 3].any() for layer in layers):
            return None
        ground = self.empty() if uploaded is None else uploaded
        return painted_labels(ground, layers, self.labels) if self.labels else painted_image(ground, layers)


def painted_labels(ground: np.ndarray, layers: list[np.ndarray], labels: list[int]) -> np.ndarray:
    """The labels (H, W) uint8 of a map that was painted on: where at least half of a pixel is covered, the label that
    covers most of it.

    Args:
        ground: (H, W) uint8: the labels below.
        layers: (height, width, 4) uint8 RGBA each, an enlarged map: painted in the colours of ``labels`` where it is
            opaque. A stroke's edge has mixed colours and counts as the nearest of these.
        labels: those that can be painted.
    """
    (height, width), painted = ground.shape, torch.from_numpy(ground.astype(np.int64))
    colours = torch.tensor([LABEL_COLOURS[label] for label in labels]).float()
    for layer in layers:
        pixels = torch.from_numpy(layer)
        opaque = pixels[..., 3] >= OPAQUE
        if opaque.any():
            distinct, which = pixels[opaque][:, :3].unique(dim=0, return_inverse=True)
            numbers = torch.full(opaque.shape, -1)
            numbers[opaque] = torch.cdist(distinct.float(), colours).argmin(1)[which]
            shares = torch.stack([_shares(numbers == number, (height, width)) for number in range(len(labels))])
            covered = shares.sum(0) >= 0.5
            painted[covered] = torch.tensor(labels)[shares.argmax(0)][covered]
    return painted.numpy().astype(np.uint8)


def painted_image(ground: np.ndarray, layers: list[np.ndarray]) -> np.ndarray:
    """The pixels (C, H, W) uint8 of a map that was painted on, resized to the mean colour.

    Args:
        ground: (C, H, W) uint8: the image below.
        layers: (height, width, 4) uint8 RGBA each, an enlarged map.
    """
    painted, (_, height, width) = torch.tensor(ground).float(), ground.shape
    for layer in layers:
        pixels = torch.tensor(layer).permute(2, 0, 1).float()
        alpha = pixels[3:] / 255
        colours = pixels[:3] if len(painted) == 3 else pixels[:3].mean(0, keepdim=True)
        cover, ink = (F.adaptive_avg_pool2d(each, (height, width)) for each in (alpha, colours * alpha))
        painted = painted * (1 - cover) + ink
    return painted.round().numpy().astype(np.uint8)


def _shares(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    return F.adaptive_avg_pool2d(pixels[None].float(), size)[0]
