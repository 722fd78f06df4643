"""Files of arrays: NumPy's `.npy` and `.npz`, and MNIST's idx files, also compressed with gzip. No pickle is loaded."""

import gzip
import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from twostage.core.data.cifar_files import cifar_class_names, is_cifar_batch, read_cifar_batch
from twostage.core.errors import InputError
from twostage.core.wording import one_line, printable

__all__ = ["ARRAY_SUFFIXES", "NamedArray", "array_class_names", "is_array_file", "read_array_file"]

ARRAY_SUFFIXES = {".npy", ".npz"}
_IDX_NAME = re.compile(r".*idx\d-u?byte(\.gz)?", re.IGNORECASE)
_IDX_TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
"""The types of numbers in idx files (http://yann.lecun.com/exdb/mnist)."""
_ERRORS = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


class NamedArray(NamedTuple):
    """An array in a file, which is only read when it is needed."""

    file: Path
    """Relative to the dataset."""
    key: str
    """The name inside the file; "" if the file is one array."""
    shape: tuple[int, ...]
    kind: np.dtype[Any]
    read: Callable[[], np.ndarray]

    @property
    def name(self) -> str:
        """`train.npz:images`, or the file alone."""
        return printable(self.file) + (f":{printable(self.key)}" if self.key else "")


def is_array_file(file: Path) -> bool:
    """Whether a file of this name holds arrays."""
    return file.suffix.lower() in ARRAY_SUFFIXES or bool(_IDX_NAME.fullmatch(file.name)) or is_cifar_batch(file)


def read_array_file(folder: Path, file: Path) -> list[NamedArray]:
    """The arrays in ``folder / file``.

    Raises:
        InputError: it is damaged, or something else.
    """
    path = folder / file
    try:
        if path.suffix.lower() == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            return [NamedArray(file, "", array.shape, array.dtype, lambda: array)]
        if path.suffix.lower() == ".npz":
            return _npz_arrays(path, file)
        if is_cifar_batch(path):
            arrays = read_cifar_batch(path)
        else:
            with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as opened:
                arrays = {"": _idx_array(opened)}
        return [_loaded(file, key, array) for key, array in arrays.items()]
    except _ERRORS as error:
        raise _unreadable(path, error) from None


def array_class_names(folder: Path, files: list[Path]) -> dict[str, list[str]]:
    """The names of the classes by the name of their array, from the file beside CIFAR's batches; {} without one.

    Raises:
        InputError: that file is damaged.
    """
    found: dict[str, list[str]] = {}
    for file in files:
        try:
            found |= cifar_class_names(folder / file)
        except ValueError as error:
            raise _unreadable(folder / file, error) from None
    return found


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"data.source {printable(path)}: not a readable file of arrays ({one_line(error)}). Copy the file again, or "
        "remove it"
    )


def _loaded(file: Path, key: str, array: np.ndarray) -> NamedArray:
    return NamedArray(file, key, array.shape, array.dtype, lambda: array)


def _npz_arrays(path: Path, file: Path) -> list[NamedArray]:
    found = []
    with zipfile.ZipFile(path) as opened:
        for info in opened.infolist():
            with opened.open(info) as member:
                version = np.lib.format.read_magic(member)  # type: ignore[arg-type]
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, kind = read(member)  # type: ignore[arg-type]
            key = info.filename.removesuffix(".npy")
            found.append(NamedArray(file, key, shape, kind, lambda key=key: _read_npz(path, key)))
    return found


def _read_npz(path: Path, key: str) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as opened:
            return opened[key]
    except _ERRORS as error:
        raise _unreadable(path, error) from None


def _idx_array(file: BinaryIO | gzip.GzipFile) -> np.ndarray:
    start = file.read(4)
    if len(start) < 4 or start[:2] != b"\0\0" or start[2] not in _IDX_TYPES:
        raise ValueError("it does not begin as an idx file does")
    shape = np.frombuffer(file.read(4 * start[3]), ">i4").tolist()
    kind = np.dtype(_IDX_TYPES[start[2]])
    size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    content = file.read(size + 1)
    if len(content) != size:
        raise ValueError(f"{len(content):,} bytes after its header, expected {size:,}")
    return np.frombuffer(content, kind).reshape(shape).astype(kind.newbyteorder("="))
