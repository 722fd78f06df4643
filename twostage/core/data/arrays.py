"""Arrays of images as a source: `.npy`, `.npz`, idx files and CIFAR's batches, each with or without classes."""

import re
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil

from twostage.core.data.array_files import ARRAY_SUFFIXES, NamedArray, array_class_names, is_array_file, read_array_file
from twostage.core.data.cifar_files import CIFAR_NAME_FILES
from twostage.core.data.folder_content import FolderContent
from twostage.core.data.labels import LABEL_NAMES, read_labels
from twostage.core.data.records import AUTO, Columns, Records, Source
from twostage.core.data.splits import exact_split, spelled_splits
from twostage.core.errors import InputError
from twostage.core.images.arrays import ArrayImage, OpenedImage, channels_last
from twostage.core.wording import printable, some_of

__all__ = ["find_arrays", "read_arrays"]

_IMAGE_NAMES = {"image", "images", "img", "imgs", "x", "data", "pixels", "samples", "arr_0"}
_LABEL_NAMES = {*LABEL_NAMES, "y", "targets", "classes", "fine_labels", "arr_1"}
_NO_WORD = re.compile(r"[\W_]+")
_MNIST_TEST = "t10k"
"""The word in MNIST's file names for its test split."""


def find_arrays(content: FolderContent) -> list[Path]:
    """The files of arrays in a folder without other images, relative to it."""
    if content.images:
        return []
    return [path for path in sorted(content.others) if is_array_file(content.root / path)]


def read_arrays(root: Path, files: list[Path], columns: Columns, content: FolderContent | None) -> Source:
    """Read arrays as the splits that their names spell.

    Args:
        root: a folder, or a single file.
        files: the files of arrays in the folder, relative to it; [] if ``root`` is a file.
        content: everything in the folder; None if ``root`` is a file.

    Raises:
        InputError: a file is unreadable or has no images, or its splits, images or classes are ambiguous.
    """
    folder, origin = root if content else root.parent, printable(root)
    for name in ("caption", "vector", "maps"):
        if (given := getattr(columns, name)) not in (None, AUTO):
            raise InputError(
                f"data.source {origin}: is arrays of images, which have no {name}; expected data.{name}"
                f"{'' if name == 'maps' else '_column'}=null, got {given!r}"
            )
    arrays = [array for file in files or [Path(root.name)] for array in read_array_file(folder, file)]
    by_split = _by_split(origin, arrays)
    images = {split: _images_of(origin, found) for split, found in by_split.items()}
    images = {split: found for split, found in images.items() if found}
    if not images:
        shown = some_of(f"{array.name} {array.kind} {list(array.shape)}" for array in arrays)
        raise InputError(
            f"data.source {origin}: expected an array of images, such as uint8 of the shape [number, height, width, "
            f"channels], got {shown or 'no arrays'}. Set data.source to another file"
        )
    labels = {split: _labels_of(origin, by_split[split], found, columns.label) for split, found in images.items()}
    splits = {split: _records(folder, found, origin) for split, found in images.items()}
    class_names, notices, beside = None, [], []
    if any(labels.values()):
        beside = [path for path in (content.skipped if content else {}) if path.name in CIFAR_NAME_FILES]
        class_names, numbers, notices = _read_labels(splits, labels, origin, array_class_names(folder, beside))
        splits = {split: replace(records, labels=numbers[split]) for split, records in splits.items()}
    used = {array for found in (*images.values(), *labels.values()) for array in found}
    unused = [f"{array.name} ({array.kind} {list(array.shape)})" for array in arrays if array not in used]
    if unused:
        notices.append(f"arrays not used: {some_of(unused)}")
    others = dict(content.skipped) if content else {}
    for path in [*files, *beside]:
        others.pop(path, None)
    skipped = [f"{printable(folder / path)} ({reason})" for path, reason in others.items()]
    skipped += [f"{printable(folder)}/{line}" for line in unused]
    return Source(f"arrays {origin}", splits, class_names, notices, skipped)


def _by_split(origin: str, arrays: list[NamedArray]) -> dict[str, list[NamedArray]]:
    """The arrays of each split, by their own names, or else the names of their files and folders.

    Raises:
        InputError: a name could be two splits.
    """
    found: dict[str, list[NamedArray]] = {}
    for array in arrays:
        names = [array.key, _stem(array.file), *reversed(array.file.parts[:-1])]
        spelled = next((splits for name in names if (splits := _spelled(name))), {"train"})
        if len(spelled) > 1:
            raise InputError(
                f"data.source {origin}: {array.name} could be {' or '.join(sorted(spelled))} by its name, expected one "
                "split. Rename it"
            )
        found.setdefault(next(iter(spelled)), []).append(array)
    return found


def _spelled(name: str) -> set[str]:
    if name.startswith(_MNIST_TEST):
        return {"test"}
    return {exact} if (exact := exact_split(name)) else spelled_splits(name)


def _images_of(origin: str, arrays: list[NamedArray]) -> list[NamedArray]:
    """The arrays with the images of a split: one, or the batches of CIFAR.

    Raises:
        InputError: there are several.
    """
    found = [array for array in arrays if len(array.shape) in (3, 4) and array.shape[0] and array.kind.kind in "buif"]
    if len({array.key for array in found}) == 1 and found[0].key == "data":
        return found
    named = [array for array in found if _words(array) & _IMAGE_NAMES] if len(found) > 1 else found
    if len(found) > 1 and len(named) != 1:
        raise InputError(
            f"data.source {origin}: {some_of(array.name for array in found)} could all be the images of one split, "
            "expected one. Remove the others, or rename one to images"
        )
    return named


def _stem(file: Path) -> str:
    name = file.name.removesuffix(".gz")
    return Path(name).stem if Path(name).suffix in ARRAY_SUFFIXES else name


def _words(array: NamedArray) -> set[str]:
    name = (array.key or _stem(array.file)).casefold()
    return {name, *_NO_WORD.split(name)}


def _labels_of(origin: str, arrays: list[NamedArray], images: list[NamedArray], wanted: str | None) -> list[NamedArray]:
    """The arrays with the classes of ``images``, in the same order; [] without any.

    Raises:
        InputError: there are several, none has the wanted name, or one has another length.
    """
    flat = [array for array in arrays if array.kind.kind in "buiUS" and _is_flat(array.shape)]
    if wanted is None or not flat:
        found = []
    elif wanted != AUTO:
        found = [array for array in flat if wanted in _words(array)]
    else:
        found = [array for array in flat if array.key in _LABEL_NAMES]
        found = found or [array for array in flat if _words(array) & _LABEL_NAMES]
    if wanted not in (None, AUTO) and not found:
        raise InputError(
            f"data.label_column {wanted!r}: expected an array of {origin}, which has "
            f"{[array.name for array in arrays]}. Remove data.label_column"
        )
    if not found:
        return []
    if len(found) != len(images):
        raise InputError(
            f"data.source {origin}: {some_of(array.name for array in found)} could all be the classes of "
            f"{images[0].name}, expected one. Set data.label_column to one of these names"
        )
    for label, image in zip(found, images, strict=True):
        if label.shape[0] != (count := image.shape[0]):
            raise InputError(
                f"data.source {origin}: {label.name} has {label.shape[0]:,} classes for the {count:,} images of "
                f"{image.name}, expected one each. Fix one of the arrays"
            )
    return found


def _is_flat(shape: Iterable[int]) -> bool:
    length, *others = [*shape, 1]
    return length > 0 and all(size == 1 for size in others)


def _records(folder: Path, arrays: list[NamedArray], origin: str) -> Records:
    """The images of a split. Arrays in a `.npy` stay on disk, others are read now."""
    total = sum(int(np.prod(array.shape, dtype=np.float64)) * array.kind.itemsize for array in arrays)
    if total > (available := psutil.virtual_memory().total) and any(array.file.suffix != ".npy" for array in arrays):
        raise InputError(
            f"data.source {origin}: {some_of(array.name for array in arrays)} would need {total / 2**30:,.1f} GiB, "
            f"expected at most {available / 2**30:.1f} GiB. Save the images as a .npy file, which stays on disk"
        )
    stacks = [channels_last(array.read()) for array in arrays]
    names = [f"{printable(folder / array.file)}:{array.key}{':' * bool(array.key)}{row}"
             for array in arrays for row in range(array.shape[0])]  # fmt: skip
    stats = [(folder / array.file).stat() for array in arrays]
    return Records(
        names,
        None,
        partial(_open_row, stacks),
        partial(_row_sizes, stacks),
        origin,
        version=" ".join(f"{stat.st_size} {stat.st_mtime_ns}" for stat in stats),
    )


def _open_row(stacks: list[np.ndarray], row: int) -> OpenedImage:
    for stack in stacks:
        if row < len(stack):
            return ArrayImage(stack[row]).opened()
        row -= len(stack)
    raise IndexError(row)


def _row_sizes(stacks: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.full(len(stack), stack[0].nbytes, np.int64) for stack in stacks])


def _read_labels(
    splits: dict[str, Records], labels: dict[str, list[NamedArray]], origin: str, names: dict[str, list[str]]
) -> tuple[list[str] | None, dict[str, np.ndarray | None], list[str]]:
    cells = {
        split: [value for array in found for value in array.read().reshape(-1).tolist()] or [None] * len(splits[split])
        for split, found in labels.items()
    }
    column = next(array for found in labels.values() for array in found)
    return read_labels(
        cells, column.key or column.name, origin, lambda split, row: splits[split].names[row], names.get(column.key)
    )
