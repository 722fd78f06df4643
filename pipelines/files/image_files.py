"""The images that `generate` writes: one PNG each, or shards of parquet. Both know what is there already and whole, so
that a command that was stopped makes only what is missing."""

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from twostage.core.files import replacing
from twostage.core.images.conversion import image_to_uint8, to_pil
from twostage.core.images.sheets import save_image

__all__ = ["FileFormat", "ImageFiles", "ParquetShards", "PngFiles", "image_files"]

FileFormat = Literal["png", "parquet"]
SHARD = 1000  # images


class ImageFiles(Protocol):
    """Images 0, 1, 2 ... in a folder."""

    def missing(self, num_images: int) -> list[int]:
        """Which of the first images are not there, or not whole."""
        ...

    def part_size(self, batch_size: int) -> int:
        """How many images are written at once."""
        ...

    def write(self, part: range, pixels: Tensor, labels: list[int] | None) -> None:
        """Writes the images of a part, (n, C, H, W) uint8, so that a reader finds whole files only; what is there
        already stays."""
        ...

    def read(self, count: int) -> Tensor:
        """The first ``count`` images, (count, C, H, W) uint8."""
        ...


def image_files(
    file_format: FileFormat, folder: Path, image_size: tuple[int, int], channels: int, class_names: list[str] | None
) -> ImageFiles:
    """The images in ``folder`` in that format."""
    if file_format == "png":
        return PngFiles(folder, image_size, channels)
    return ParquetShards(folder, image_size, channels, class_names)


@dataclass(frozen=True)
class PngFiles:
    """000000.png, 000001.png ..."""

    folder: Path
    image_size: tuple[int, int]
    channels: int

    def missing(self, num_images: int) -> list[int]:
        """Those that are missing, damaged, or of another size."""
        return [i for i in range(num_images) if not _is_whole(self._file(i), self.image_size)]

    def part_size(self, batch_size: int) -> int:
        """A batch. It is drawn again as a whole where any of it is missing: in a batch of another size the last bits
        of matrix products may differ, and so, now and then, a code."""
        return batch_size

    def write(self, part: range, pixels: Tensor, labels: list[int] | None) -> None:
        """A file each; labels are in settings.json."""
        for number, image in zip(part, pixels, strict=True):
            if not _is_whole(self._file(number), self.image_size):
                save_image(to_pil(image), self._file(number))

    def read(self, count: int) -> Tensor:
        """Decodes the first files."""
        return _decoded([self._file(number) for number in range(count)], self.image_size, self.channels)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.png"


@dataclass(frozen=True)
class ParquetShards:
    """shard_00000.parquet ... of 1,000 images each (PNG bytes, and the class where there are any), as Hugging Face
    datasets and `data.source` read them."""

    folder: Path
    image_size: tuple[int, int]
    channels: int
    class_names: list[str] | None

    def missing(self, num_images: int) -> list[int]:
        """Those of shards that are missing, damaged, or shorter than they should be."""
        shards = [range(start, min(start + SHARD, num_images)) for start in range(0, num_images, SHARD)]
        return [number for shard in shards if not self._whole(shard) for number in shard]

    def part_size(self, batch_size: int) -> int:
        """A shard."""
        return SHARD

    def write(self, part: range, pixels: Tensor, labels: list[int] | None) -> None:
        """A shard."""
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
        shards = (self._pictures(range(start, start + 1)) for start in itertools.count(0, SHARD))
        files = itertools.islice(itertools.chain.from_iterable(shards), count)
        return _decoded([io.BytesIO(file) for file in files], self.image_size, self.channels)

    def _pictures(self, part: range) -> list[bytes]:
        return [image["bytes"] for image in pq.read_table(self._file(part), columns=["image"])["image"].to_pylist()]

    def _file(self, part: range) -> Path:
        return self.folder / f"shard_{part.start // SHARD:05d}.parquet"

    def _whole(self, part: range) -> bool:
        try:
            pictures = self._pictures(part)
        except (OSError, pa.ArrowException, KeyError, TypeError):  # not there; or no shard
            return False
        return len(pictures) >= len(part) and all(_is_whole(io.BytesIO(file), self.image_size) for file in pictures)


def _png(image: Tensor) -> bytes:
    file = io.BytesIO()
    to_pil(image).save(file, format="PNG")
    return file.getvalue()


def _is_whole(file: Path | io.BytesIO, image_size: tuple[int, int]) -> bool:
    try:
        with Image.open(file) as image:
            image.load()
            return image.size == image_size[::-1]
    except (OSError, SyntaxError, ValueError):  # not there; or how Pillow says that a PNG is broken
        return False


def _decoded(files: Sequence[Path | io.BytesIO], image_size: tuple[int, int], channels: int) -> Tensor:
    images = []
    for file in files:
        with Image.open(file) as image:
            images.append(image_to_uint8(image, image_size, channels))
    return torch.from_numpy(np.stack(images))
