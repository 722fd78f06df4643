"""How fast do photographs of 2,000 pixels become training batches?

python -m benchmarks.reading [--images 200] [--image-size 256] [--repeats 5] [--json FILE]

Draws that many photographs (2,000 x 1,500 pixels, noise with the spectrum of natural images, JPEG at quality 90) into a
temporary folder. Then each row reads all of them once, in a random order and in batches of 64, to uint8 squares. The
peer is torchvision's `ImageFolder` (resize, crop at the centre) in a `DataLoader` with a worker for each core.

- `first start`: opening the folder, which decodes every image once into memory and into the cache on disk.
- `second start`: the same again, from the cache.
- `on demand`: a set that is larger than `data.in_memory_gb`, whose batches are decoded when they are needed.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.reporting import alternate, compared, parser, report
from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images
from twostage.core.data.image_data import ImageSplit
from twostage.core.machine.processes import share_cores

BATCH_SIZE, HEIGHT, WIDTH = 64, 1500, 2000


def draw_photographs(folder: Path, count: int) -> None:
    """RGB noise whose amplitude falls with the inverse of the frequency, as in natural images."""
    rows, columns = np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)
    falloff = 1 / np.maximum(np.hypot(rows, columns), 1 / WIDTH)
    for i in range(count):
        noise = np.random.default_rng(i).standard_normal((3, *falloff.shape, 2)) @ [1, 1j]
        waves = np.fft.irfft2(noise * falloff, s=(HEIGHT, WIDTH))
        pixels = 128 + 50 * waves / waves.std()
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
        file = folder / "train" / str(i % 2) / f"{i:06}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file, quality=90)


def read_all(split: ImageSplit) -> None:
    """Every image once, in batches."""
    for rows in torch.randperm(len(split)).split(BATCH_SIZE):
        split.read(rows)


def readers(folder: Path, cache: Path, size: int) -> dict[str, Callable[[], object]]:
    """One function for each row, and the peer."""
    config = DataConfig(source=str(folder), image_size=size, validation_share=0.01)
    on_demand = load_images(config.model_copy(update={"in_memory_gb": 0.0})).splits["train"]
    transform = v2.Compose([v2.PILToTensor(), v2.Resize(size, antialias=True), v2.CenterCrop(size)])
    peer = DataLoader(
        ImageFolder(folder / "train", transform), BATCH_SIZE, shuffle=True, num_workers=os.cpu_count() or 1
    )

    def first_start() -> None:
        for file in (cache / "twostage").rglob("*.*"):
            file.unlink()
        read_all(load_images(config).splits["train"])

    return {
        "peer": lambda: [batch for batch, _ in peer],
        "first start": first_start,
        "second start": lambda: read_all(load_images(config).splits["train"]),
        "on demand": lambda: read_all(on_demand),
    }


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--images", type=int, default=200)
    arguments.add_argument("--image-size", type=int, default=256)
    arguments.add_argument("--repeats", type=int, default=5)
    options = arguments.parse_args()
    share_cores()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        draw_photographs(Path(folder), options.images)
        seconds = alternate(readers(Path(folder), Path(cache), options.image_size), options.repeats)
    peer = seconds.pop("peer")
    rows = [compared(name, ours, peer) for name, ours in seconds.items()]
    rows = [row | {"images_per_s": options.images / row["ours_s"]} for row in rows]
    report({"images": options.images, "image_size": options.image_size, "batch_size": BATCH_SIZE}, rows, options.json)


if __name__ == "__main__":
    main()
