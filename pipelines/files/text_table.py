"""A table as text, for a terminal."""

from collections.abc import Mapping, Sequence

__all__ = ["text_table"]


def text_table(columns: Mapping[str, str], rows: Sequence[Mapping[str, str]]) -> str:
    """A table; ``columns`` maps keys to titles. A row without a key has an empty cell there."""
    cells = [list(columns.values()), *([row.get(key, "") for key in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
    return "\n".join(line.rstrip() for line in lines)
