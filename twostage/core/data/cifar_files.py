"""CIFAR's batches for Python. They are pickles, which can run programs, so only plain data in them is understood."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["CIFAR_NAME_FILES", "cifar_class_names", "is_cifar_batch", "read_cifar_batch"]

_BATCHES = {"data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"}
_CIFAR100_BATCHES, _CIFAR100_NAMES = {"train", "test"}, "meta"
CIFAR_NAME_FILES = {"batches.meta", _CIFAR100_NAMES}
"""The files beside the batches with the names of the classes."""
_SIDE = 32


class _PlainUnpickler(pickle.Unpickler):
    """Builds numbers, texts, lists, dicts and arrays of bytes; every other object is refused, and nothing is run."""

    def find_class(self, module: str, name: str) -> Any:
        # Not even NumPy's own constructors see the file's content: these stand for them.
        if module.startswith("numpy") and (known := {"ndarray": _Array, "dtype": _Type}.get(name)):
            return known
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return lambda *_: _Array()
        if (module, name) == ("_codecs", "encode"):  # Python 3 writes bytes so for Python 2
            return lambda text, *_: text.encode("latin-1")
        raise pickle.UnpicklingError(f"it contains {module}.{name}, expected arrays, texts and numbers only")


class _Type:
    def __init__(self, name: Any = "", *_: Any) -> None:
        self.name = name.decode("ascii", "replace") if isinstance(name, bytes) else name

    def __setstate__(self, state: Any) -> None:
        pass  # the byte order, which single bytes have not


class _Array:
    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def read(self) -> np.ndarray:
        _, shape, kind, by_columns, content = self.state
        if kind.name != "u1" or not isinstance(content, bytes):
            raise ValueError(f"an array of {kind.name!r}, expected bytes")
        return np.frombuffer(content, np.uint8).reshape(shape, order="F" if by_columns else "C")


def is_cifar_batch(file: Path) -> bool:
    """Whether a file's name is that of a batch; CIFAR-100's are only recognized beside `meta`."""
    return file.name in _BATCHES or (file.name in _CIFAR100_BATCHES and file.with_name(_CIFAR100_NAMES).is_file())


def read_cifar_batch(file: Path) -> dict[str, np.ndarray]:
    """The images (n, 3, 32, 32) uint8 as `data`, and the classes (n,) int64 by the names that the file has for them.

    Raises:
        ValueError: it is another file.
    """
    batch = _load(file)
    try:
        arrays = {"data": batch["data"].read().reshape(-1, 3, _SIDE, _SIDE)}
        for name in ("labels", "fine_labels", "coarse_labels"):
            if name in batch:
                arrays[name] = np.array(batch[name], dtype=np.int64).reshape(len(arrays["data"]))
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(f"not a batch of CIFAR: {error}") from None
    return arrays


def cifar_class_names(file: Path) -> dict[str, list[str]]:
    """The names of the classes in `batches.meta` or `meta`, by the name of their array; {} for other files.

    Raises:
        ValueError: the file is damaged.
    """
    found = {}
    for key, names in (_load(file) if file.name in CIFAR_NAME_FILES else {}).items():
        if key.endswith("_names") and isinstance(names, list):
            texts = [name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in names]
            found[f"{key.removesuffix('_names')}s"] = texts
    return found


def _load(file: Path) -> dict[str, Any]:
    """The dict in a file, with texts as keys."""
    try:
        with file.open("rb") as opened:
            found = _PlainUnpickler(opened, encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise almost any error
        raise ValueError(str(error) or type(error).__name__) from None
    if not isinstance(found, dict):
        raise ValueError("not a batch of CIFAR: no dict")
    return {key.decode("utf-8", "replace") if isinstance(key, bytes) else str(key): found[key] for key in found}
