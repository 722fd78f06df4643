"""The column with a vector for each image."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twostage.core.errors import InputError
from twostage.core.wording import short_repr

__all__ = ["check_same_length", "read_vectors"]

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
