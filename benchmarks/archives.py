"""How fast are images in a tar file, read in place, compared with the same images in a folder?

python -m benchmarks.archives [--images 100000] [--repeats 3] [--json FILE]

Writes JPEG images (64 pixels a side, with a class each) as one WebDataset shard (`0000001.jpg`, `0000001.cls`), and as
files in a folder for each class. Both are opened once, which checks every image and fills the cache. The
set counts as larger than `data.in_memory_gb`. Ours is the tar file, the peer is the folder:

- `second start`: opening the set until its first training batch (64 images) is read.
- `on demand`: 4,096 images in a random order, in batches of 64.
"""

import io
import os
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.reporting import alternate, compared, parser, report
from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images
from twostage.core.data.image_data import ImageSplit
from twostage.core.machine.processes import share_cores

SIDE, CLASSES, DIFFERENT, BATCH_SIZE, MEASURED = 64, 10, 200, 64, 4096


def draw_images() -> list[bytes]:
    """JPEG files of smooth noise."""
    files = []
    for i in range(DIFFERENT):
        coarse = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def write_sets(root: Path, count: int) -> dict[str, Path]:
    """The same images as a tar file and as a folder."""
    images = draw_images()
    for label in range(CLASSES):
        (root / "folder" / str(label)).mkdir(parents=True)
    with tarfile.open(root / "shard-000000.tar", "w") as tar:
        for i in range(count):
            image, label = images[i % DIFFERENT], i % CLASSES
            (root / "folder" / str(label) / f"{i:07}.jpg").write_bytes(image)
            for suffix, content in (("jpg", image), ("cls", str(label).encode())):
                info = tarfile.TarInfo(f"{i:07}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return {"tar": root / "shard-000000.tar", "folder": root / "folder"}


def read_some(split: ImageSplit, count: int) -> None:
    """Images in a random order, in batches."""
    for rows in torch.randperm(len(split))[:count].split(BATCH_SIZE):
        split.read(rows)


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--images", type=int, default=100_000)
    arguments.add_argument("--repeats", type=int, default=3)
    options = arguments.parse_args()
    share_cores()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        sets = write_sets(Path(folder), options.images)
        configs = {name: DataConfig(source=str(path), image_size=SIDE, in_memory_gb=0.0) for name, path in sets.items()}
        opened = {name: load_images(config).splits["train"] for name, config in configs.items()}
        assert len(opened["tar"]) == len(opened["folder"])
        assert all(split.labels is not None for split in opened.values())
        runs: dict[str, Callable[[], object]] = {}
        for name, config in configs.items():
            runs[f"{name} start"] = lambda config=config: read_some(load_images(config).splits["train"], BATCH_SIZE)
            runs[f"{name} read"] = lambda name=name: read_some(opened[name], MEASURED)
        seconds = alternate(runs, options.repeats)
    rows = [
        compared("second start", seconds["tar start"], seconds["folder start"]),
        compared("on demand", seconds["tar read"], seconds["folder read"]),
    ]
    report({"images": options.images, "side": SIDE, "batch_size": BATCH_SIZE, "measured": MEASURED}, rows, options.json)


if __name__ == "__main__":
    main()
