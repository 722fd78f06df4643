"""`metadata.jsonl` and `metadata.csv` in a folder of images, as Hugging Face's `imagefolder` reads them.

Each row names an image, `file_name`, relative to the file; its other columns belong to that image.
"""

import csv
import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twostage.core.data.image_folder import FolderContent
from twostage.core.errors import InputError
from twostage.core.wording import one_line, printable, short_repr

__all__ = ["Metadata", "read_metadata"]

_NAMES = ("metadata.jsonl", "metadata.csv")
_FILE_NAME = "file_name"


@dataclass
class Metadata:
    """The columns of all metadata files in a folder."""

    columns: dict[str, dict[Path, Any]] = field(default_factory=dict)
    """By name: the value for each image that has one; the image's path is relative to the folder."""
    files: list[Path] = field(default_factory=list)
    """The metadata files, relative to the folder."""
    unmatched: list[str] = field(default_factory=list)
    """The rows that name no image."""


def read_metadata(root: Path, content: FolderContent) -> Metadata:
    """Read the metadata files in a folder; those without a column `file_name` are something else.

    Raises:
        InputError: a file is not valid, or two rows disagree about an image.
    """
    metadata, images = Metadata(), set(content.images)
    for file in [path for path, why in sorted(content.skipped.items()) if path.name in _NAMES and why != "hidden"]:
        rows = (_jsonl_rows if file.suffix == ".jsonl" else _csv_rows)(root / file)
        if not any(_FILE_NAME in row for row in rows):
            continue
        metadata.files.append(file)
        for row in rows:
            name, others = row.get(_FILE_NAME), {key: value for key, value in row.items() if key != _FILE_NAME}
            for column in others:
                metadata.columns.setdefault(column, {})
            path = Path(os.path.normpath(file.parent / name)) if isinstance(name, str) else None
            if path is None or path not in images:
                shown = printable(name) if isinstance(name, str) else short_repr(name)
                metadata.unmatched.append(f"{shown} in {printable(file)}")
                continue
            for column, value in others.items():
                known = metadata.columns[column]
                if value is not None and known.setdefault(path, value) != value:
                    raise InputError(
                        f"data.source {root}: the metadata files have two values of {column!r} for {printable(path)}, "
                        f"{short_repr(known[path], 60)} and {short_repr(value, 60)}; expected one. Remove the wrong one"
                    )
    return metadata


def _jsonl_rows(file: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"data.source {file}, line {number}: not valid JSON ({one_line(error)}). Fix this line"
            ) from None
        if not isinstance(row, dict):
            raise InputError(
                f"data.source {file}, line {number}: expected an object such as "
                f'{{"file_name": "1.png", "text": "a cat"}}, got {short_repr(row, 60)}'
            )
        rows.append(row)
    return rows


def _csv_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file with a header; empty cells are None."""
    try:
        found = list(csv.DictReader(io.StringIO(_text(file), newline=""), strict=True))
    except csv.Error as error:
        raise InputError(f"data.source {file}: not valid CSV ({one_line(error)}). Save the table again") from None
    return [{column: value or None for column, value in row.items() if isinstance(column, str)} for row in found]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data.source {file}: not readable as UTF-8 ({one_line(error)}). Save it as UTF-8") from None
