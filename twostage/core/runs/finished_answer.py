"""A finished run answers its command at once: without torch, the data and the network.

The cache keeps a run's answer to the command that it was last started with, and the sizes and times of all files on
which the answer depends. If one of them differs, the command starts as usual and compares their contents.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from twostage.core.cache_files import cache_folder, replacing_in_cache

__all__ = ["FinishedAnswer", "stamp"]

MAX_FILES = 100_000
"""Looking at more files would take longer than a second."""


class FinishedAnswer:
    """The stored answer to a training command.

    Args:
        config: the command's config file; there is never an answer for anything else.
        overrides: its settings as key=value.
    """

    def __init__(self, config: Path, overrides: Sequence[str]) -> None:
        self._file: Path | None = None
        if config.suffix.lower() not in (".yaml", ".yml"):
            return
        with contextlib.suppress(OSError, ValueError):
            if int(os.environ.get("WORLD_SIZE", "1")) > int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
                return  # each machine has a cache of its own, and all processes must agree
            text = config.read_text(encoding="utf-8")
            meaning = [str(config.absolute()), text, *overrides, str(Path.cwd()), os.environ.get("TWOSTAGE_DATA")]
            name = hashlib.sha256(json.dumps(meaning).encode()).hexdigest()
            self._file = cache_folder() / "finished" / f"{name}.json"

    def lines(self) -> list[str]:
        """The lines of the answer; [] if there is none that is still valid."""
        if self._file is None:
            return []
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            stored = json.loads(self._file.read_text(encoding="utf-8"))
            if all(known is not None and stamp(Path(path)) == known for path, known in stored["stamps"].items()):
                return [str(line) for line in stored["lines"]]
        return []

    def keep(self, lines: Sequence[str], stamps: Mapping[str, str | None]) -> None:
        """Store the answer.

        Args:
            stamps: of all files and folders on which it depends, by absolute path.
        """
        if self._file is None or None in stamps.values():
            return
        with contextlib.suppress(OSError), replacing_in_cache(self._file) as partial:  # a full disk
            partial.write_text(json.dumps({"lines": lines, "stamps": stamps}), encoding="utf-8")


def stamp(path: Path) -> str | None:
    """A hash of the names, sizes and times of a file, or of all files in a folder; None if there is nothing, or too
    much to look at."""
    found = hashlib.sha256()
    try:
        for number, (name, status) in enumerate(_files(path)):
            found.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape"))
            if number == MAX_FILES:
                return None
    except (OSError, _LinkedFolderError):
        return None
    return found.hexdigest()


class _LinkedFolderError(Exception):
    """A link to a folder, which may lead in a circle."""


def _files(path: Path, name: str = "") -> Iterator[tuple[str, os.stat_result]]:
    if not path.is_dir():
        yield name, path.stat()
        return
    for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
        inner = f"{name}/{entry.name}"
        if not entry.is_dir():
            yield inner, entry.stat()
        elif entry.is_symlink():
            raise _LinkedFolderError(path)
        else:
            yield from _files(Path(entry.path), inner)
