"""Files about the images in a folder: `metadata.jsonl` and `metadata.csv` as Hugging Face's `imagefolder` reads them,
other CSV files such as `labels.csv`, and StyleGAN's `dataset.json`.

Each row names an image, relative to the file; its other columns belong to that image.
"""

import csv
import io
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twostage.core.data.captions import CAPTION_NAMES
from twostage.core.data.folder_content import FolderContent
from twostage.core.data.labels import LABEL_NAMES
from twostage.core.data.splits import SPLIT_COLUMN
from twostage.core.errors import InputError
from twostage.core.wording import one_line, printable, short_repr, some_of

__all__ = ["Metadata", "read_metadata"]

_METADATA_NAMES, _STYLEGAN_NAME = ("metadata.jsonl", "metadata.csv"), "dataset.json"
_FILE_NAME, _LABEL = "file_name", LABEL_NAMES[0]
_NAME_COLUMNS = (_FILE_NAME, "filename", "file", "image", "image_name", "image_path", "image_id", "path", "name", "id")
"""The usual names of the column with the names of the images in other CSV files; case does not matter."""
_VAGUE_NAMES = {"name", "id"}
"""These can name anything, so a table without any image is about something else."""

Row = dict[str, Any]


@dataclass
class Metadata:
    """The columns of all files about the images in a folder."""

    columns: dict[str, dict[Path, Any]] = field(default_factory=dict)
    """By name: the value for each image that has one; the image's path is relative to the folder."""
    files: list[Path] = field(default_factory=list)
    """These files, relative to the folder."""
    unmatched: list[str] = field(default_factory=list)
    """The rows that name no image."""
    decides_classes: bool = False
    """Whether the folders of images are no classes: a `dataset.json` says which classes there are."""

    def add(self, place: str, image: Path, values: Row) -> None:
        """Add the values of an image.

        Raises:
            InputError: it has other ones.
        """
        for column, value in values.items():
            known = self.columns.setdefault(column, {})
            if value is not None and str(known.setdefault(image, value)) != str(value):
                raise InputError(
                    f"data.source {place}: the files beside the images have two values of {column!r} for "
                    f"{printable(image)}, {short_repr(known[image], 60)} and {short_repr(value, 60)}; expected one. "
                    "Remove the wrong one"
                )


def read_metadata(content: FolderContent) -> Metadata:
    """Read the files about the images in a folder; CSV and JSON files with other contents are something else.

    Raises:
        InputError: a file is not valid, names none of the images, or two rows disagree about an image.
    """
    files = [path for path in content.others if _may_describe(path)]
    metadata = Metadata()
    names = _Names(content.images if files else ())
    for file in sorted(files):
        rows = _rows(content, file, names)
        if rows is None:
            continue
        metadata.files.append(file)
        metadata.decides_classes |= file.name == _STYLEGAN_NAME
        for column in dict.fromkeys(column for row in rows for column in row if column != _FILE_NAME):
            metadata.columns.setdefault(column, {})
        for row in rows:
            name = row.pop(_FILE_NAME, None)
            image = names.find(file.parent, name) if isinstance(name, str) else None
            if image is None:
                shown = printable(name) if isinstance(name, str) else short_repr(name)
                metadata.unmatched.append(f"{shown} in {printable(file)}")
            else:
                metadata.add(printable(content.root), image, row)
    return metadata


class _Names:
    """The images of a folder by the names that people write for them: with or without folders and suffix."""

    def __init__(self, images: Iterable[Path]) -> None:
        self.images = set(images)
        self.by_name: dict[str, list[Path]] = {}
        for path in self.images:
            for name in (path.name, path.stem):
                self.by_name.setdefault(name, []).append(path)

    def find(self, folder: Path, name: str) -> Path | None:
        """The image that a file in ``folder`` means by ``name``; None if there is none, or several."""
        path = Path(os.path.normpath(folder / name))
        if path in self.images:
            return path
        same_end = [one for one in self.by_name.get(path.name, []) if one.is_relative_to(folder)]
        exact = [one for one in same_end if one.with_suffix("") == path]
        if path.parent != folder:  # a name with folders is a path
            same_end = exact
        return same_end[0] if len(same_end) == 1 else None


def _may_describe(path: Path) -> bool:
    return path.name in (*_METADATA_NAMES, _STYLEGAN_NAME) or path.suffix.lower() == ".csv"


def _rows(content: FolderContent, file: Path, names: _Names) -> list[Row] | None:
    """The rows of a file, whose image is always in the column `file_name`; None for a file about something else."""
    if file.name in _METADATA_NAMES:
        rows = _jsonl_rows(content, file) if file.suffix == ".jsonl" else _csv_rows(_csv_lines(content, file))
        return rows if any(_FILE_NAME in row for row in rows) else None
    if file.name == _STYLEGAN_NAME:
        return _stylegan_rows(content, file)
    return _named_rows(content, file, names) if file.suffix.lower() == ".csv" else None


def _jsonl_rows(content: FolderContent, file: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(content.read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        where = f"data.source {content.name(file)}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not valid JSON ({one_line(error)}). Fix this line") from None
        if not isinstance(row, dict):
            raise InputError(
                f'{where}: expected an object such as {{"file_name": "1.png", "text": "a cat"}}, got '
                f"{short_repr(row, 60)}"
            )
        rows.append(row)
    return rows


def _csv_rows(lines: list[list[str]]) -> list[Row]:
    """The rows of a CSV file with a header; empty cells are None."""
    header = lines[0] if lines else []
    return [
        {column: value or None for column, value in zip(header, line, strict=False)}
        | dict.fromkeys(header[len(line) :])
        for line in lines[1:]
    ]


def _csv_lines(content: FolderContent, file: Path) -> list[list[str]]:
    try:
        return [line for line in csv.reader(io.StringIO(content.read_text(file), newline=""), strict=True) if line]
    except csv.Error as error:
        raise InputError(
            f"data.source {content.name(file)}: not valid CSV ({one_line(error)}). Save the table again"
        ) from None


def _named_rows(content: FolderContent, file: Path, names: _Names) -> list[Row] | None:
    """The rows of a CSV file with a column of names of images, or with a name and a class in each line.

    Raises:
        InputError: it has names and classes or captions, but names none of the images.
    """
    try:
        lines = _csv_lines(content, file)
    except InputError:  # it may have nothing to do with the images
        content.skipped[file] = "not a CSV file in UTF-8"
        return None
    if lines and all(len(line) == 2 for line in lines) and names.find(file.parent, lines[0][0]):
        return [{_FILE_NAME: name, _LABEL: value or None} for name, value in lines]
    rows = _csv_rows(lines)
    header = {column.casefold().strip(): column for column in (lines[0] if lines else [])}
    column = next((name for name in _NAME_COLUMNS if name in header), None)
    if column is None:
        return None
    usual = [name for name in (*LABEL_NAMES, *CAPTION_NAMES, SPLIT_COLUMN) if name in header]
    for row in rows:
        row[_FILE_NAME] = row.pop(header[column])
        for name in usual:
            row[name] = row.pop(header[name])
    if any(row[_FILE_NAME] and names.find(file.parent, row[_FILE_NAME]) for row in rows):
        return rows
    if rows and names.images and column not in _VAGUE_NAMES and usual:
        example = os.path.relpath(min(names.images), file.parent)
        raise InputError(
            f"data.source {content.name(file)}: none of its {len(rows):,} rows names an image here, expected names "
            f"such as {printable(example)}, got {some_of((printable(row[_FILE_NAME] or '') for row in rows), 3)}. "
            "Fix the names, or remove the file"
        )
    content.skipped[file] = "a table that names no image here"
    return None


def _stylegan_rows(content: FolderContent, file: Path) -> list[Row] | None:
    """`{"labels": [["00000/img0.png", 3], ...]}`; no labels at all if they are null."""
    document = content.read_json(file)
    if not isinstance(document, dict) or "labels" not in document:
        return None
    labels = document["labels"] or []
    pairs = list(labels.items()) if isinstance(labels, dict) else labels
    if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise InputError(
            f"data.source {content.name(file)}: labels are {short_repr(labels, 60)}, expected pairs such as "
            '["00000/img0.png", 3]. Fix them, or remove the file'
        )
    return [{_FILE_NAME: name, _LABEL: label} for name, label in pairs]
