"""Files that are there wholly or not at all: written under another name, then renamed."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from twostage.core.errors import InputError

__all__ = ["expand_home", "flush", "read_json", "replacing", "write_error"]


def expand_home(path: str) -> str:
    """``path`` with `~` replaced by a home; a name that only begins with `~` stays."""
    return os.path.expanduser(path)  # noqa: PTH111 (Path's own raises for such a name)


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: no JSON, or another thing than an object; says what to do about it.
        FileNotFoundError: no such file.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InputError(f"{file}: damaged: not valid JSON ({why}); {remedy}") from None
    if not isinstance(document, dict):
        raise InputError(f"{file}: damaged: expected a JSON object, got {type(document).__name__}; {remedy}")
    return document


@contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[Path]:
    """Gives the name to write under. After the block that file becomes ``path``; after an error in it, it is removed.

    Args:
        durable: waits until the disk has it, so that a power failure leaves the old file or the new one.

    Raises:
        OSError: it cannot be written, as on a full disk; names ``path``, which safetensors and Python do not.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        if durable:
            flush(partial)
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if getattr(error, "filename", None) not in (None, str(partial)):  # of another file
            raise
        if (number := write_error(error)) is not None:
            raise OSError(number, os.strerror(number), str(path)) from None
        raise


def flush(path: Path) -> None:
    """Waits until the disk has the file, or a folder's list of files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_error(error: BaseException) -> int | None:
    """The operating system's number of what was in the way; None for an error of another kind.

    safetensors has it in its text alone.
    """
    if isinstance(error, OSError):
        return error.errno
    if isinstance(error, SafetensorError) and "os error" in str(error):
        return int(str(error).partition("os error ")[2].split(")")[0])
    return None
