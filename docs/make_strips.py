"""Cuts the benchmarks' contact sheets into the strips of `concepts.md`: one picture a model, docs/images/strips/.

python docs/make_strips.py
"""

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from twostage.core.images.sheets import MARGIN, save_image

__all__ = ["strips"]

IMAGES = Path(__file__).parent / "images"
ROW = 84 + MARGIN  # pixels: a digit, three times enlarged
STRIPS = {
    "families_mnist": (
        ROW,
        {
            "ae": [0, 1],
            "dae": [0, 2],
            "vae": [0, 3, 11],
            "beta_vae": [0, 4, 12],
            "cvae": [0, 5, 13],
            "vqvae": [0, 6],
            "fsq": [0, 7],
            "lfq": [0, 8],
            "rvq": [0, 9],
        },
    ),
    "priors_mnist": (ROW + 18, {"pixelcnn": [0, 1, 2], "gpt": [3, 4, 5], "maskgit": [6, 7, 8]}),
}
"""By contact sheet: the height of its rows in pixels, captions included, and the rows of each strip."""


def strips() -> Iterator[tuple[Path, Image.Image]]:
    """Each strip's file and what belongs into it."""
    for sheet, (height, rows_of) in STRIPS.items():
        with Image.open(IMAGES / f"{sheet}.png") as picture:
            for name, rows in rows_of.items():
                strip = Image.new("RGB", (picture.width, MARGIN + height * len(rows)), "white")
                for place, row in enumerate(rows):
                    top = MARGIN + row * height
                    strip.paste(picture.crop((0, top, picture.width, top + height)), (0, MARGIN + place * height))
                yield IMAGES / "strips" / f"{name}.png", strip


if __name__ == "__main__":
    for file, strip in strips():
        save_image(strip, file)
