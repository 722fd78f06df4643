"""The files and folders behind stored paths, even if they were moved or the command runs in another folder.

A path is stored as the user wrote it. To find it again, twostage tries the path as written, then its absolute path when
the run started, then relative to the folder that stores it and to the parents of that folder. Only the content counts,
not how the path is written.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twostage.core.config.sections import Section
from twostage.core.runs.model_folder import file_sha256, find_model_folder

__all__ = ["Contents", "Places", "Record", "find_places", "portable", "same_place", "weights_at"]


class Record(Section):
    """The location and content of a path, as a folder stores them."""

    place: str | None
    """Absolute path; None: not on this disk, such as a Hugging Face dataset."""
    facts: dict[str, Any]


@dataclass
class Contents:
    """The content behind a path of a configuration."""

    what: str
    """One word, such as `images`."""
    place: Path | None
    """Absolute path; None: not on this disk, such as a Hugging Face dataset."""
    facts: dict[str, Any]
    """Plain JSON that identifies the content, wherever it lies."""
    only_to_begin: bool = False
    """Whether a run needs it only until its first checkpoint."""

    @property
    def record(self) -> Record:
        """The part to store."""
        return Record(place=None if self.place is None else str(self.place), facts=self.facts)


@dataclass
class Places:
    """Existing candidates for a stored path, most likely first."""

    direct: list[Path]
    """The path as written, its old absolute path, or relative to the folder that stores it."""
    moved: list[Path]
    """Paths of the same name near that folder or its parents; check their content before using them."""

    def __iter__(self) -> Iterator[Path]:
        return iter([*self.direct, *self.moved])


def find_places(stored: str, *stored_in: Path | None, recorded: str | None = None) -> Places:
    """The files and folders that a stored path may stand for, each once.

    Args:
        stored: the path as written; relative to the current folder at that time.
        stored_in: the folders that store it.
        recorded: its absolute path at that time, if known.
    """
    path = Path(stored)
    starts = [start for folder in stored_in if folder for start in (folder.absolute(), folder.resolve())]
    above = list(dict.fromkeys(base for start in starts for base in (start, *start.parents)))
    parts = [part for part in Path(os.path.normpath(recorded or path)).parts if part not in (path.anchor, "..", ".")]
    ends = [Path(*parts[first:]) for first in range(len(parts))]
    found: list[Path] = []
    direct = _new([path, *([Path(recorded)] if recorded else []), *(base / path for base in above)], found)
    return Places(direct, _new([base / end for end in ends for base in above], found))


def _new(candidates: list[Path], found: list[Path]) -> list[Path]:
    """The existing candidates that are not in ``found`` yet; adds them to it."""
    new = []
    for candidate in candidates:
        if _exists(candidate) and (real := candidate.resolve()) not in found:
            found.append(real)
            new.append(candidate)
    return new


def same_place(first: str, second: str) -> bool:
    """Whether two paths are the same file or folder, or the same text."""
    one, other = Path(first), Path(second)
    return first == second or (_exists(one) and _exists(other) and one.samefile(other))


def _exists(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110 (Path's own raises if a parent folder is not readable)


def portable(path: str | Path, folder: Path) -> str:
    """``path`` as ``folder`` should store it: as written if it can be found from there, else absolute."""
    return str(path) if Path.cwd() in folder.resolve().parents else str(Path(path).absolute())


def weights_at(path: str, only_to_begin: bool = False) -> Contents:
    """The trained model at a path of a configuration.

    Raises:
        InputError: there is no trained model.
    """
    folder = find_model_folder(path)
    facts = {"weights_sha256": file_sha256(folder / "model.safetensors")}
    return Contents("weights", Path(path).absolute(), facts, only_to_begin)
