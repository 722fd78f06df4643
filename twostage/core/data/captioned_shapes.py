"""`captioned_shapes`: drawn images with captions and label maps, for conditions whose effect can be measured exactly.

Each image has one shape with five attributes; radius, position and rotation vary a little within them. Image i only
depends on the seed and on i. Each run of 8 images has all shapes, and each block of images has every combination of
the attributes once. The combinations of colour and shape in `UNSEEN` are only drawn on request.

Axes: n images, h and w pixels.
"""

from itertools import product

import numpy as np

from twostage.core.data.shapes import CLASS_NAMES, paint, shape_cover

__all__ = [
    "ATTRIBUTES",
    "COLOURS",
    "GROUNDS",
    "MAP_NAMES",
    "MAX_TURN",
    "RADII",
    "TURNS",
    "UNSEEN",
    "caption_shapes",
    "draw_captioned_shapes",
    "place_centres",
    "shape_attributes",
]

COLOURS = {
    "red": (214, 39, 40),
    "yellow": (245, 185, 20),
    "green": (46, 150, 60),
    "turquoise": (30, 195, 195),
    "blue": (45, 85, 215),
    "pink": (240, 110, 190),
}
GROUNDS = {"white": (250, 250, 250), "black": (22, 22, 26), "grey": (132, 132, 138), "beige": (230, 208, 165)}
RADII = {"small": (0.18, 0.195), "large": (0.265, 0.285)}
"""The smallest and the largest radius of each size, as shares of the image's shorter side."""
PLACES = {
    "top left": (0, 0),
    "top right": (1, 0),
    "bottom left": (0, 1),
    "bottom right": (1, 1),
    "centre": (0.5, 0.5),
}
"""0 is left and top, 1 is right and bottom."""
ATTRIBUTES: dict[str, list[str]] = {
    "shape": CLASS_NAMES,
    "colour": list(COLOURS),
    "size": list(RADII),
    "place": list(PLACES),
    "ground": list(GROUNDS),
}
"""The values of each attribute; an image's attribute is an index into them."""
UNSEEN = {
    ("red", "star"),
    ("yellow", "crescent"),
    ("yellow", "square"),
    ("green", "heart"),
    ("turquoise", "triangle"),
    ("blue", "ring"),
    ("blue", "cross"),
    ("pink", "circle"),
}
"""Combinations of colour and shape for held-out images only: one of each shape, one or two of each colour."""
MAP_NAMES = ["ground", *CLASS_NAMES]
"""The classes of a map's pixels."""
MARGIN = 0.32
"""The distance of a corner's shapes from the edges, from their centre, as a share of the shorter side."""
SHIFT = 0.02
"""The largest distance from a place along each axis, as a share of the shorter side."""
TURNS = {"triangle": np.pi, "star": -np.pi / 2}
"""Rotations, in radians, that let these shapes point upwards."""
MAX_TURN = np.pi / 15  # from there in both directions

_DRAWS = 5  # random numbers per image: its turn in the block, radius, x, y, rotation
_AT_ONCE = 512  # images drawn together


def _combinations(unseen: bool) -> np.ndarray:
    """The combinations of all attributes: (shapes, combinations of the others, attributes) int64."""
    found = [
        combination
        for combination in product(*(range(len(values)) for values in ATTRIBUTES.values()))
        if ((ATTRIBUTES["colour"][combination[1]], CLASS_NAMES[combination[0]]) in UNSEEN) == unseen
    ]
    return np.array(found).reshape(len(CLASS_NAMES), -1, len(ATTRIBUTES))


def _describe(start: int, count: int, seed: int, unseen: bool) -> tuple[np.ndarray, np.ndarray]:
    """What images from ``start`` on show: attributes (count, 5), and variation (count, 4) in [0, 1)."""
    combinations = _combinations(unseen)
    shapes, others, _ = combinations.shape
    block = shapes * others
    firsts = range(start - start % block, start + count, block)
    attributes = np.empty((len(firsts), others, shapes, len(ATTRIBUTES)), dtype=np.int64)
    draws = np.empty((len(firsts), others, shapes, _DRAWS), dtype=np.float32)
    for i, first in enumerate(firsts):
        draws[i] = np.random.Generator(np.random.Philox(key=[seed, first])).random(draws[i].shape, dtype=np.float32)
        attributes[i] = combinations[np.arange(shapes), draws[i, ..., 0].argsort(axis=0, kind="stable")]
    rows = slice(start % block, start % block + count)
    return attributes.reshape(-1, len(ATTRIBUTES))[rows], draws.reshape(-1, _DRAWS)[rows, 1:]


def shape_attributes(start: int, count: int, seed: int = 0, unseen: bool = False) -> dict[str, np.ndarray]:
    """What images ``start`` ... ``start + count - 1`` show; the shape of image i is ``i % len(CLASS_NAMES)``.

    Args:
        unseen: draw the combinations in `UNSEEN` only, instead of all others.

    Returns:
        (count,) int64 by the name of the attribute, indices into its `ATTRIBUTES`.
    """
    return dict(zip(ATTRIBUTES, _describe(start, count, seed, unseen)[0].T, strict=True))


def draw_captioned_shapes(
    start: int, count: int, size: tuple[int, int], channels: int, seed: int = 0, unseen: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the images that :func:`shape_attributes` describes, and their label maps.

    Args:
        size: (height, width).
        channels: 3, or 4 with opaque alpha.

    Returns:
        Pixels (count, channels, H, W) uint8, and maps (count, H, W) uint8 of indices into `MAP_NAMES`.
    """
    attributes, variation = _describe(start, count, seed, unseen)
    pixels = np.empty((count, channels, *size), dtype=np.uint8)
    maps = np.empty((count, *size), dtype=np.uint8)
    for first in range(0, count, _AT_ONCE):
        for label, shape in enumerate(CLASS_NAMES):
            rows = first + np.flatnonzero(attributes[first : first + _AT_ONCE, 0] == label)
            cover = _cover(shape, attributes[rows], variation[rows], size)
            ink, ground = (_rgb(palette)[attributes[rows, i]] for palette, i in ((COLOURS, 1), (GROUNDS, 4)))
            pixels[rows] = paint(cover, ink, ground, channels)
            maps[rows] = np.where(cover > 0.5, 1 + label, 0)
    return pixels, maps


def _cover(shape: str, attributes: np.ndarray, variation: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    _, _, extent, place, _ = attributes.T
    smallest, largest = np.array(list(RADII.values()), dtype=np.float32)[extent].T
    u = variation.T
    radius = min(size) * (smallest + (largest - smallest) * u[0])
    x, y = place_centres(size)[place].T + min(size) * SHIFT * (2 * u[1:3] - 1)
    turn = TURNS.get(shape, 0) + MAX_TURN * (2 * u[3] - 1)
    return shape_cover(shape, radius, (x, y), turn, size)


def place_centres(size: tuple[int, int]) -> np.ndarray:
    """The centre of each place in images of ``size`` (height, width): (places, 2) float32, x and y in pixels."""
    sides = np.array([size[1], size[0]], dtype=np.float32)
    margin = MARGIN * min(size)
    return (margin + np.array(list(PLACES.values())) * (sides - 2 * margin)).astype(np.float32)


def _rgb(palette: dict[str, tuple[int, int, int]]) -> np.ndarray:
    return np.array(list(palette.values()), dtype=np.float32) / 255


def caption_shapes(attributes: dict[str, np.ndarray]) -> list[tuple[str, ...]]:
    """The captions of each image, all with the same meaning, from :func:`shape_attributes`."""
    values = [np.array(ATTRIBUTES[name])[found].tolist() for name, found in attributes.items()]
    return [_captions(*words) for words in zip(*values, strict=True)]


def _captions(shape: str, colour: str, size: str, place: str, ground: str) -> tuple[str, ...]:
    where = f"in the {place}" if place == "centre" else f"at the {place}"
    corner = f"in the {place}" if place == "centre" else f"in the {place} corner"
    return (
        f"a {size} {colour} {shape} {where}, on {ground}",
        f"a {size} {colour} {shape} {corner} of a {ground} image",
        f"on a {ground} ground, a {colour} {shape}, {size}, {where}",
        f"{colour} {shape}, {size}, {place}, {ground} ground",
    )
