"""Splits, classes, captions, vectors and maps of a folder of images: from metadata files, texts and other folders."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from twostage.core.data.captions import CAPTION_NAMES, has_captions, read_captions
from twostage.core.data.folder_content import FolderContent, file_records
from twostage.core.data.image_folder import ImageFolder, understand_folder
from twostage.core.data.labels import LABEL_NAMES, read_labels
from twostage.core.data.maps import map_files, with_maps
from twostage.core.data.metadata_files import Metadata, read_metadata
from twostage.core.data.records import AUTO, Captions, Columns, Records, Source
from twostage.core.data.sample_files import CLASS_COLUMN, read_samples
from twostage.core.data.splits import SPLIT_COLUMN, exact_split
from twostage.core.data.vectors import check_same_length, read_vectors
from twostage.core.errors import InputError
from twostage.core.wording import printable, short_repr, some_of

__all__ = ["source_of_folder"]

_TEXT_FILES = "txt"
"""The `data.caption_column` that stands for text files beside the images."""
_METADATA = "metadata.jsonl, metadata.csv, labels.csv or other files beside the images"
_INTEGER = re.compile(r"-?(?:0|[1-9]\d*)")

Paths = dict[str, list[Path]]
"""The images of each split, relative to the folder."""


def source_of_folder(content: FolderContent, columns: Columns) -> Source:
    """The splits of a folder of images.

    Args:
        content: everything in the folder; files that are used for splits, captions or classes are removed from
            `skipped`.
        columns: what to read beside the images.

    Raises:
        InputError: a column does not exist, or what lies beside the images is damaged, missing or contradictory, or the
            names of the folders can be read in two ways.
    """
    metadata = read_metadata(content)
    read_samples(content, metadata)
    splits_given = _splits(content, metadata)
    if splits_given is None and (columns.label, columns.caption, columns.vector) == (None, None, None):
        metadata = Metadata()
    found = understand_folder(content, splits_given)
    images, notices = found.splits, found.notices
    class_names, labels, more = _labels(content, found, metadata, columns.label)
    notices += more
    captions, unmatched = _captions(content, images, metadata, columns.caption)
    vectors = _vectors(content, images, metadata, columns.vector)
    splits: dict[str, Records] = {}
    for split, paths in images.items():
        splits[split] = replace(
            content.records(paths), labels=labels[split], captions=captions[split], vectors=vectors[split]
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
    skipped = [f"{content.name(path)} ({reason})" for path, reason in content.skipped.items()]
    classes = "images without classes"
    if class_names is not None:
        in_folders = class_names == [printable(name) for name in found.class_names or []]
        classes = f"{'one folder per class' if in_folders else 'images with classes'} ({len(class_names)} classes)"
    description = f"{content.kind} {printable(content.root)}: {found.layout}{classes}"
    return Source(description, splits, class_names, notices, skipped, unmatched)


def _splits(content: FolderContent, metadata: Metadata) -> dict[Path, str] | None:
    """The split of each image by the column `split`; None without one.

    Raises:
        InputError: it has other words, or nothing for an image.
    """
    named = metadata.columns.get(SPLIT_COLUMN)
    if not named:
        return None
    if missing := [path for path in content.images if path not in named]:
        raise InputError(
            f"data.source {content.root}: the column {SPLIT_COLUMN!r} of the files beside the images says nothing "
            f"about {len(missing):,} of {len(content.images):,} images ({some_of(map(printable, missing))}), expected "
            "a split for each. Add them, or rename the column"
        )
    splits = {}
    for path in content.images:
        split = exact_split(str(named[path]).strip())
        if split is None:
            raise InputError(
                f"data.source {content.name(path)}: the column {SPLIT_COLUMN!r} says {short_repr(named[path], 60)}, "
                "expected train, val (validation, dev) or test. Fix the word, or rename the column"
            )
        splits[path] = split
    return splits


def _labels(
    content: FolderContent, found: ImageFolder, metadata: Metadata, wanted: str | None
) -> tuple[list[str] | None, dict[str, np.ndarray | None], list[str]]:
    """The class names, the labels of each split, and notices."""
    images, root = found.splits, content.root
    if wanted is None:
        return None, dict.fromkeys(images), []
    usual = next((name for name in (*LABEL_NAMES, CLASS_COLUMN) if name in metadata.columns), None)
    one_folder = usual is not None and len(found.class_names or []) == 1
    if wanted == AUTO and found.labels is not None and not metadata.decides_classes and not one_folder:
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
    if wanted == AUTO and usual not in (None, CLASS_COLUMN):
        _check_same_classes(content, metadata, str(usual))
    column = usual if wanted == AUTO else wanted
    if column is None:
        return None, dict.fromkeys(images), []
    if column not in metadata.columns:
        raise InputError(
            f"data.label_column {column!r}: {root} has images in folders, whose classes are the folders or a column of "
            f"{_METADATA}, which have {list(metadata.columns)}. Remove data.label_column"
        )
    known = metadata.columns[column]
    numbers = all(isinstance(value, str) and _INTEGER.fullmatch(value) for value in known.values())
    cells = {
        split: [int(value) if numbers and (value := known.get(path)) is not None else known.get(path) for path in paths]
        for split, paths in images.items()
    }
    return read_labels(cells, column, printable(root), lambda split, row: content.name(images[split][row]))


def _check_same_classes(content: FolderContent, metadata: Metadata, column: str) -> None:
    """Refuse classes in ``column`` that contradict the `.cls` files; one may divide the classes of the other further.

    Raises:
        InputError: two images have one class here and two there, and the other way round.
    """
    named, numbered = metadata.columns[column], metadata.columns.get(CLASS_COLUMN, {})
    pairs = {(str(named[path]), str(number)): path for path, number in numbered.items() if path in named}
    sizes = [len({pair[side] for pair in pairs}) for side in (0, 1)]
    if len(pairs) > max(sizes):
        (name, number), path = next(reversed(pairs.items()))
        raise InputError(
            f"data.source {content.name(path)}: its class is {name!r} in {column!r} and {number!r} in its .cls file, "
            f"and these two sources contradict each other; expected the same classes. Set data.label_column={column} "
            f"or data.label_column={CLASS_COLUMN}"
        )


# --- captions -------------------------------------------------------------------------------------------------------


def _captions(
    content: FolderContent, images: Paths, metadata: Metadata, wanted: str | None
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
            f"data.caption_column {wanted!r}: expected a column of {_METADATA} in {content.root}, which have "
            f"{list(metadata.columns)}, or {_TEXT_FILES} for the text files beside the images"
        )
    texts, unmatched = _text_files(content) if wanted in (AUTO, _TEXT_FILES) else ({}, [])
    known = metadata.columns.get(column or "", {})
    if column not in (None, _TEXT_FILES):
        unmatched = [*metadata.unmatched, *unmatched]
    if not texts and not known:
        return dict.fromkeys(images), unmatched
    found: dict[str, Captions | None] = {}
    for split, paths in images.items():
        names = [content.name(path) for path in paths]
        captions = read_captions([known.get(path) for path in paths], names, str(column))
        for row, path in enumerate(paths):
            beside = texts.get(path, ())
            if captions[row] and beside and _words(captions[row]) != _words(beside):
                raise InputError(
                    f"data.source {names[row]}: its caption is {short_repr(captions[row][0], 60)} in the metadata and "
                    f"{short_repr(beside[0], 60)} in the text file beside it; expected the same. Fix one, or choose "
                    f"with data.caption_column={column} or data.caption_column={_TEXT_FILES}"
                )
            captions[row] = captions[row] or beside
        found[split] = captions
    any_captions = any(map(has_captions, found.values()))
    return found if any_captions else dict.fromkeys(images), unmatched


def _words(captions: tuple[str, ...]) -> list[str]:
    return [word for text in captions for word in text.split()]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str | None) for text in value))


def _text_files(content: FolderContent) -> tuple[dict[Path, tuple[str, ...]], list[str]]:
    """The captions in `NAME.txt` beside `NAME.png`, one in each line, and the files without an image beside them."""
    files = [path for path in content.others if path.suffix.lower() == ".txt"]
    by_stem: dict[Path, list[Path]] = {}
    for image in content.images if files else ():
        by_stem.setdefault(image.with_suffix(""), []).append(image)
    used = [path for path in files if path.with_suffix("") in by_stem]
    folders = {path.parent for path in used}
    unmatched = [path for path in files if path.parent in folders and path.with_suffix("") not in by_stem]
    content.skipped |= dict.fromkeys(unmatched, "a caption without an image")
    captions = {}
    for path in used:
        del content.skipped[path]
        captions |= dict.fromkeys(by_stem[path.with_suffix("")], _lines(content, path))
    return captions, [printable(path) for path in unmatched]


def _lines(content: FolderContent, file: Path) -> tuple[str, ...]:
    text = content.read_text(file, "Or set data.caption_column=null to use the images without captions")
    return tuple(line.strip() for line in text.replace("\0", " ").splitlines() if line.strip())


# --- vectors --------------------------------------------------------------------------------------------------------


def _vectors(
    content: FolderContent, images: Paths, metadata: Metadata, column: str | None
) -> dict[str, np.ndarray | None]:
    if column is None:
        return dict.fromkeys(images)
    if column not in metadata.columns:
        raise InputError(
            f"data.vector_column {column!r}: expected a column of {_METADATA} in {content.root}, "
            f"which have {list(metadata.columns)}"
        )
    known, found = metadata.columns[column], {}
    for split, paths in images.items():
        names = [content.name(path) for path in paths]
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
