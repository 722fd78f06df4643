"""The classes of a table: which column holds them, what they are called, and the label of each row."""

import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twostage.core.errors import InputError

__all__ = ["AUTO", "hub_features", "label_column", "read_labels"]

AUTO = "auto"
"""The `data.label_column` that finds the column by its name."""
LABEL_NAMES = ("label", "labels", "class", "fine_label", "class_label", "class_name", "category", "target")
REMEDY = "set data.label_column to another column, or to null to use the images without classes"
MAX_CANDIDATE_CLASSES = 1000
MAX_NAMED = 5


def hub_features(schema: pa.Schema) -> dict[str, Any]:
    """What Hugging Face's `datasets` says of each column in a file's metadata; {} where it did not write the file."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    found = {}
    for name, about in features.items():
        while isinstance(about, list) and len(about) == 1:  # lists of classes, in either of their spellings
            about = about[0]
        while isinstance(about, dict) and isinstance(about.get("feature"), dict):
            about = about["feature"]
        if isinstance(about, dict):
            found[name] = about
    return found


def label_column(wanted: str | None, schemas: list[pa.Schema], taken: str, origin: str) -> tuple[str | None, list[str]]:
    """The column that holds the classes, and what to say about the choice.

    Args:
        wanted: `data.label_column`: a column, `auto`, or None for no classes.
        schemas: of the splits, the training split's first.
        taken: the column of the images.

    Raises:
        InputError: there is no such column.
    """
    if wanted is None:
        return None, []
    names = list(dict.fromkeys(name for schema in schemas for name in schema.names))
    if wanted in names:
        return wanted, []
    if wanted != AUTO:
        raise InputError(f"data.label_column {wanted!r}: {origin} has the columns {names}; name one of them")
    features = hub_features(schemas[0])
    classes = [name for name in names if features.get(name, {}).get("_type") == "ClassLabel" and name != taken]
    found = [name for name in LABEL_NAMES if name in names]
    found += [name for name in classes if name not in found]
    if found:
        others = f" (there {'are' if len(found) > 2 else 'is'} also {', '.join(found[1:])})" if found[1:] else ""
        said = [f"the classes are those of the column {found[0]!r}{others}; data.label_column=NAME uses another"]
        return found[0], said if others or found[0] not in LABEL_NAMES else []
    return None, []


def label_candidates(table: pa.Table, taken: str) -> list[str]:
    """Warns of columns that could hold classes, though none is called so."""
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
    shown = ", ".join(candidates[:MAX_NAMED])
    return [f"no column is called {LABEL_NAMES[0]}, so there are no classes; data.label_column can name one: {shown}"]


def read_labels(
    tables: dict[str, pa.Table], column: str, origin: str
) -> tuple[list[str] | None, dict[str, np.ndarray | None], list[str]]:
    """The class names, each split's labels (n,) int64 or None where it has none, and what to say about them.

    Without class names in the file's metadata the classes are the values that occur, in order.

    Raises:
        InputError: values that are no classes, or rows without a label in a split that has labels.
    """
    values = {
        split: [_value(v, f"{origin}: `{split}`", column, row) for row, v in enumerate(_column(table, column))]
        for split, table in tables.items()
    }
    features = next((about for t in tables.values() if (about := hub_features(t.schema).get(column))), {})
    names = [str(name) for name in features["names"]] if isinstance(features.get("names"), list) else None
    for split, rows in values.items():
        # -1 stands for no label where the classes have names, or where a whole split holds nothing else.
        if names is not None or (set(rows) == {-1} and any(-1 not in other for other in values.values())):
            values[split] = [None if value == -1 and type(value) is int else value for value in rows]
    labelled = {split: rows for split, rows in values.items() if any(value is not None for value in rows)}
    unlabelled = [split for split, rows in values.items() if rows and split not in labelled]
    notices = [f"`{split}` has no labels and is used without classes" for split in unlabelled]
    if "train" in tables and "train" not in labelled and labelled:
        notices.append("`train` has no labels, so there are no classes at all")
        labelled = {}
    if not labelled:
        return None, dict.fromkeys(tables), notices
    if names is None:
        distinct = {value for rows in labelled.values() for value in rows if value is not None}
        numbers = all(type(value) is int for value in distinct)
        ordered = sorted(distinct) if numbers else sorted({str(value) for value in distinct})  # type: ignore[type-var]
        names = [str(value) for value in ordered]
        index: dict[Any, int] = {value: i for i, value in enumerate(ordered)}
    else:
        index = {name: i for i, name in enumerate(names)} | {i: i for i in range(len(names))}
    labels: dict[str, np.ndarray | None] = dict.fromkeys(tables)
    for split, rows in labelled.items():
        found = [-1 if value is None else index.get(value, index.get(str(value), -2)) for value in rows]
        labels[split] = _checked(np.array(found, dtype=np.int64), rows, names, column, f"{origin}: `{split}`")
    total = sum(map(len, labelled.values()))
    if len(names) > max(MAX_NAMED, total // 2):
        notices.append(
            f"the column {column!r} gives {len(names):,} classes to {total:,} images: is it a number of each image? "
            f"If so, {REMEDY}"
        )
    return names, labels, notices


def _column(table: pa.Table, column: str) -> list[Any]:
    return table.column(column).to_pylist() if column in table.schema.names else [None] * table.num_rows


def _value(value: Any, where: str, column: str, row: int) -> int | str | None:
    """A label as a number or a text; None for a missing one."""
    found = value[0] if isinstance(value, list) and len(value) == 1 else value
    if found is None or found == "" or (isinstance(found, float) and math.isnan(found)):
        return None
    if isinstance(found, bool | bytes):
        return str(found) if isinstance(found, bool) else found.decode("utf-8", "backslashreplace")
    if isinstance(found, float) and found.is_integer():
        return int(found)
    if isinstance(found, int | str):
        return found
    shown = str(value) if len(str(value)) < 60 else f"{str(value)[:60]} ..."
    raise InputError(
        f"data.source {where} has in row {row} the {column} {shown}; expected one class an image, a text or a whole "
        f"number; {REMEDY}"
    )


def _checked(labels: np.ndarray, rows: list[Any], names: list[str], column: str, where: str) -> np.ndarray:
    if len(wrong := np.flatnonzero(labels == -2)):
        raise InputError(
            f"data.source {where} has in row {wrong[0]} the {column} {rows[wrong[0]]!r}; expected a number from 0 to "
            f"{len(names) - 1} or one of its class names; {REMEDY}"
        )
    if len(missing := np.flatnonzero(labels == -1)):
        raise InputError(
            f"data.source {where} has no {column} in {len(missing):,} of {len(rows):,} rows (the first is row "
            f"{missing[0]}); label or remove them, or {REMEDY}"
        )
    return labels
