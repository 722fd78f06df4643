"""Where pictures come from: a folder, parquet or arrow files, a Hugging Face dataset. Nothing is decoded here.

A source is named by `data.source`. A local one never touches the network.
"""

import os
import re
from pathlib import Path

import numpy as np

from twostage.core.data.image_folder import FolderContent, list_folder, understand_folder
from twostage.core.data.labels import AUTO
from twostage.core.data.records import Records, Source, shortened
from twostage.core.data.tables import TABLE_SUFFIXES, find_tables, read_hub, read_tables
from twostage.core.errors import InputError
from twostage.core.files import expand_home
from twostage.core.images.conversion import open_image, printable, quiet_decoders
from twostage.core.images.pixel_values import is_grey

__all__ = ["find_local", "find_source", "first_form"]

KNOWN_NAMES = {"mnist": "ylecun/mnist", "fashion_mnist": "zalando-datasets/fashion_mnist", "cifar10": "uoft-cs/cifar10"}


def find_source(name: str, label_column: str | None = AUTO) -> Source:
    """Finds ``name`` as a path, then under ``$TWOSTAGE_DATA``, then as a Hugging Face dataset ``owner/name``.

    Args:
        label_column: the column of a table that holds the classes; `auto` finds it by its name, None: no classes.

    Raises:
        InputError: nothing was found, it is empty, or its layout is ambiguous; says where it was looked for.
    """
    candidates, looks_local = _candidates(name)
    if found := find_local(name):
        return _read_local(found, label_column)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not looks_local:
        return read_hub(name, candidates, label_column)
    hint = ""
    if not os.environ.get("TWOSTAGE_DATA") and not looks_local:
        hint = "; the variable TWOSTAGE_DATA (a folder that holds datasets by name) is not set"
    if name in KNOWN_NAMES:
        hint += f"; data.source={KNOWN_NAMES[name]} downloads it"
    looked = ", ".join(str(candidate) for candidate in candidates)
    raise InputError(f"data.source {name!r}: nothing there (looked for {looked}){hint}")


def find_local(name: str) -> Path | None:
    """The file or folder that ``name`` means; None for `shapes`, and where there is none on this disk."""
    if name == "shapes":
        return None
    return next((candidate for candidate in _candidates(name)[0] if candidate.exists()), None)


def _candidates(name: str) -> tuple[list[Path], bool]:
    """Where ``name`` is looked for on this disk, and whether it cannot be but a path."""
    path = Path(expand_home(name))
    root = os.environ.get("TWOSTAGE_DATA")
    looks_local = name.startswith((".", "/", "~")) or path.suffix.lower() in TABLE_SUFFIXES or name.count("/") > 1
    if not root or looks_local:
        return [path], looks_local
    return [path, *dict.fromkeys([Path(root) / name, Path(root) / Path(name).name])], looks_local


def first_form(source: str) -> tuple[tuple[int, int], int]:
    """The size (at most 256) and the channels of the first readable picture; 32x32 RGB for `shapes`."""
    quiet_decoders()
    splits = {} if source == "shapes" else find_source(source, label_column=None).splits
    for records in splits.values():
        for row in range(len(records)):
            try:
                with records.open(row) as image:
                    scale = min(1.0, 256 / max(image.size))
                    height, width = max(1, round(image.height * scale)), max(1, round(image.width * scale))
                    return (height, width), 1 if is_grey(image.mode) else 3
            except Exception:  # counted and named by load_images
                continue
    return (32, 32), 3


def _read_local(path: Path, wanted_label: str | None) -> Source:
    if path.is_file():
        if path.suffix.lower() not in TABLE_SUFFIXES:
            raise InputError(f"data.source {path}: expected a folder, or a .parquet or .arrow file, got a single file")
        return read_tables(path, [], wanted_label, None)
    content = list_folder(path)
    if tables := find_tables(content):
        return read_tables(path, tables, wanted_label, content)
    if wanted_label not in (AUTO, None):
        raise InputError(
            f"data.label_column {wanted_label!r}: {path} is a folder of images, whose classes are its folders; leave "
            "it out"
        )
    return _read_folder(path, content, wanted_label)


def _read_folder(root: Path, content: FolderContent, wanted_label: str | None) -> Source:
    found = understand_folder(root, content)
    if wanted_label is None:  # no classes are wanted
        found.labels = found.class_names = None
    splits = {}
    for split, files in found.splits.items():
        numbers = found.labels and found.labels[split]
        labels = None if numbers is None else np.array(numbers, dtype=np.int64)
        splits[split] = Records(
            [printable(file) for file in files],
            labels,
            lambda i, files=files: open_image(files[i]),
            lambda files=files: np.array([file.stat().st_size if file.exists() else 0 for file in files], np.int64),
            printable(root),
            files,
        )
    names = None if found.class_names is None else [printable(name) for name in found.class_names]
    notices = []
    if content.skipped:
        shown = shortened([f"{printable(path)} ({reason})" for path, reason in content.skipped.items()])
        notices.append(f"files left out because they are no pictures: {len(content.skipped)}: {shown}")
    skipped = [f"{printable(root / path)} ({reason})" for path, reason in content.skipped.items()]
    description = f"folder {printable(root)}: {found.layout}"
    return Source(description, splits, names, notices + found.notices, skipped)
