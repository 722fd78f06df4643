"""The folder in which `twostage encode` works, and from which it resumes after an interruption."""

import glob
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object

from pipelines.encoding.image_variants import ImageVariants
from stage2_prior.codes import Manifest
from stage2_prior.stored_captions import StoredCaptions
from twostage.core.config.sections import summarize_differences
from twostage.core.data.data_config import DataConfig
from twostage.core.errors import InputError
from twostage.core.files import read_json, write_json
from twostage.core.wording import one_line

__all__ = ["CHUNK", "PartialCodes", "discard_leftover"]

CHUNK = 256  # images encoded together, in all their variants

_IDENTITY = "identity.json"
_ONE_MACHINE = (
    "All processes must see each other's files. On several machines they do not: neither on separate disks, nor on "
    "most network disks. Remove this folder and encode on one machine, or give each machine a share with --shard."
)


class PartialCodes:
    """`.NAME.partial`, beside the folder NAME that it becomes.

    `codes/` becomes that folder. `SPLIT.done.npy` has a byte for each chunk of images: 1 once the rows of all their
    variants are on disk. `identity.json` describes what is encoded. Every process writes the chunks that it encodes;
    the main process writes everything else.

    All processes must run on one machine, because they write to the same mapped files. Several machines would overwrite
    each other's pages on a network disk, and would not see them at all on disks of their own. So each of several
    machines has a folder of its own, its shard.

    Args:
        final: the folder NAME.
        identity: everything that determines the codes, as JSON; only a folder with the same identity is resumed.
        splits: the images to encode.
        former: the identity as earlier versions wrote it, which is accepted too.
        shard: the share (number, of how many) of one machine, whose folder is `.NAME.shard-2-of-4`. The call without
            a shard takes over the rows of all such folders, see :meth:`begin`.
        map_codes: the grid and the type of the codes of maps; None: the maps themselves are stored.
    """

    def __init__(
        self,
        final: Path,
        identity: dict[str, Any],
        splits: dict[str, ImageVariants],
        former: dict[str, Any] | None = None,
        shard: tuple[int, int] | None = None,
        map_codes: tuple[tuple[int, int], type[np.integer]] | None = None,
    ) -> None:
        self.map_codes = map_codes
        self.final, self.splits, self.shard = final, splits, shard
        rows = {"rows": {name: split.rows for name, split in splits.items()}}
        self.identity: dict[str, Any] = rows | identity
        self.former = former and rows | former
        self.folder = _partial_folder(final, shard)
        self.codes = self.folder / "codes"
        self.identity_file = self.folder / _IDENTITY

    def begin(self, grid: tuple[int, int], dtype: type[np.integer]) -> list[str]:
        """Resume what an interrupted call left, if it was encoding the same; otherwise discard it and start. Then take
        over the rows that shards have, unless this is a shard.

        Args:
            grid: cells (h, w).
            dtype: the type of the codes.

        Returns:
            Messages that tell what was there.
        """
        begun = self._resume(grid, dtype)
        return [*([begun] if begun else []), *([] if self.shard else self._collect())]

    def _resume(self, grid: tuple[int, int], dtype: type[np.integer]) -> str | None:
        # A kill just before the last step leaves no `codes`.
        complete = self.identity_file.is_file() and self.codes.is_dir()
        stored = read_json(self.identity_file, f"remove {self.folder} and run it again") if complete else None
        if stored is not None and isinstance(stored.get("data"), dict):
            # Settings that the previous version did not have yet have their defaults.
            defaults = DataConfig().model_dump(mode="json", include=set(self.identity["data"]))
            stored["data"] = defaults | stored["data"]
        if stored is not None and stored in (self.identity, self.former):
            self._write_captions()
            total = sum(split.rows for split in self.splits.values())
            return f"{self.folder}: resuming, {sum(map(self._rows_done, self.splits)):,} of {total:,} rows are done"
        message = None
        if self.folder.exists():
            differences = summarize_differences(stored, self.identity) if stored else "incomplete"
            message = f"{self.folder}: discarded, left by an interrupted call ({differences})"
            _discard(self.folder)
        try:
            self._create_files(grid, dtype)
        except OSError as error:
            _discard(self.folder)
            raise OSError(error.errno, os.strerror(error.errno or 0), str(self.final)) from None
        return message

    def _collect(self) -> list[str]:
        """Takes over the rows that are done in the folders of shards; returns a message for each folder."""
        messages = []
        for folder in _shard_folders(self.final):
            identity = folder / _IDENTITY
            stored = read_json(identity, f"remove {folder}") if identity.is_file() else None
            if stored != self.identity:
                why = summarize_differences(stored, self.identity) if stored else "incomplete"
                messages.append(f"{folder}: not used, because it encodes something else ({why})")
                continue
            try:
                rows = sum(self._collect_split(folder, name) for name in self.splits)
                messages.append(f"{folder}: {rows:,} more rows are done there")
            except (OSError, ValueError) as error:  # an incomplete copy
                messages.append(f"{folder}: not used, because it cannot be read ({one_line(error)})")
        return messages

    def _collect_split(self, folder: Path, name: str) -> int:
        """Copies the rows of all chunks of a split that are done there and not here; returns their number."""
        images, variants = len(self.splits[name].images), self.splits[name].augmentation.variants
        there, here = np.load(folder / f"{name}.done.npy", allow_pickle=False), self.open_done(name)
        chunks = np.flatnonzero((there == 1) & (here == 0))
        for file in (f"{name}.codes.npy", f"{name}.maps.npy"):
            if not (self.codes / file).is_file():
                continue
            source = np.load(folder / "codes" / file, mmap_mode="r", allow_pickle=False)
            target = np.load(self.codes / file, mmap_mode="r+", allow_pickle=False)
            for first in [variant * images for variant in range(variants)]:
                for chunk in chunks:
                    rows = slice(first + chunk * CHUNK, first + min((chunk + 1) * CHUNK, images))
                    target[rows] = source[rows]
            target.flush()
        here[chunks] = 1
        here.flush()
        return int(np.minimum(CHUNK, images - CHUNK * chunks).sum()) * variants

    def _create_files(self, grid: tuple[int, int], dtype: type[np.integer]) -> None:
        self.codes.mkdir(parents=True)
        for name, split in self.splits.items():
            _create_array(self.codes / f"{name}.codes.npy", dtype, (split.rows, *grid))
            if (form := split.images.map_form) is not None:
                shape, kind = self.map_codes or (form, np.uint8)
                _create_array(self.codes / f"{name}.maps.npy", kind, (split.rows, *shape))
            if (labels := split.labels()) is not None:
                np.save(self.codes / f"{name}.labels.npy", labels)
            if (vectors := split.images.vectors) is not None:
                np.save(self.codes / f"{name}.vectors.npy", vectors)
        self._write_captions()
        for name, split in self.splits.items():
            np.save(self._done_file(name), np.zeros(-(-len(split.images) // CHUNK), dtype=np.uint8))
        write_json(self.identity_file, self.identity)  # last: without it, the files above are ignored

    def _write_captions(self) -> None:
        """Write the present captions, which do not change the codes: the call before this one may have had others, and
        those of earlier versions had none."""
        for name, split in self.splits.items():
            if split.images.captions is not None:
                captions = StoredCaptions.pack(split.images.captions)
                np.save(self.codes / f"{name}.captions.npy", captions.text)
                np.save(self.codes / f"{name}.caption_starts.npy", captions.starts)

    def check_shared(self) -> None:
        """Check that every process sees the folder; each calls this after the main process has begun.

        Raises:
            InputError: in every process, if one of them does not see it.
        """
        if not all(gather_object([self.identity_file.is_file()])):
            raise InputError(f"{self.folder}: not visible to all processes. {_ONE_MACHINE}")

    def open(self, name: str) -> np.memmap:
        """A split's codes, (rows, h, w), writable."""
        return np.load(self.codes / f"{name}.codes.npy", mmap_mode="r+", allow_pickle=False)

    def open_maps(self, name: str) -> np.memmap | None:
        """A split's maps, (rows, H, W) or (rows, C, H, W), or their codes, writable; None without maps."""
        if self.splits[name].images.map_form is None:
            return None
        return np.load(self.codes / f"{name}.maps.npy", mmap_mode="r+", allow_pickle=False)

    def open_done(self, name: str) -> np.memmap:
        """A byte for each chunk of a split, writable. Flush the codes and the maps of a chunk before you set it."""
        return np.load(self._done_file(name), mmap_mode="r+", allow_pickle=False)

    def finish(self, manifest: Manifest) -> None:
        """Rename it to the final folder, which is then a code cache.

        Raises:
            InputError: rows are missing, as seen by this process.
        """
        for name, split in self.splits.items():
            if missing := split.rows - self._rows_done(name):
                raise InputError(
                    f"{self.folder}: {missing:,} of {split.rows:,} rows of `{name}` are missing after every process "
                    f"wrote its share. {_ONE_MACHINE}"
                )
        write_json(self.codes / "manifest.json", manifest.model_dump(mode="json"))
        self.codes.rename(self.final)  # replaces an empty folder
        discard_leftover(self.final, self.identity["tokenizer"])

    def _done_file(self, name: str) -> Path:
        return self.folder / f"{name}.done.npy"

    def _rows_done(self, name: str) -> int:
        images, variants = len(self.splits[name].images), self.splits[name].augmentation.variants
        chunks = np.flatnonzero(np.load(self._done_file(name), allow_pickle=False))
        return int(np.minimum(CHUNK, images - CHUNK * chunks).sum()) * variants


def _create_array(file: Path, dtype: type[np.integer], shape: tuple[int, ...]) -> None:
    np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape).flush()
    if hasattr(os, "posix_fallocate"):  # a full disk fails here; later it would crash the process
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)


def discard_leftover(final: Path, tokenizer: str) -> None:
    """Remove what calls have left beside the finished folder ``final``; of the shards, those of the ``tokenizer`` with
    this hash."""
    _discard(_partial_folder(final))
    for folder in _shard_folders(final):
        if (folder / _IDENTITY).is_file() and read_json(folder / _IDENTITY, "remove it").get("tokenizer") == tokenizer:
            _discard(folder)


def _discard(folder: Path) -> None:
    if folder.exists():
        (folder / _IDENTITY).unlink(missing_ok=True)  # first: after a kill here, nothing can be resumed
        shutil.rmtree(folder)


def _shard_folders(final: Path) -> list[Path]:
    return sorted(final.parent.glob(f".{glob.escape(final.name)}.shard-*"))


def _partial_folder(final: Path, shard: tuple[int, int] | None = None) -> Path:
    return final.with_name(f".{final.name}.shard-{shard[0]}-of-{shard[1]}" if shard else f".{final.name}.partial")
