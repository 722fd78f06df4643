"""The classes of a table: their column, their names, and the label of each row."""

import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twostage.core.data.records import AUTO
from twostage.core.errors import InputError
from twostage.core.wording import short_repr, some_of

__all__ = ["LABEL_NAMES", "hub_features", "label_column", "read_labels", "table_labels"]

LABEL_NAMES = ("label", "labels", "class", "fine_label", "class_label", "class_name", "category", "target")
REMEDY = "set data.label_column to another column, or to null to use the images without classes"
MAX_CANDIDATE_CLASSES = 1000
MIN_SUSPECT_CLASSES = 5


def hub_features(schema: pa.Schema) -> dict[str, Any]:
    """The description of each column by Hugging Face's `datasets` in a file's metadata; {} in other files."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    found = {}
    for name, about in features.items():
        while isinstance(about, list) and len(about) == 1:  # lists of classes, in either notation
            about = about[0]
        while isinstance(about, dict) and isinstance(about.get("feature"), dict):
            about = about["feature"]
        if isinstance(about, dict):
            found[name] = about
    return found


def label_column(wanted: str | None, schemas: list[pa.Schema], taken: str, origin: str) -> tuple[str | None, list[str]]:
    """The column with the classes (None: no classes), and notices about the choice.

    Args:
        wanted: `data.label_column`: a column, `auto`, or None for no classes.
        schemas: those of all splits, with the training split first.
        taken: the column with the images.

    Raises:
        InputError: there is no such column.
    """
    if wanted is None:
        return None, []
    names = list(dict.fromkeys(name for schema in schemas for name in schema.names))
    if wanted in names:
        return wanted, []
    if wanted != AUTO:
        raise InputError(f"data.label_column {wanted!r}: expected a column of {origin}, which has {names}")
    features = hub_features(schemas[0])
    classes = [name for name in names if features.get(name, {}).get("_type") == "ClassLabel" and name != taken]
    found = [name for name in LABEL_NAMES if name in names]
    found += [name for name in classes if name not in found]
    if found:
        others = f", not from {', '.join(map(repr, found[1:]))}" if found[1:] else ""
        notice = f"the classes come from the column {found[0]!r}{others}; set data.label_column=NAME to use another"
        return found[0], [notice] if others or found[0] not in LABEL_NAMES else []
    return None, []


def label_candidates(table: pa.Table, taken: str) -> list[str]:
    """A notice about columns that could be classes, for a table without a usual name among its columns."""
    candidates = []
    for name in table.schema.names:
        kind = table.schema.field(name).type
        if name == taken or not (pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_dictionary(kind)):
            continue
        count = pc.count_distinct(table.column(name)).as_py()  # type: ignore[attr-defined]
        if 1 < count <= min(MAX_CANDIDATE_CLASSES, table.num_rows // 2):
            candidates.append(f"{name} ({count} values)")
    if not candidates:
        return []
    notice = f"no column is named {LABEL_NAMES[0]!r}, so there are no classes; to get classes, set data.label_column"
    return [f"{notice} to one of: {some_of(candidates)}"]


def table_labels(
    tables: dict[str, pa.Table], column: str, origin: str
) -> tuple[list[str] | None, dict[str, np.ndarray | None], list[str]]:
    """The classes in a column; see :func:`read_labels`. The file's metadata may name them."""
    features = next((about for t in tables.values() if (about := hub_features(t.schema).get(column))), {})
    names = [str(name) for name in features["names"]] if isinstance(features.get("names"), list) else None
    cells = {split: _column(table, column) for split, table in tables.items()}
    return read_labels(cells, column, origin, lambda split, row: f"{origin}: `{split}`, row {row}", names)


def read_labels(
    cells: dict[str, list[Any]],
    column: str,
    origin: str,
    place: Callable[[str, int], str],
    names: list[str] | None = None,
) -> tuple[list[str] | None, dict[str, np.ndarray | None], list[str]]:
    """The class names, each split's labels, (n,) int64 or None for a split without labels, and notices.

    Args:
        cells: the label of each image, by split.
        place: names a row of a split, for messages.
        names: the class names; None: the values that occur, sorted.

    Raises:
        InputError: a value is not a class, or rows have no label although their split has labels.
    """
    values = {
        split: [_value(value, partial(place, split, row), column) for row, value in enumerate(rows)]
        for split, rows in cells.items()
    }
    for split, rows in values.items():
        # -1 means no label if the classes have names, or if a whole split is -1.
        if names is not None or (set(rows) == {-1} and any(-1 not in other for other in values.values())):
            values[split] = [None if value == -1 and type(value) is int else value for value in rows]
    labelled = {split: rows for split, rows in values.items() if any(value is not None for value in rows)}
    unlabelled = [split for split, rows in values.items() if rows and split not in labelled]
    notices = [f"`{split}` has no labels and is used without classes" for split in unlabelled]
    if "train" in cells and "train" not in labelled and labelled:
        notices.append("`train` has no labels, so no split has classes")
        labelled = {}
    if not labelled:
        return None, dict.fromkeys(cells), notices
    if names is None:
        distinct = {value for rows in labelled.values() for value in rows if value is not None}
        numbers = all(type(value) is int for value in distinct)
        ordered = sorted(distinct) if numbers else sorted({str(value) for value in distinct})  # type: ignore[type-var]
        names = [str(value) for value in ordered]
        index: dict[Any, int] = {value: i for i, value in enumerate(ordered)}
    else:
        index = {name: i for i, name in enumerate(names)} | {i: i for i in range(len(names))}
    labels: dict[str, np.ndarray | None] = dict.fromkeys(cells)
    for split, rows in labelled.items():
        found = [-1 if value is None else index.get(value, index.get(str(value), -2)) for value in rows]
        labels[split] = _checked(np.array(found, dtype=np.int64), rows, names, column, origin, split, place)
    total = sum(map(len, labelled.values()))
    if len(names) > max(MIN_SUSPECT_CLASSES, total // 2):
        notices.append(
            f"the column {column!r} has {len(names):,} classes for {total:,} images; if it numbers the images, {REMEDY}"
        )
    return names, labels, notices


def _column(table: pa.Table, column: str) -> list[Any]:
    return table.column(column).to_pylist() if column in table.schema.names else [None] * table.num_rows


def _value(value: Any, where: Callable[[], str], column: str) -> int | str | None:
    """A label as a number or text; None if it is missing."""
    found = value[0] if isinstance(value, list) and len(value) == 1 else value
    if found is None or found == "" or (isinstance(found, float) and math.isnan(found)):
        return None
    if isinstance(found, bool | bytes):
        return str(found) if isinstance(found, bool) else found.decode("utf-8", "backslashreplace")
    if isinstance(found, float) and found.is_integer():
        return int(found)
    if isinstance(found, int | str):
        return found
    raise InputError(
        f"data.source {where()}: {column} is {short_repr(value, 60)}, expected one class per image, as text "
        f"or a whole number; {REMEDY}"
    )


def _checked(
    labels: np.ndarray,
    rows: list[Any],
    names: list[str],
    column: str,
    origin: str,
    split: str,
    place: Callable[[str, int], str],
) -> np.ndarray:
    if len(wrong := np.flatnonzero(labels == -2)):
        raise InputError(
            f"data.source {place(split, wrong[0])}: {column} is {rows[wrong[0]]!r}, expected a number from 0 to "
            f"{len(names) - 1} or a class name from the file's metadata; {REMEDY}"
        )
    if len(missing := np.flatnonzero(labels == -1)):
        raise InputError(
            f"data.source {origin}: `{split}`: {len(missing):,} of {len(rows):,} rows have no {column} (the first is "
            f"{place(split, missing[0])}); label them, remove them, or {REMEDY}"
        )
    return labels
