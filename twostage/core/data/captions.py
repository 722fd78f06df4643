"""Captions: the column of a table that holds them, and what its cells mean."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from twostage.core.data.records import AUTO, Captions
from twostage.core.errors import InputError
from twostage.core.wording import short_repr, some_of

__all__ = ["CAPTION_NAMES", "caption_column", "column_cells", "has_captions", "read_captions", "sided_captions"]

CAPTION_NAMES = ("caption", "captions", "text", "texts", "prompt", "prompts", "txt")
_SIDE = re.compile(r"\b(?:left|right)\b", re.IGNORECASE)
_REMEDY = "Set data.caption_column to another column, or to null to use the images without captions"


def caption_column(
    wanted: str | None, schemas: list[pa.Schema], taken: Iterable[str | None], origin: str
) -> tuple[str | None, list[str]]:
    """The column with the captions (None: no captions), and notices about the choice.

    Args:
        wanted: `data.caption_column`: a column, `auto`, or None for no captions.
        schemas: those of all splits.
        taken: columns with a use of their own, which `auto` skips.

    Raises:
        InputError: there is no such column, or it does not hold text.
    """
    if wanted is None:
        return None, []
    kinds: dict[str, list[pa.DataType]] = {}
    for schema in schemas:
        for field in schema:
            kinds.setdefault(field.name, []).append(field.type)
    if wanted != AUTO:
        if wanted not in kinds:
            raise InputError(f"data.caption_column {wanted!r}: expected a column of {origin}, which has {list(kinds)}")
        for kind in kinds[wanted]:
            if not _is_text(kind):
                raise InputError(
                    f"data.caption_column {wanted!r}: expected texts, or lists of texts, but in {origin} it holds "
                    f"{kind}. {_REMEDY}"
                )
        return wanted, []
    found = [name for name in CAPTION_NAMES if name in kinds and name not in set(taken)]
    found = [name for name in found if all(map(_is_text, kinds[name]))]
    if not found[1:]:
        return next(iter(found), None), []
    others = some_of(map(repr, found[1:]))
    notice = f"the captions come from the column {found[0]!r}, not from {others}"
    return found[0], [f"{notice}; set data.caption_column=NAME to use another"]


def _is_text(kind: pa.DataType) -> bool:
    """Whether a column's cells are texts or lists of texts; one that is always missing counts too."""
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _is_text(kind.value_type)
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(test(kind) for test in tests)


def column_cells(table: pa.Table, column: str, origin: str) -> list[Any]:
    """The cells of a column; None in each row of a table without it.

    Raises:
        InputError: a text is not UTF-8.
    """
    if column not in table.schema.names:
        return [None] * table.num_rows
    cells = table.column(column)
    try:
        return cells.to_pylist()
    except UnicodeDecodeError:
        pass
    for row, cell in enumerate(cells):
        try:
            cell.as_py()
        except UnicodeDecodeError as error:
            raise InputError(
                f"data.source {origin}, row {row}: the {column} is not valid UTF-8 ({error.reason}). Fix this row. "
                f"{_REMEDY}"
            ) from None
    raise AssertionError("a column that is not UTF-8 has a cell that is not")


def sided_captions(captions: Captions) -> str:
    """What is wrong with the captions of images that are mirrored: some say left or right; "" if none does."""
    count = sum(any(map(_SIDE.search, texts)) for texts in captions)
    found = f"{count:,} of {len(captions):,} training images have captions with the words left or right"
    return f"{found}, which are wrong for their mirrored copies" if count else ""


def read_captions(cells: Sequence[Any], names: Sequence[str], column: str) -> Captions:
    """The captions in each cell: a text, a list of texts, or None. Blank texts are no captions.

    Args:
        names: the name of each image, for messages.

    Raises:
        InputError: a cell is something else, or its text cannot be written as UTF-8.
    """
    return [_read_cell(cell, names[row], column) for row, cell in enumerate(cells)]


def _read_cell(cell: Any, name: str, column: str) -> tuple[str, ...]:
    texts = cell if isinstance(cell, list | tuple) else [cell]
    captions = []
    for text in texts:
        if text is None:
            continue
        if not isinstance(text, str):
            raise InputError(
                f"data.source {name}: {column} is {short_repr(cell, 60)}, expected a text or a list of texts. {_REMEDY}"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"data.source {name}: the {column} {short_repr(text, 60)} is not valid Unicode ({error.reason}). Fix "
                f"this text. {_REMEDY}"
            ) from None
        if text := text.replace("\0", " ").strip():
            captions.append(text)
    return tuple(captions)


def has_captions(captions: Captions | None) -> bool:
    """Whether any image has a caption."""
    return captions is not None and any(captions)
