"""The files and folders behind stored paths, even if they were moved or the command runs in another folder.

A path is stored as the user wrote it. To find it again, twostage tries the path as written, then its absolute path when
it was stored, then relative to the folder that stores it and to the parents of that folder.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Places", "find_places", "portable"]


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
        there = os.path.exists(candidate)  # noqa: PTH110 (Path's own raises if a parent folder is not readable)
        if there and (real := candidate.resolve()) not in found:
            found.append(real)
            new.append(candidate)
    return new


def portable(path: str | Path, folder: Path) -> str:
    """``path`` as ``folder`` should store it: as written if it can be found from there, else absolute."""
    return str(path) if Path.cwd() in folder.resolve().parents else str(Path(path).absolute())
