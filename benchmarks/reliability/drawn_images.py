"""A folder of images for the harness."""

from pathlib import Path

from PIL import Image

from twostage.core.data.shapes import draw_shapes

__all__ = ["draw_images"]


def draw_images(folder: Path, count: int, side: int = 32) -> Path:
    """Write RGB PNGs of shapes, one folder per class."""
    for i, pixels in enumerate(draw_shapes(0, count, (side, side), 3, 0)):
        file = folder / f"class_{i % 8}" / f"{i:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(file)
    return folder
