"""The user's cache folder, `$XDG_CACHE_HOME/twostage` (`~/.cache/twostage`). All of it may be removed at any time."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from twostage.core.files import expand_home

__all__ = ["cache_folder", "replacing_in_cache"]


def cache_folder() -> Path:
    """The folder, which may not exist yet."""
    return Path(expand_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "twostage"


@contextlib.contextmanager
def replacing_in_cache(file: Path) -> Iterator[Path]:
    """A name of this process's own to write to, which then replaces ``file``: the processes of one command store the
    same."""
    partial = file.with_name(f"{file.stem}.{os.getpid()}{file.suffix}")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
