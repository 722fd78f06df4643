"""Classes, captions, vectors and maps of a folder of images: from metadata files, text files and other folders."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from twostage.core.data.captions import CAPTION_NAMES, has_captions, read_captions
from twostage.core.data.image_folder import FolderContent, ImageFolder
from twostage.core.data.labels import LABEL_NAMES, read_labels
from twostage.core.data.maps import file_records, map_files, with_maps
from twostage.core.data.metadata_files import Metadata, read_metadata
from twostage.core.data.records import AUTO, Captions, Columns, Records, Source
from twostage.core.data.vectors import check_same_length, read_vectors
from twostage.core.errors import InputError
from twostage.core.wording import one_line, printable, short_repr, some_of

__all__ = ["source_of_folder"]

_TEXT_FILES = "txt"
"""The `data.caption_column` that stands for text files beside the images."""
_INTEGER = re.compile(r"-?(?:0|[1-9]\d*)")

Paths = dict[str, list[Path]]
"""The images of each split, relative to the folder."""


def source_of_folder(root: Path, content: FolderContent, found: ImageFolder, columns: Columns) -> Source:
    """The splits of a folder of images.

    Args:
        content: everything in the folder; files that are used for captions or classes are removed from `skipped`.
        found: the splits and classes in the names of files and folders.
        columns: what to read beside the images.

    Raises:
        InputError: a column does not exist, or what lies beside the images is damaged, missing or contradictory.
    """
    images = {split: [file.relative_to(root) for file in files] for split, files in found.splits.items()}
    reads_metadata = (columns.label, columns.caption, columns.vector) != (None, None, None)
    metadata = read_metadata(root, content) if reads_metadata else Metadata()
    notices, origin = found.notices, printable(root)
    class_names, labels, more = _labels(root, found, images, metadata, columns.label)
    notices += more
    captions, unmatched = _captions(root, content, images, metadata, columns.caption)
    vectors = _vectors(root, images, metadata, columns.vector)
    splits: dict[str, Records] = {}
    for split, files in found.splits.items():
        splits[split] = replace(
            file_records(files, origin), labels=labels[split], captions=captions[split], vectors=vectors[split]
        )
    if columns.maps is not None:
        for split, files in map_files(Path(columns.maps), images).items():
            splits[split] = with_maps(splits[split], file_records(files, columns.maps))
    for file in metadata.files:
        del content.skipped[file]
    if nameless := list(dict.fromkeys([*metadata.unmatched, *unmatched])):
        notices.append(f"{len(nameless):,} captions or rows of metadata belong to no image: {some_of(nameless)}")
    if content.skipped:
        shown = some_of(f"{printable(path)} ({reason})" for path, reason in content.skipped.items())
        notices = [f"{len(content.skipped)} files skipped because they are not images: {shown}", *notices]
    skipped = [f"{printable(root / path)} ({reason})" for path, reason in content.skipped.items()]
    return Source(f"folder {origin}: {found.layout}", splits, class_names, notices, skipped, unmatched)


def _labels(
    root: Path, found: ImageFolder, images: Paths, metadata: Metadata, wanted: str | None
) -> tuple[list[str] | None, dict[str, np.ndarray | None], list[str]]:
    """The class names, the labels of each split, and notices."""
    if wanted is None:
        return None, dict.fromkeys(images), []
    usual = next((name for name in LABEL_NAMES if name in metadata.columns), None)
    if wanted == AUTO and found.labels is not None:
        labels = {
            split: None if numbers is None else np.array(numbers, dtype=np.int64)
            for split, numbers in found.labels.items()
        }
        notices = []
        if usual:
            notices.append(
                f"the classes are the folders, not the column {usual!r} of the metadata; to use that, set "
                f"data.label_column={usual}"
            )
        return [printable(name) for name in found.class_names or []], labels, notices
    column = usual if wanted == AUTO else wanted
    if column is None:
        return None, dict.fromkeys(images), []
    if column not in metadata.columns:
        raise InputError(
            f"data.label_column {column!r}: {root} is a folder of images, whose classes are its folders or a column of "
            f"metadata.jsonl or metadata.csv, which have {list(metadata.columns)}. Remove data.label_column"
        )
    known = metadata.columns[column]
    numbers = all(isinstance(value, str) and _INTEGER.fullmatch(value) for value in known.values())
    cells = {
        split: [int(value) if numbers and (value := known.get(path)) is not None else known.get(path) for path in paths]
        for split, paths in images.items()
    }
    return read_labels(cells, column, printable(root), lambda split, row: f"{printable(root / images[split][row])}")


# --- captions -------------------------------------------------------------------------------------------------------


def _captions(
    root: Path, content: FolderContent, images: Paths, metadata: Metadata, wanted: str | None
) -> tuple[dict[str, Captions | None], list[str]]:
    """The captions of each split (None in all of them if no image has one), and the sources that belong to no image."""
    if wanted is None:
        return dict.fromkeys(images), []
    column: str | None = wanted
    if wanted == AUTO:
        usual = [name for name in CAPTION_NAMES if name in metadata.columns]
        column = next((name for name in usual if all(map(_is_text, metadata.columns[name].values()))), None)
    elif wanted != _TEXT_FILES and wanted not in metadata.columns:
        raise InputError(
            f"data.caption_column {wanted!r}: expected a column of metadata.jsonl or metadata.csv in {root}, which "
            f"have {list(metadata.columns)}, or {_TEXT_FILES} for the text files beside the images"
        )
    texts, unmatched = _text_files(root, content) if wanted in (AUTO, _TEXT_FILES) else ({}, [])
    known = metadata.columns.get(column or "", {})
    found: dict[str, Captions | None] = {}
    for split, paths in images.items():
        names = [printable(root / path) for path in paths]
        captions = read_captions([known.get(path) for path in paths], names, str(column))
        for row, path in enumerate(paths):
            beside = texts.get(path, ())
            if captions[row] and beside and captions[row] != beside:
                raise InputError(
                    f"data.source {names[row]}: its caption is {short_repr(captions[row][0], 60)} in the metadata and "
                    f"{short_repr(beside[0], 60)} in the text file beside it; expected the same. Fix one, or choose "
                    f"with data.caption_column={column} or data.caption_column={_TEXT_FILES}"
                )
            captions[row] = captions[row] or beside
        found[split] = captions
    any_captions = any(map(has_captions, found.values()))
    if column not in (None, _TEXT_FILES):
        unmatched = [*metadata.unmatched, *unmatched]
    return found if any_captions else dict.fromkeys(images), unmatched


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str | None) for text in value))


def _text_files(root: Path, content: FolderContent) -> tuple[dict[Path, tuple[str, ...]], list[str]]:
    """The captions in `NAME.txt` beside `NAME.png`, one in each line, and the files without an image beside them."""
    by_stem: dict[Path, list[Path]] = {}
    for image in content.images:
        by_stem.setdefault(image.with_suffix(""), []).append(image)
    files = [path for path, why in content.skipped.items() if path.suffix.lower() == ".txt" and why != "hidden"]
    used = [path for path in files if path.with_suffix("") in by_stem]
    folders = {path.parent for path in used}
    unmatched = [path for path in files if path.parent in folders and path.with_suffix("") not in by_stem]
    content.skipped |= dict.fromkeys(unmatched, "a caption without an image")
    captions = {}
    for path in used:
        del content.skipped[path]
        captions |= dict.fromkeys(by_stem[path.with_suffix("")], _lines(root / path))
    return captions, [printable(path) for path in unmatched]


def _lines(file: Path) -> tuple[str, ...]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"data.source {printable(file)}: not readable as UTF-8 ({one_line(error)}). Save it as UTF-8, or set "
            "data.caption_column=null to use the images without captions"
        ) from None
    return tuple(line.strip() for line in text.replace("\0", " ").splitlines() if line.strip())


# --- vectors --------------------------------------------------------------------------------------------------------


def _vectors(root: Path, images: Paths, metadata: Metadata, column: str | None) -> dict[str, np.ndarray | None]:
    if column is None:
        return dict.fromkeys(images)
    if column not in metadata.columns:
        raise InputError(
            f"data.vector_column {column!r}: expected a column of metadata.jsonl or metadata.csv in {root}, which have "
            f"{list(metadata.columns)}"
        )
    known, found = metadata.columns[column], {}
    for split, paths in images.items():
        names = [printable(root / path) for path in paths]
        cells = [_numbers(known.get(path), name, column) for path, name in zip(paths, names, strict=True)]
        found[split] = read_vectors(pa.chunked_array([cells], pa.list_(pa.float64())), names, column)
    check_same_length(found, column)
    return found


def _numbers(cell: Any, name: str, column: str) -> list[float | int | None] | None:
    """A list of numbers; in CSV it is a text such as `[0.5, 1]`."""
    value = cell
    if isinstance(cell, str):
        try:
            value = json.loads(cell)
        except ValueError:
            value = cell
    if value is None or (isinstance(value, list) and all(type(v) in (int, float, type(None)) for v in value)):
        return value
    raise InputError(
        f"data.source {name}: {column} is {short_repr(cell, 60)}, expected a list of numbers such as [0.5, 1]. Fix it, "
        "or set data.vector_column=null to use the images without vectors"
    )
