"""Shorten names, values and errors to one line for messages."""

import os
from collections.abc import Iterable
from typing import Any

__all__ = ["one_line", "printable", "short_repr", "some_of"]


def some_of(names: Iterable[object], most: int = 5) -> str:
    """The first names of a list that may be long: `a, b, c, d, e and 7 more`."""
    texts = [str(name) for name in names]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most:,} more" if len(texts) > most else "")


def one_line(error: object, max_length: int = 200) -> str:
    """The message of an error, cut to ``max_length`` characters; the type of the error if it has no message."""
    text = " ".join(str(error).split())
    return (text if len(text) <= max_length else f"{text[:max_length]} ...") or type(error).__name__


def short_repr(value: Any, max_length: int = 120) -> str:
    """`repr(value)`, cut to ``max_length`` characters."""
    text = repr(value)
    return text if len(text) <= max_length else f"{text[:max_length]} ..."


def printable(name: str | os.PathLike[str]) -> str:
    """A file's name on one line; bytes and characters that cannot be printed become escapes."""
    if (text := os.fspath(name)).isprintable():
        return text
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
