"""Generated images on disk: one PNG per image, or parquet shards. Both know which images are there and intact, so a
stopped command only makes the missing ones."""

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from twostage.core.errors import InputError
from twostage.core.files import replacing
from twostage.core.images.conversion import image_to_uint8, to_pil
from twostage.core.images.sheets import save_image

__all__ = [
    "FileFormat",
    "ImageFiles",
    "ParquetShards",
    "PngFiles",
    "check_new_folder",
    "check_output_file",
    "write_images",
]

FileFormat = Literal["png", "parquet"]
SHARD_IMAGES = 1000


@dataclass(frozen=True)
class PngFiles:
    """000000.png, 000001.png ..."""

    folder: Path
    image_size: tuple[int, int]
    channels: int

    def missing(self, num_images: int) -> list[int]:
        """Files that are missing, damaged, or of another size."""
        return [i for i in range(num_images) if not _is_intact(self._file(i), self.image_size)]

    def part_size(self, batch_size: int) -> int:
        """A batch. If any of its images is missing, the whole batch is drawn again: in a batch of another size, the
        last bits of matrix products can differ, which can, very rarely, change a code."""
        return batch_size

    def write(self, part: range, pixels: Tensor, labels: list[int] | None) -> None:
        """One file per image; the labels are in settings.json."""
        for number, image in zip(part, pixels, strict=True):
            if not _is_intact(self._file(number), self.image_size):
                save_image(to_pil(image), self._file(number))

    def read(self, count: int) -> Tensor:
        """Decodes the first files."""
        return _decoded([self._file(number) for number in range(count)], self.image_size, self.channels)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.png"


@dataclass(frozen=True)
class ParquetShards:
    """shard_00000.parquet ... with 1,000 images each (PNG bytes, and the class if there are any), which Hugging Face
    datasets and `data.source` can read."""

    folder: Path
    image_size: tuple[int, int]
    channels: int
    class_names: list[str] | None

    def missing(self, num_images: int) -> list[int]:
        """All images of each shard that is missing, damaged or too short."""
        shards = [range(start, min(start + SHARD_IMAGES, num_images)) for start in range(0, num_images, SHARD_IMAGES)]
        return [number for shard in shards if not self._is_intact(shard) for number in shard]

    def part_size(self, batch_size: int) -> int:
        """A shard."""
        return SHARD_IMAGES

    def write(self, part: range, pixels: Tensor, labels: list[int] | None) -> None:
        """A shard."""
        import datasets  # takes a second

        columns: dict[str, list[Any]] = {"image": [{"bytes": _png(image), "path": None} for image in pixels]}
        features = datasets.Features({"image": datasets.Image()})
        if labels is not None and self.class_names:
            columns["label"] = labels
            features["label"] = datasets.ClassLabel(names=self.class_names)
        file = self._file(part)
        with replacing(file) as partial:
            pq.write_table(pa.Table.from_pydict(columns, features.arrow_schema), partial)

    def read(self, count: int) -> Tensor:
        """Decodes the first images."""
        shards = (self._stored_images(range(start, start + 1)) for start in itertools.count(0, SHARD_IMAGES))
        files = itertools.islice(itertools.chain.from_iterable(shards), count)
        return _decoded([io.BytesIO(file) for file in files], self.image_size, self.channels)

    def _stored_images(self, part: range) -> list[bytes]:
        return [image["bytes"] for image in pq.read_table(self._file(part), columns=["image"])["image"].to_pylist()]

    def _file(self, part: range) -> Path:
        return self.folder / f"shard_{part.start // SHARD_IMAGES:05d}.parquet"

    def _is_intact(self, part: range) -> bool:
        try:
            images = self._stored_images(part)
        except (OSError, pa.ArrowException, KeyError, TypeError):  # missing, or not a shard
            return False
        return len(images) >= len(part) and all(_is_intact(io.BytesIO(file), self.image_size) for file in images)


ImageFiles = PngFiles | ParquetShards


def _png(image: Tensor) -> bytes:
    file = io.BytesIO()
    to_pil(image).save(file, format="PNG")
    return file.getvalue()


def _is_intact(file: Path | io.BytesIO, image_size: tuple[int, int]) -> bool:
    try:
        with Image.open(file) as image:
            image.load()
            return image.size == image_size[::-1]
    except (OSError, SyntaxError, ValueError):  # missing, or what Pillow raises for a broken PNG
        return False


def _decoded(files: Sequence[Path | io.BytesIO], image_size: tuple[int, int], channels: int) -> Tensor:
    images = []
    for file in files:
        with Image.open(file) as image:
            images.append(image_to_uint8(image, image_size, channels))
    return torch.from_numpy(np.stack(images))


def check_new_folder(out: Path) -> None:
    """Refuses a folder that is not empty, so that nothing is overwritten."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: already exists and is not empty. Choose a new folder, or remove this one")


def check_output_file(out: Path, images: list[Path]) -> None:
    """Refuses to write an image over a folder or over one of the ``images`` that it is made from."""
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder; expected a file, such as {out / 'images.png'}")
    if any(image.resolve() == out.resolve() for image in images):
        raise InputError(f"--out {out}: is one of the images given with --image. Choose another file")


def write_images(out: Path, images: Tensor) -> None:
    """Writes images (n, C, H, W) uint8 as ``out``/000000.png ..."""
    for number, image in enumerate(images):
        save_image(to_pil(image), out / f"{number:06d}.png")
