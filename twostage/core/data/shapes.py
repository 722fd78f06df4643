"""`shapes`: labelled images that twostage draws itself, so that training needs nothing on disk.

Each image has one anti-aliased shape; colour, size, rotation, position and background vary. Image i only depends on the
seed and on i.

Axes: n images, h and w pixels.
"""

from collections.abc import Callable

import numpy as np

__all__ = ["CLASS_NAMES", "draw_shapes", "paint", "shape_cover"]

# Signed distances (negative inside) in coordinates in which the shape fits the unit circle; formulas after
# https://iquilezles.org/articles/distfunctions2d/


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 0.88


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(x, y) - 0.72) - 0.2


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.74


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x) * 0.75**0.5 + y * 0.5, -y) - 0.52


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # Fold the plane into one of the ten half-points, then measure from the straight edge from its tip to its notch.
    sector = 2 * np.pi / 5
    angle = np.abs(np.mod(np.arctan2(y, x) + sector / 2, sector) - sector / 2)
    radius = np.hypot(x, y)
    notch = 0.42 * np.array([np.cos(sector / 2), np.sin(sector / 2)])
    normal = np.array([notch[1], 1.0 - notch[0]]) / np.hypot(notch[1], 1.0 - notch[0])
    return (radius * np.cos(angle) - 1.0) * normal[0] + radius * np.sin(angle) * normal[1]


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    long, short = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
    return np.maximum(long - 0.92, short - 0.26)


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x) * 0.66, 0.56 - y * 0.66
    lobe = np.hypot(x - 0.25, y - 0.75) - 8**-0.5
    diagonal = 0.5 * np.maximum(x + y, 0)
    point = np.minimum(np.hypot(x, y - 1), np.hypot(x - diagonal, y - diagonal)) * np.sign(x - y)
    return np.where(x + y > 1, lobe, point) / 0.66


def _crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.hypot(x, y) - 0.92, 0.74 - np.hypot(x - 0.46, y))


SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle,
    "ring": _ring,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "heart": _heart,
    "crescent": _crescent,
}
CLASS_NAMES = list(SHAPES)
_BLOCK = 512  # images whose random numbers are drawn together
_DRAWS = 8  # random numbers per image
MAX_ROTATION = np.pi / 10  # in both directions
NUM_HUES = 6  # for shapes and for backgrounds


def draw_shapes(start: int, count: int, size: tuple[int, int], channels: int, seed: int = 0) -> np.ndarray:
    """Images ``start`` ... ``start + count - 1``; the class of image i is ``i % len(CLASS_NAMES)``.

    Args:
        size: (height, width).

    Returns:
        (count, channels, H, W) uint8; see :func:`paint`.
    """
    images = np.empty((count, channels, *size), dtype=np.uint8)
    for first in range(start - start % _BLOCK, start + count, _BLOCK):
        draws = np.random.Generator(np.random.Philox(key=[seed, first])).random((_BLOCK, _DRAWS), dtype=np.float32)
        for label, shape in enumerate(CLASS_NAMES):
            rows = np.arange(first + label, first + _BLOCK, len(SHAPES))
            rows = rows[(rows >= start) & (rows < start + count)]
            if len(rows):
                images[rows - start] = _draw(shape, draws[rows - first], size, channels)
    return images


def _draw(shape: str, draws: np.ndarray, size: tuple[int, int], channels: int) -> np.ndarray:
    height, width = size
    u = draws.T  # (draws, n)
    radius = min(size) * (0.3 + 0.11 * u[0])  # in pixels
    centre = _centre(u[1], width, radius), _centre(u[2], height, radius)
    cover = shape_cover(shape, radius, centre, MAX_ROTATION * (2 * u[3] - 1), size)
    # With a small palette, a prior spends few nats on the colour and most of its capacity on the shape.
    dark = u[4] < 0.5  # a bright shape on a dark background, or the other way round
    hue, ground_hue = np.floor(u[5:7] * NUM_HUES) / NUM_HUES
    ink = _colour(hue, 0.95, np.where(dark, 0.95, 0.6))
    ground = _colour(ground_hue, np.where(dark, 0.5, 0.16) * (u[7] < 0.5), np.where(dark, 0.14, 0.96))
    return paint(cover, ink, ground, channels)


def shape_cover(
    shape: str, radius: np.ndarray, centre: tuple[np.ndarray, np.ndarray], turn: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    """The share of each pixel that a shape covers, anti-aliased.

    Args:
        shape: one of `CLASS_NAMES`.
        radius: of the circle that the shape fits into, in pixels, (n,).
        centre: of this circle: x and y in pixels, (n,) each.
        turn: in radians, (n,).
        size: (height, width).

    Returns:
        (n, H, W) in [0, 1].
    """
    height, width = size
    radius, x, y, cos, sin = (part[:, None, None] for part in (radius, *centre, np.cos(turn), np.sin(turn)))
    x = np.arange(width, dtype=np.float32)[None, None, :] + 0.5 - x
    y = np.arange(height, dtype=np.float32)[None, :, None] + 0.5 - y
    signed = SHAPES[shape]((cos * x + sin * y) / radius, (cos * y - sin * x) / radius) * radius
    return np.clip(0.5 - signed, 0, 1)


def paint(cover: np.ndarray, ink: np.ndarray, ground: np.ndarray, channels: int) -> np.ndarray:
    """Paint shapes in the colour ``ink`` (n, 3) on ``ground`` (n, 3), both RGB in [0, 1].

    Args:
        cover: see :func:`shape_cover`.

    Returns:
        (n, channels, H, W) uint8; 1 channel is the luminance, a 4th channel is opaque alpha.
    """
    cover = cover[..., None]
    rgb = (ground[:, None, None] * (1 - cover) + ink[:, None, None] * cover).transpose(0, 3, 1, 2)
    if channels == 1:
        rgb = np.tensordot(np.array([0.299, 0.587, 0.114], dtype=np.float32), rgb, axes=(0, 1))[:, None]
    pixels = np.round(rgb * 255).astype(np.uint8)
    if channels == 4:
        pixels = np.concatenate([pixels, np.full_like(pixels[:, :1], 255)], axis=1)
    return pixels


def _centre(draw: np.ndarray, side: int, radius: np.ndarray) -> np.ndarray:
    """The shape's centre along one side, somewhere in the middle, so that the shape stays inside the image."""
    return side / 2 + (draw - 0.5) * 0.7 * (side - 2 * radius)


def _colour(hue: np.ndarray, saturation: np.ndarray | float, value: np.ndarray) -> np.ndarray:
    """HSV in [0, 1], each (n,) or one number -> RGB (n, 3)."""
    k = (np.array([5, 3, 1]) + 6 * hue[:, None]) % 6
    return value[:, None] * (1 - np.reshape(saturation, (-1, 1)) * np.clip(np.minimum(k, 4 - k), 0, 1))
