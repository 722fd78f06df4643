"""A vector for each image: from a column, or from a file of `twostage embed`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from twostage.core.data.records import Records
from twostage.core.errors import InputError
from twostage.core.files import replacing
from twostage.core.wording import short_repr, some_of

__all__ = ["TABLE_FILE", "VECTOR_FILE", "add_vectors", "check_same_length", "read_vectors", "write_embeddings"]

VECTOR_FILE = ".npz"
"""The ending of files of vectors."""
TABLE_FILE = ".parquet"

_REMEDY = "Fix this row, or set data.vector_column=null to use the images without vectors"
_OTHER = "Set data.vector_column to another column, or to null to use the images without vectors"


def read_vectors(cells: pa.ChunkedArray, names: Sequence[str], column: str) -> np.ndarray:
    """Vectors (n, d) float32 from a column whose cells are lists of numbers.

    Args:
        names: the name of each image, for messages.

    Raises:
        InputError: a cell is missing, holds something else than finite numbers, or has another length than the first.
    """
    kind = cells.type
    if not any(test(kind) for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)):
        raise InputError(f"data.vector_column {column!r}: expected lists of numbers, but it holds {kind}. {_OTHER}")
    lengths = pc.fill_null(pc.list_value_length(cells), -1).to_numpy()  # type: ignore[attr-defined]
    if len(wrong := np.flatnonzero((lengths < 1) | (lengths != lengths[0]))):
        row = wrong[0]
        got = "no vector" if lengths[row] < 1 else f"{lengths[row]} numbers"
        expected = f"{lengths[0]}, as in the first row" if row else "at least one number"
        raise InputError(f"data.source {names[row]}: {column} has {got}, expected {expected}. {_REMEDY}")
    numbers = pc.list_flatten(cells)  # type: ignore[attr-defined]
    if not (pa.types.is_integer(numbers.type) or pa.types.is_floating(numbers.type)):
        first = short_repr(cells[0].as_py(), 60)
        raise InputError(f"data.source {names[0]}: {column} is {first}, expected a list of numbers. {_OTHER}")
    with np.errstate(over="ignore"):  # too large numbers become infinite, which is refused below
        vectors = np.asarray(numbers.to_numpy(), dtype=np.float32).reshape(len(cells), -1)
    if len(wrong := np.flatnonzero(~np.isfinite(vectors).all(axis=1))):
        raise InputError(
            f"data.source {names[wrong[0]]}: {column} contains a missing, infinite or too large number, expected "
            f"numbers that fit into 32 bits. {_REMEDY}"
        )
    return vectors


def check_same_length(vectors: Mapping[str, np.ndarray | None], column: str) -> None:
    """Check that all splits have vectors of the same length.

    Raises:
        InputError: they do not.
    """
    lengths = {split: found.shape[1] for split, found in vectors.items() if found is not None}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{length} in `{split}`" for split, length in lengths.items())
        raise InputError(f"data.vector_column {column!r}: has vectors of {shown}, expected one length. {_OTHER}")


def write_embeddings(
    file: Path,
    splits: Mapping[str, Records],
    what: str,
    values: Mapping[str, np.ndarray],
    class_names: Sequence[str] | None,
) -> None:
    """Write the values (n, ...) of the images of each split with what identifies the images.

    A `.npz` has the arrays ``what`` (N, ...), `names` and `splits` (N,), and, if the images have classes, `labels` (N,)
    int64 and `class_names`. A `.parquet` has the same columns, with `class` instead of `class_names`; each value is a
    flat list, whose shape is in the table's metadata.

    Args:
        what: `vectors`, `latents` or `codes`.
    """
    arrays = {
        what: np.concatenate([values[split] for split in splits]),
        "names": np.array([name for records in splits.values() for name in _names(records)]),
        "splits": np.repeat(list(splits), [len(records) for records in splits.values()]),
    }
    labels = [records.labels for records in splits.values() if records.labels is not None]
    if len(labels) == len(splits):
        arrays["labels"] = np.concatenate(labels)
        if class_names is not None:
            arrays["class_names"] = np.array(class_names)
    with replacing(file) as partial, partial.open("wb") as opened:
        if file.suffix == TABLE_FILE:
            pq.write_table(_as_table(arrays, what), opened)
        else:
            np.savez(opened, **arrays)


def _as_table(arrays: dict[str, np.ndarray], what: str) -> pa.Table:
    values, columns = arrays[what], {key: pa.array(arrays[key]) for key in ("names", "splits")}
    if "labels" in arrays:
        columns["labels"] = pa.array(arrays["labels"])
    if "class_names" in arrays:
        columns["class"] = pa.array(arrays["class_names"][arrays["labels"]])
    flat = pa.array(values.reshape(-1))
    columns[what] = pa.FixedSizeListArray.from_arrays(flat, values[0].size)
    return pa.table(columns).replace_schema_metadata({"shape": ",".join(map(str, values.shape[1:]))})


def add_vectors(splits: Mapping[str, Records], file: Path) -> dict[str, Records]:
    """The splits with the vectors of a `.npz` of :func:`write_embeddings`, by the images' names.

    Raises:
        InputError: not such a file, or one without some of the images.
    """
    try:
        with np.load(file) as arrays:
            vectors, rows = arrays["vectors"], {name: row for row, name in enumerate(arrays["names"].tolist())}
    except FileNotFoundError:
        raise InputError(f"data.vector_column {file}: no such file. Write it with twostage embed") from None
    except (OSError, ValueError, KeyError, BadZipFile, AttributeError):  # another file
        raise InputError(
            f"data.vector_column {file}: expected arrays `vectors` and `names`. Write it with twostage embed"
        ) from None
    if vectors.ndim != 2 or len(vectors) != len(rows) or vectors.dtype != np.float32 or not np.isfinite(vectors).all():
        raise InputError(
            f"data.vector_column {file}: expected a float32 array `vectors` with a row of finite numbers for each of "
            f"{len(rows)} names, got {vectors.dtype} of the shape {vectors.shape}. Write it with twostage embed"
        )
    if missing := [name for records in splits.values() for name in _names(records) if name not in rows]:
        raise InputError(
            f"data.vector_column {file}: has no vectors of {len(missing):,} of the images: {some_of(missing)}. Write "
            "it again with twostage embed"
        )
    return {
        split: replace(records, vectors=vectors[[rows[name] for name in _names(records)]])
        for split, records in splits.items()
    }


def _names(records: Records) -> Iterable[str]:
    """The names of the images without their location."""
    return (name.removeprefix(records.origin).lstrip("/:") for name in records.names)
