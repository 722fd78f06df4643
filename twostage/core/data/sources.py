"""Sources of images: a folder, parquet or arrow files, or a Hugging Face dataset. Nothing is decoded here.

`data.source` names a source. A local source never touches the network.
"""

import os
import re
from pathlib import Path

from twostage.core.data.archived_folder import find_archives, open_archives, refuse_compressed
from twostage.core.data.archives import ARCHIVE_SUFFIXES
from twostage.core.data.array_files import ARRAY_SUFFIXES, is_array_file
from twostage.core.data.arrays import find_arrays, read_arrays
from twostage.core.data.drawn_sources import DRAWN_SOURCES
from twostage.core.data.folder_columns import source_of_folder
from twostage.core.data.folder_content import FolderContent, list_folder
from twostage.core.data.records import Columns, Source
from twostage.core.data.tables import TABLE_SUFFIXES, find_tables, read_hub, read_tables
from twostage.core.errors import InputError
from twostage.core.files import expand_home

__all__ = ["FILE_SUFFIXES", "find_local", "find_source", "is_source_file"]

FILE_SUFFIXES = sorted(TABLE_SUFFIXES | ARCHIVE_SUFFIXES | ARRAY_SUFFIXES)
"""The files that are datasets themselves."""
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


def is_source_file(path: Path) -> bool:
    """Whether a file of this name is a dataset itself."""
    return path.suffix.lower() in FILE_SUFFIXES or is_array_file(path)


def find_local(name: str) -> Path | None:
    """The file or folder on this disk that ``name`` stands for; None if twostage draws it, or if there is none."""
    if name in DRAWN_SOURCES:
        return None
    return next((candidate for candidate in _candidates(name)[0] if candidate.exists()), None)


def _candidates(name: str) -> tuple[list[Path], bool]:
    """The paths to search for ``name``, and whether it can only be a path."""
    path = Path(expand_home(name))
    root = os.environ.get("TWOSTAGE_DATA")
    looks_local = name.startswith((".", "/", "~")) or is_source_file(path) or name.count("/") > 1
    if not root or looks_local:
        return [path], looks_local
    return [path, *dict.fromkeys([Path(root) / name, Path(root) / Path(name).name])], looks_local


def _read_local(path: Path, columns: Columns) -> Source:
    """The one place that tells the layouts apart."""
    if path.is_file():
        return _read_file(path, columns)
    content = list_folder(path)
    if tables := find_tables(content):
        return read_tables(path, tables, columns, content)
    if archives := find_archives(content):
        content = open_archives(path, archives, content)
    elif arrays := find_arrays(content):
        return read_arrays(path, arrays, columns, content)
    elif columns.maps is not None:
        _remove_maps(path, content, Path(columns.maps))
    if not content.images:
        for file in content.skipped:
            refuse_compressed(path / file)
    return source_of_folder(content, columns)


def _read_file(path: Path, columns: Columns) -> Source:
    suffix = path.suffix.lower()
    if suffix in TABLE_SUFFIXES:
        return read_tables(path, [], columns, None)
    if suffix in ARCHIVE_SUFFIXES:
        content = open_archives(path, [], None)
        return source_of_folder(content, columns)
    if is_array_file(path):
        return read_arrays(path, [], columns, None)
    refuse_compressed(path)
    raise InputError(f"data.source {path}: expected a folder, or a file ({' '.join(FILE_SUFFIXES)}), got another file")


def _remove_maps(root: Path, content: FolderContent, maps: Path) -> None:
    """Maps in a folder below the images are not images themselves."""
    inside = maps.resolve()
    if inside != root.resolve() and inside.is_relative_to(root.resolve()):
        prefix = inside.relative_to(root.resolve())
        content.images = [path for path in content.images if not path.is_relative_to(prefix)]
