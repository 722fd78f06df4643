"""Cut the benchmarks' contact sheets into the strips of `concepts.md`: one image per model, docs/images/strips/.

python docs/make_strips.py
"""

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from twostage.core.images.sheets import MARGIN, save_image

__all__ = ["strips"]

IMAGES = Path(__file__).parent / "images"
ROW = 84 + MARGIN  # pixels: a digit, enlarged three times
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
    "quantizers_mnist": (
        ROW,
        {name: [0, row] for row, name in enumerate(["pq", "gumbel", "bsq", "ibq", "diveq", "fvq"], 2)},
    ),
    "priors_mnist": (ROW + 18, {"pixelcnn": [0, 1, 2], "gpt": [3, 4, 5], "maskgit": [6, 7, 8]}),
}
"""For each contact sheet: the height of its rows in pixels, with captions, and the rows of each strip."""


def strips() -> Iterator[tuple[Path, Image.Image]]:
    """Each strip's file and the image that belongs in it."""
    for sheet, (height, rows_of) in STRIPS.items():
        with Image.open(IMAGES / f"{sheet}.png") as image:
            for name, rows in rows_of.items():
                strip = Image.new("RGB", (image.width, MARGIN + height * len(rows)), "white")
                for place, row in enumerate(rows):
                    top = MARGIN + row * height
                    strip.paste(image.crop((0, top, image.width, top + height)), (0, MARGIN + place * height))
                yield IMAGES / "strips" / f"{name}.png", strip


if __name__ == "__main__":
    for file, strip in strips():
        save_image(strip, file)
