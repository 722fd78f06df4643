"""Sources of images: a folder, parquet or arrow files, or a Hugging Face dataset. Nothing is decoded here.

`data.source` names a source. A local source never touches the network.
"""

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from twostage.core.data.image_folder import FolderContent, list_folder, understand_folder
from twostage.core.data.maps import file_records
from twostage.core.data.records import AUTO, Columns, Source
from twostage.core.data.tables import TABLE_SUFFIXES, find_tables, read_hub, read_tables
from twostage.core.errors import InputError
from twostage.core.files import expand_home
from twostage.core.wording import printable, some_of

__all__ = ["find_local", "find_source"]

KNOWN_NAMES = {"mnist": "ylecun/mnist", "fashion_mnist": "zalando-datasets/fashion_mnist", "cifar10": "uoft-cs/cifar10"}


def find_source(name: str, columns: Columns | None = None) -> Source:
    """Find ``name`` as a path, then under ``$TWOSTAGE_DATA``, then as a Hugging Face dataset ``owner/name``.

    Args:
        columns: what to read beside the images; by default labels and captions.

    Raises:
        InputError: nothing was found (the message lists every place searched), the source is empty, or its layout is
            ambiguous.
    """
    columns = columns or Columns()
    candidates, looks_local = _candidates(name)
    if found := find_local(name):
        return _read_local(found, columns)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not looks_local:
        return read_hub(name, candidates, columns)
    remedy = "Fix the path"
    if name in KNOWN_NAMES:
        remedy = f"Set data.source={KNOWN_NAMES[name]} to download it"
    if not os.environ.get("TWOSTAGE_DATA") and not looks_local:
        remedy += ", or set TWOSTAGE_DATA to the folder that holds your datasets (it is not set)"
    raise InputError(f"data.source {name!r}: not found (searched: {', '.join(map(str, candidates))}). {remedy}")


def find_local(name: str) -> Path | None:
    """The file or folder on this disk that ``name`` stands for; None for `shapes`, or if there is none."""
    if name == "shapes":
        return None
    return next((candidate for candidate in _candidates(name)[0] if candidate.exists()), None)


def _candidates(name: str) -> tuple[list[Path], bool]:
    """The paths to search for ``name``, and whether it can only be a path."""
    path = Path(expand_home(name))
    root = os.environ.get("TWOSTAGE_DATA")
    looks_local = name.startswith((".", "/", "~")) or path.suffix.lower() in TABLE_SUFFIXES or name.count("/") > 1
    if not root or looks_local:
        return [path], looks_local
    return [path, *dict.fromkeys([Path(root) / name, Path(root) / Path(name).name])], looks_local


def _read_local(path: Path, columns: Columns) -> Source:
    if path.is_file():
        if path.suffix.lower() not in TABLE_SUFFIXES:
            raise InputError(f"data.source {path}: expected a folder, or a .parquet or .arrow file, got another file")
        return read_tables(path, [], columns, None)
    content = list_folder(path)
    if tables := find_tables(content):
        return read_tables(path, tables, columns, content)
    if columns.label not in (AUTO, None):
        raise InputError(
            f"data.label_column {columns.label!r}: only applies to tables; {path} is a folder of images, whose classes "
            "are its folders. Remove data.label_column"
        )
    return _read_folder(path, content, columns)


def _read_folder(root: Path, content: FolderContent, columns: Columns) -> Source:
    found = understand_folder(root, content)
    if columns.label is None:
        found.labels = found.class_names = None
    splits = {}
    for split, files in found.splits.items():
        numbers = found.labels and found.labels[split]
        labels = None if numbers is None else np.array(numbers, dtype=np.int64)
        splits[split] = replace(file_records(files, printable(root)), labels=labels)
    names = None if found.class_names is None else [printable(name) for name in found.class_names]
    notices = found.notices
    if content.skipped:
        shown = some_of(f"{printable(path)} ({reason})" for path, reason in content.skipped.items())
        notices = [f"{len(content.skipped)} files skipped because they are not images: {shown}", *notices]
    skipped = [f"{printable(root / path)} ({reason})" for path, reason in content.skipped.items()]
    return Source(f"folder {printable(root)}: {found.layout}", splits, names, notices, skipped)
