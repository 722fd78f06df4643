"""The meaning of the numbers in an image file: the range from black to white, and the values that occur."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from twostage.core.images.arrays import ArrayImage, OpenedImage

__all__ = [
    "HALVED",
    "WIDENED",
    "UsedValues",
    "ValueRange",
    "described_mode",
    "fit_in_8_bits",
    "is_grey",
    "is_wide",
    "pixel_values",
    "scaled_to_bits",
    "value_type",
    "white_is_zero",
]

ValueRange = tuple[float, float]
"""The values of black and of white."""

BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
UNSIGNED, SIGNED = 1, 2
MIN_USED_SHARE = 0.3
"""If all images use less of their range, they were probably meant for another range."""
WIDENED = 257
"""A shade of 8 bits as one of 16: 255 times this is 65,535."""
HALVED = " (16 bits, read as 8)"
TOLERANCE = 0.01
"""Share of the range: floats outside by less (resizing produces them) are clipped without a warning."""


def is_grey(mode: str) -> bool:
    """Whether images of this mode, see :func:`described_mode`, have no colour: `1`, `L`, `LA`, `F`, and all kinds of
    `I`."""
    mode = mode.removesuffix(HALVED)
    return mode in ("1", "L", "LA", "La", "F") or mode.startswith("I")


def described_mode(image: OpenedImage) -> str:
    """Pillow's mode, with :data:`HALVED` if Pillow only reads 8 of the 16 bits of each colour."""
    tiles = getattr(image, "tile", None) or []
    return image.mode + HALVED * (not is_wide(image) and any(";16" in str(tile[3]) for tile in tiles))


def is_wide(image: OpenedImage) -> bool:
    """Whether its pixels are not 8-bit numbers that Pillow knows, but 12, 16 or 32 bits or floats, of which Pillow only
    has grey ones, or any number of channels."""
    if isinstance(image, ArrayImage):
        return True
    return image.mode == "F" or image.mode.startswith("I")


def value_type(image: OpenedImage) -> tuple[str, ValueRange]:
    """The type of the file's values, such as `16-bit`, and the range of that type (0 to 1 for floats)."""
    if isinstance(image, ArrayImage):
        return _array_type(image.values.dtype)
    if not is_wide(image):
        return "8-bit", (0, 255)
    if image.mode == "F":
        return "float", (0, 1)
    bits, signed = (16, False) if image.mode.startswith("I;16") else (32, True)
    if tags := getattr(image, "tag_v2", None):
        bits = int(tags.get(BITS_PER_SAMPLE, (bits,))[0])
        signed = tags.get(SAMPLE_FORMAT, (UNSIGNED,))[0] == SIGNED
    elif image.format == "PNG":
        bits, signed = 16, False
    return _integers(bits, signed)


def _array_type(kind: np.dtype[Any]) -> tuple[str, ValueRange]:
    return ("float", (0, 1)) if kind.kind == "f" else _integers(8 * kind.itemsize, kind.kind == "i")


def _integers(bits: int, signed: bool) -> tuple[str, ValueRange]:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return f"{'signed ' if signed else ''}{bits}-bit", (low, high)


def pixel_values(image: OpenedImage, kind: str) -> np.ndarray:
    """The values in the file of a wide image, (H, W) or (H, W, C) float64; ``kind`` is the type from
    :func:`value_type`."""
    values = image.values if isinstance(image, ArrayImage) else np.asarray(image)
    if kind == "32-bit" and values.dtype == np.int32:
        values = values.view(np.uint32)  # Pillow reads them as signed numbers
    return values.astype(np.float64)


def white_is_zero(image: OpenedImage) -> bool:
    """Whether 0 is white in a wide image; Pillow only inverts 8-bit images itself."""
    return is_wide(image) and getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0


def scaled_to_bits(values: np.ndarray, value_range: ValueRange, bits: int) -> np.ndarray:
    """Values (...) as uint8 or uint16: the range is mapped to 0 ... 2^bits - 1, values outside are clipped, NaN becomes
    0."""
    low, high, white = *value_range, 2**bits - 1
    scaled = (values.astype(np.float64) - low) * (white / (high - low))
    clipped = np.nan_to_num(scaled, nan=0.0, posinf=white, neginf=0.0).clip(0, white)
    return clipped.round().astype(np.uint8 if bits == 8 else np.uint16)


def fit_in_8_bits(values: np.ndarray, value_range: ValueRange) -> bool:
    """Whether 8 bits hold the values (...) as exactly as 16 do, as for numbers of 8 bits that are stored as floats."""
    return not (scaled_to_bits(values, value_range, 16) % WIDENED).any()


@dataclass
class UsedValues:
    """The values that occur in images of one type."""

    type_range: ValueRange
    images: int = 0
    low: float = float("inf")
    high: float = float("-inf")
    not_finite: int = 0
    """The number of images with NaN or infinite pixels."""
    deep: bool = False
    """Whether 8 bits cannot hold them exactly."""

    def add(self, other: "UsedValues") -> None:
        """Add the images of ``other``."""
        self.images += other.images
        self.not_finite += other.not_finite
        self.deep |= other.deep
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def one_shade(self, value_range: ValueRange | None) -> bool:
        """Whether values of more than 8 bits differ, but by less than one of the 256 shades."""
        low, high = value_range or self.type_range
        return self.type_range != (0, 255) and 0 < self.high - self.low < (high - low) / 256

    def low_contrast(self, value_range: ValueRange | None) -> bool:
        """Whether the images use a small part of their range, so that all look dark, bright or flat."""
        low, high = value_range or self.type_range
        return self.high > self.low and min(self.high, high) - max(self.low, low) < MIN_USED_SHARE * (high - low)

    def outside(self, value_range: ValueRange | None) -> bool:
        """Whether values are outside the range and will be clipped."""
        low, high = value_range or self.type_range
        margin = TOLERANCE * (high - low)
        return self.high > high + margin or self.low < low - margin
