"""Generated images on disk: a file for each image, or parquet shards. Both know which images are there and intact, so a
stopped command only makes the missing ones.

Nothing is lost: images are PNG files, or TIFF files with a page for each channel if PNG has no such images."""

import io
import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from twostage.core.errors import InputError
from twostage.core.files import replacing
from twostage.core.images.arrays import num_pages
from twostage.core.images.conversion import image_to_pixels, is_pillow_form, to_pil

__all__ = [
    "FileFormat",
    "ImageFiles",
    "ImageForm",
    "NumberedFiles",
    "ParquetShards",
    "check_new_folder",
    "check_output_file",
    "write_images",
]

FileFormat = Literal["png", "parquet"]
SHARD_IMAGES = 1000


@dataclass(frozen=True)
class ImageForm:
    """The size, channels and bits of images, and so the format of their files."""

    size: tuple[int, int]
    """(height, width)."""
    channels: int
    bits: int = 8

    @property
    def suffix(self) -> str:
        """`.png`, or `.tif` for images that PNG cannot hold."""
        return ".png" if is_pillow_form(self.channels, self.bits) else ".tif"

    def encode(self, image: Tensor) -> bytes:
        """The content of the file of an image (C, H, W)."""
        file = io.BytesIO()
        if self.suffix == ".png":
            to_pil(image).save(file, format="PNG")
        else:
            first, *others = (to_pil(channel) for channel in image.split(1))
            first.save(file, format="TIFF", save_all=True, append_images=others, compression="tiff_adobe_deflate")
        return file.getvalue()

    def decode(self, file: Path | io.BytesIO) -> np.ndarray:
        """The image (C, H, W) in a file that :meth:`encode` wrote."""
        with Image.open(file) as image:
            return image_to_pixels(image, self.size, self.channels, bits=self.bits)

    def is_intact(self, file: Path | io.BytesIO) -> bool:
        """Whether the file holds an image of this form."""
        try:
            with Image.open(file) as image:
                for page in ImageSequence.Iterator(image):
                    page.load()
                return image.size == self.size[::-1] and num_pages(image) == (
                    self.channels if self.suffix == ".tif" else 1
                )
        except Exception:  # missing, or broken: decoders of TIFF raise many types
            return False


@dataclass(frozen=True)
class NumberedFiles:
    """000000.png, 000001.png ..., see :attr:`ImageForm.suffix`."""

    folder: Path
    form: ImageForm

    def missing(self, num_images: int) -> list[int]:
        """Files that are missing, damaged, or of another size."""
        return [i for i in range(num_images) if not self.form.is_intact(self._file(i))]

    def part_size(self, batch_size: int) -> int:
        """A batch. If any of its images is missing, the whole batch is drawn again: in a batch of another size, the
        last bits of matrix products can differ, which can, very rarely, change a code."""
        return batch_size

    def write(self, part: range, pixels: Tensor, labels: list[int] | None) -> None:
        """One file per image; the labels are in settings.json."""
        missing = [place for place, number in enumerate(part) if not self.form.is_intact(self._file(number))]
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(lambda place: self.write_one(part[place], pixels[place]), missing))

    def write_one(self, number: int, image: Tensor) -> None:
        """Write an image (C, H, W); other processes never see half of it."""
        with replacing(self._file(number)) as partial:
            partial.write_bytes(self.form.encode(image))

    def read(self, count: int) -> Tensor:
        """Decodes the first files."""
        return torch.from_numpy(np.stack([self.form.decode(self._file(number)) for number in range(count)]))

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}{self.form.suffix}"


@dataclass(frozen=True)
class ParquetShards:
    """shard_00000.parquet ... with 1,000 images each (encoded, and the class if there are any), which Hugging Face
    datasets and `data.source` can read."""

    folder: Path
    form: ImageForm
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

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            encoded = pool.map(self.form.encode, pixels)
            columns: dict[str, list[Any]] = {"image": [{"bytes": each, "path": None} for each in encoded]}
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
        return torch.from_numpy(np.stack([self.form.decode(io.BytesIO(file)) for file in files]))

    def _stored_images(self, part: range) -> list[bytes]:
        return [image["bytes"] for image in pq.read_table(self._file(part), columns=["image"])["image"].to_pylist()]

    def _file(self, part: range) -> Path:
        return self.folder / f"shard_{part.start // SHARD_IMAGES:05d}.parquet"

    def _is_intact(self, part: range) -> bool:
        try:
            images = self._stored_images(part)
        except (OSError, pa.ArrowException, KeyError, TypeError):  # missing, or not a shard
            return False
        return len(images) >= len(part) and all(self.form.is_intact(io.BytesIO(file)) for file in images)


ImageFiles = NumberedFiles | ParquetShards


def check_new_folder(out: Path, option: str = "--out") -> None:
    """Refuses a folder that is not empty, so that nothing is overwritten."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{option} {out}: already exists and is not empty. Choose a new folder, or remove this one")


def check_output_file(out: Path, images: list[Path]) -> None:
    """Refuses to write an image over a folder or over one of the ``images`` that it is made from."""
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder; expected a file, such as {out / 'images.png'}")
    if any(image.resolve() == out.resolve() for image in images):
        raise InputError(f"--out {out}: is one of the images given with --image. Choose another file")


def write_images(out: Path, images: Tensor) -> None:
    """Writes images (n, C, H, W) uint8 or uint16 as ``out``/000000.png ..., see :class:`NumberedFiles`."""
    out.mkdir(parents=True, exist_ok=True)
    height, width = images.shape[2:]
    files = NumberedFiles(out, ImageForm((height, width), images.shape[1], 8 * images.element_size()))
    for number, image in enumerate(images):
        files.write_one(number, image)
