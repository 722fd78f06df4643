"""Where the paths that a run was given lead, and what lay there: spelled in another way, from another folder, or moved.

A path is kept as it was spelled. It is found from any folder: as it stands, then where it was when the run began, then
relative to the folder that remembers it and to those above. What lies there counts, not how it is spelled.
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
    """What a folder remembers of a path: where it led, and what was there."""

    place: str | None
    """Absolute; None: it was nothing on this disk, such as a Hugging Face dataset."""
    facts: dict[str, Any]


@dataclass
class Contents:
    """What a path of a configuration leads to."""

    what: str
    """In a word, such as `images`."""
    place: Path | None
    """Absolute; None: nothing on this disk, such as a Hugging Face dataset."""
    facts: dict[str, Any]
    """What it is, wherever it is: plain JSON, by which the same content is known again."""
    only_to_begin: bool = False
    """Whether a run that has a checkpoint no longer reads it."""

    @property
    def record(self) -> Record:
        """To be stored."""
        return Record(place=None if self.place is None else str(self.place), facts=self.facts)


@dataclass
class Places:
    """What is there under a path that was stored, likeliest first."""

    direct: list[Path]
    """As it stands, where it was, or relative to the folder that remembers it."""
    moved: list[Path]
    """Of the same name beside that folder, or beside one above: to be believed only for what it holds."""

    def __iter__(self) -> Iterator[Path]:
        return iter([*self.direct, *self.moved])


def find_places(stored: str, *remembered_by: Path | None, recorded: str | None = None) -> Places:
    """The files and folders that a stored path may mean, each once.

    Args:
        stored: as it was spelled; relative to the folder that was the current one then.
        remembered_by: the folders that it is stored in.
        recorded: where it was, absolute, as far as that is known.
    """
    path = Path(stored)
    starts = [start for folder in remembered_by if folder for start in (folder.absolute(), folder.resolve())]
    above = list(dict.fromkeys(base for start in starts for base in (start, *start.parents)))
    parts = [part for part in Path(os.path.normpath(recorded or path)).parts if part not in (path.anchor, "..", ".")]
    ends = [Path(*parts[first:]) for first in range(len(parts))]
    found: list[Path] = []
    direct = _new([path, *([Path(recorded)] if recorded else []), *(base / path for base in above)], found)
    return Places(direct, _new([base / end for end in ends for base in above], found))


def _new(candidates: list[Path], found: list[Path]) -> list[Path]:
    """Those that are there and not yet among ``found``, which they are added to."""
    new = []
    for candidate in candidates:
        if _exists(candidate) and (real := candidate.resolve()) not in found:
            found.append(real)
            new.append(candidate)
    return new


def same_place(first: str, second: str) -> bool:
    """Whether two spellings mean the same file or folder; the same text does, too."""
    one, other = Path(first), Path(second)
    return first == second or (_exists(one) and _exists(other) and one.samefile(other))


def _exists(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110 (Path's own raises where a folder above may not be looked into)


def portable(path: str | Path, folder: Path) -> str:
    """``path`` as ``folder`` should remember it: as it is spelled where it can be found from there, else absolute."""
    return str(path) if Path.cwd() in folder.resolve().parents else str(Path(path).absolute())


def weights_at(path: str, only_to_begin: bool = False) -> Contents:
    """A trained model that a configuration names.

    Raises:
        InputError: there is none.
    """
    folder = find_model_folder(path)
    facts = {"weights_sha256": file_sha256(folder / "model.safetensors")}
    return Contents("weights", Path(path).absolute(), facts, only_to_begin)
