"""Files that exist completely or not at all: written under another name, then renamed."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from twostage.core.errors import InputError

__all__ = [
    "expand_home",
    "file_sha256",
    "flush",
    "read_json",
    "replacing",
    "shorten_home",
    "write_error",
    "write_json",
]


def expand_home(path: str) -> str:
    """``path`` with `~` replaced by the home folder; other names that begin with `~` stay."""
    return os.path.expanduser(path)  # noqa: PTH111 (Path's own raises for such a name)


def shorten_home(path: Path) -> str:
    """``path`` with the home folder as `~`, for records that are shared."""
    return str(Path("~") / path.relative_to(Path.home())) if path.is_relative_to(Path.home()) else str(path)


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        remedy: the fix, for the message.

    Raises:
        InputError: not JSON, or not an object.
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
    """Yield a temporary name to write to; after the block, that file replaces ``path``. An error removes it.

    Args:
        durable: wait until the file is on disk, so that a power failure leaves either the old or the new file.

    Raises:
        OSError: the file cannot be written, for example on a full disk; unlike Python and safetensors, it names
            ``path``.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        if durable:
            flush(partial)
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if getattr(error, "filename", None) not in (None, str(partial)):  # about another file
            raise
        if (number := write_error(error)) is not None:
            raise OSError(number, os.strerror(number), str(path)) from None
        raise


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_error(error: BaseException) -> int | None:
    """The operating system's error number; None for another kind of error.

    safetensors only gives the number in its message.
    """
    if isinstance(error, OSError):
        return error.errno
    if isinstance(error, SafetensorError) and "os error" in str(error):
        return int(str(error).partition("os error ")[2].split(")")[0])
    return None


def write_json(path: Path, content: Any) -> None:
    """Write JSON; other processes see either the old file or the new one, never half of one."""
    with replacing(path, durable=True) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content, as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
