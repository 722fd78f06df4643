"""What the numbers in an image file mean: the range that becomes black to white, and the range that is used."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

__all__ = [
    "UsedValues",
    "ValueRange",
    "is_grey",
    "is_wide",
    "pixel_values",
    "scaled_to_8_bits",
    "value_type",
    "white_is_zero",
]

ValueRange = tuple[float, float]
"""The lowest and the highest value: black and white."""

BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
FEW = 0.3
"""Of the range. Images of which all use less are likely of another one."""
TOLERANCE = 0.01
"""Of the range: floats that lie outside by less, as resizing makes them, are clipped without a word."""


def is_grey(mode: str) -> bool:
    """Whether images of this mode of Pillow's have no colour: `1`, `L`, `LA`, `F`, and all kinds of `I`."""
    return mode in ("1", "L", "LA", "La", "F") or mode.startswith("I")


def is_wide(image: Image.Image) -> bool:
    """Whether its pixels are not 8-bit numbers: 12, 16 and 32 bits, and floats. Pillow has them in grey only."""
    return image.mode == "F" or image.mode.startswith("I")


def value_type(image: Image.Image) -> tuple[str, ValueRange]:
    """What the file says of its values, such as `16-bit`, and their range: all that such a number can be; 0 to 1 for
    floats."""
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
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return f"{'signed ' if signed else ''}{bits}-bit", (low, high)


def pixel_values(image: Image.Image, kind: str) -> np.ndarray:
    """The values of a wide image of the type ``kind`` (`value_type`) as its file has them, (H, W) float64."""
    values = np.asarray(image)
    if kind == "32-bit":
        values = values.view(np.uint32)  # Pillow reads them as signed ones
    return values.astype(np.float64)


def white_is_zero(image: Image.Image) -> bool:
    """Whether a wide image's lowest value is white; Pillow turns round those of 8 bits only."""
    return is_wide(image) and getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0


def scaled_to_8_bits(values: np.ndarray, value_range: ValueRange) -> np.ndarray:
    """Values (...) as uint8: the range's ends become 0 and 255, what is outside is clipped, NaN becomes 0."""
    low, high = value_range
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.nan_to_num(scaled, nan=0.0, posinf=255.0, neginf=0.0).clip(0, 255).round().astype(np.uint8)


@dataclass
class UsedValues:
    """Which values occur in images of one type."""

    type_range: ValueRange
    images: int = 0
    low: float = float("inf")
    high: float = float("-inf")
    not_finite: int = 0
    """Images in which some pixels are NaN or infinite."""

    def add(self, other: "UsedValues") -> None:
        """Counts the images of ``other`` too."""
        self.images += other.images
        self.not_finite += other.not_finite
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def hidden(self, value_range: ValueRange | None) -> bool:
        """Whether values of a type other than 8 bits differ, but lie so close together that no image shows it."""
        low, high = value_range or self.type_range
        return self.type_range != (0, 255) and 0 < self.high - self.low < (high - low) / 256

    def little(self, value_range: ValueRange | None) -> bool:
        """Whether the images use little of their range, so that all are dark, bright or flat."""
        low, high = value_range or self.type_range
        return self.high > self.low and min(self.high, high) - max(self.low, low) < FEW * (high - low)

    def outside(self, value_range: ValueRange | None) -> bool:
        """Whether values lie outside of the range and are clipped."""
        low, high = value_range or self.type_range
        margin = TOLERANCE * (high - low)
        return self.high > high + margin or self.low < low - margin
