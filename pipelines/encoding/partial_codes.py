"""Codes under way: the folder that an interrupted `twostage encode` goes on from."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object

from pipelines.encoding.image_variants import ImageVariants
from stage2_prior.codes import Manifest
from twostage.core.config.sections import summarize_differences
from twostage.core.data.dataset import DataConfig
from twostage.core.errors import InputError
from twostage.core.files import read_json
from twostage.core.runs.model_folder import write_json

__all__ = ["CHUNK", "PartialCodes", "discard_leftover"]

CHUNK = 256  # images that are encoded together, in all their variants

_IDENTITY = "identity.json"
_ONE_MACHINE = (
    "all processes have to see each other's writes, which those of several machines do not, on disks of their own and "
    "on most network disks; remove this folder and encode on one machine"
)


class PartialCodes:
    """`.NAME.partial` beside the folder NAME that it becomes.

    `codes/` is what will be that folder. `SPLIT.done.npy` has a byte for each chunk of images, 1 once the rows of all
    their variants are on disk, and `identity.json` says what is being encoded. Every process writes the chunks that it
    encodes; all else is the main process's.

    The processes have to be of one machine: they write to the same mapped files, whose pages several machines would
    overwrite for each other on a network disk, and would not see at all on disks of their own.

    Args:
        final: the folder NAME.
        identity: what the codes follow from, as JSON has it; only what was begun with the same is gone on from.
        splits: what is encoded.
        former: the identity as earlier versions wrote it, which counts too.
    """

    def __init__(
        self,
        final: Path,
        identity: dict[str, Any],
        splits: dict[str, ImageVariants],
        former: dict[str, Any] | None = None,
    ) -> None:
        self.final, self.splits = final, splits
        rows = {"rows": {name: split.rows for name, split in splits.items()}}
        self.identity, self.former = rows | identity, former and rows | former
        self.folder = _partial_folder(final)
        self.codes = self.folder / "codes"
        self.identity_file = self.folder / _IDENTITY

    def begin(self, grid: tuple[int, int], dtype: type[np.integer]) -> str | None:
        """Keeps what an interrupted call left if it is of the same codes, else starts anew; says which, or is None.

        Args:
            grid: cells (h, w).
            dtype: of the codes.
        """
        # `codes` has gone where a kill came after the last step but one.
        whole = self.identity_file.is_file() and self.codes.is_dir()
        stored = read_json(self.identity_file, f"remove {self.folder} and give the same command") if whole else None
        if stored is not None and isinstance(stored.get("data"), dict):
            # Settings that the version before did not have yet are at their defaults.
            stored["data"] = DataConfig().model_dump(mode="json") | stored["data"]
        if stored is not None and stored in (self.identity, self.former):
            total = sum(split.rows for split in self.splits.values())
            return f"{self.folder}: goes on, {sum(map(self._rows_done, self.splits)):,} of {total:,} rows are there"
        said = None
        if self.folder.exists():
            differences = summarize_differences(stored, self.identity) if stored else "of nothing known"
            said = f"{self.folder}: left by an interrupted call and discarded ({differences})"
            discard_leftover(self.final)
        try:
            self._make_room(grid, dtype)
        except OSError as error:
            discard_leftover(self.final)
            raise OSError(error.errno, os.strerror(error.errno or 0), str(self.final)) from None
        return said

    def _make_room(self, grid: tuple[int, int], dtype: type[np.integer]) -> None:
        self.codes.mkdir(parents=True)
        for name, split in self.splits.items():
            file, shape = self.codes / f"{name}.codes.npy", (split.rows, *grid)
            np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape).flush()
            if hasattr(os, "posix_fallocate"):  # a disk that is too small says so now; later it would be a crash
                with file.open("r+b") as opened:
                    os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
            if (labels := split.labels()) is not None:
                np.save(self.codes / f"{name}.labels.npy", labels)
            np.save(self._done_file(name), np.zeros(-(-len(split.images) // CHUNK), dtype=np.uint8))
        write_json(self.identity_file, self.identity)  # last: without it, none of the above counts

    def check_shared(self) -> None:
        """Called by every process once the main one has begun.

        Raises:
            InputError: in all of them, where one does not find what was begun.
        """
        if not all(gather_object([self.identity_file.is_file()])):
            raise InputError(f"{self.folder}: not there for all processes; {_ONE_MACHINE}")

    def open(self, name: str) -> tuple[np.memmap, np.memmap]:
        """A split's codes (rows, h, w), and a byte for each of its chunks: both to be written to.

        Flush the codes of a chunk before its byte is set.
        """
        return (
            np.load(self.codes / f"{name}.codes.npy", mmap_mode="r+", allow_pickle=False),
            np.load(self._done_file(name), mmap_mode="r+", allow_pickle=False),
        )

    def finish(self, manifest: Manifest) -> None:
        """Makes it the final folder; from here on it is a code cache.

        Raises:
            InputError: rows that no process has written, as far as can be seen from here (named split, and how many).
        """
        for name, split in self.splits.items():
            if missing := split.rows - self._rows_done(name):
                raise InputError(
                    f"{self.folder}: {missing:,} of {split.rows:,} rows of `{name}` are missing though every process "
                    f"has written its share; {_ONE_MACHINE}"
                )
        write_json(self.codes / "manifest.json", manifest.model_dump(mode="json"))
        self.codes.rename(self.final)  # an empty folder there is replaced
        discard_leftover(self.final)

    def _done_file(self, name: str) -> Path:
        return self.folder / f"{name}.done.npy"

    def _rows_done(self, name: str) -> int:
        images, variants = len(self.splits[name].images), self.splits[name].augmentation.variants
        chunks = np.flatnonzero(np.load(self._done_file(name), allow_pickle=False))
        return int(np.minimum(CHUNK, images - CHUNK * chunks).sum()) * variants


def discard_leftover(final: Path) -> None:
    """Removes what an interrupted call has left beside the folder ``final``, if anything."""
    folder = _partial_folder(final)
    if folder.exists():
        (folder / _IDENTITY).unlink(missing_ok=True)  # first: a kill here leaves nothing that could be gone on from
        shutil.rmtree(folder)


def _partial_folder(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")
