"""Fonts that have the characters of what is drawn into an image: class names are written in every script."""

import contextlib
import functools
import math
import os
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import ImageFont, features

__all__ = ["class_labels", "figure_families", "font_for", "legible", "load_matplotlib", "shortened"]

SIZE = 13  # pixels
IGNORED = {*range(0xFE00, 0xFE10), 0x200B, 0x200C, 0x200D, 0x200E, 0x200F, 0x2060, 0xFEFF}
"""Characters that choose or join glyphs and have none themselves."""
TURNING = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}
"""Characters that turn the direction of the text after them, by which a name can be drawn as another one."""
UNWRITABLE = ("Cc", "Cs", "Co", "Cn")
"""Categories of characters that nobody can read: control characters, halves of pairs, private and unassigned ones."""


@functools.cache
def load_matplotlib() -> Any:
    """matplotlib, also where MPLBACKEND names a backend that is not there; where it is there, it stays chosen."""
    asked = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if asked is not None:
            os.environ["MPLBACKEND"] = asked
    if asked:
        with contextlib.suppress(ValueError):  # of another program; what is drawn here is drawn by Agg
            matplotlib.rcParams["backend"] = asked
    return matplotlib


def class_labels(
    names: Sequence[str],
    numbers: Iterable[int] | None = None,
    *,
    max_width: float = math.inf,
    complex_scripts: bool = True,
) -> list[str]:
    """What stands for each class in an image: its name, or `class 3` where no font can write it.

    Args:
        numbers: of the classes; None: 0, 1, 2 ...
        max_width: in pixels; longer names are shortened.
        complex_scripts: whether what draws them joins letters and orders them from right to left.
    """
    found = []
    for name, number in zip(names, range(len(names)) if numbers is None else numbers, strict=True):
        text = _one_line(name)
        font = font_for(text) if set(map(ord, text)) - IGNORED else None
        if font is None or (not complex_scripts and _is_complex(text)):
            found.append(f"class {number}")
        else:
            found.append(shortened(text, font, max_width))
    return found


def legible(text: str) -> str:
    """``text`` on one line; where no font has all of its characters, those that DejaVu Sans lacks as escapes."""
    text = _one_line(text)
    if font_for(text) is not None:
        return text
    there = _characters(_font_files()[0])
    known = [ord(c) in there and not _is_unwritable(c) and not _is_complex(c) for c in text]
    return "".join(
        c if is_known else c.encode("unicode_escape").decode() for c, is_known in zip(text, known, strict=True)
    )


def shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """``text``, without its middle where it is wider than ``width`` pixels: names often differ at their ends alone."""
    if font.getlength(text) <= width:
        return text
    for left_out in range(1, len(text)):
        kept = len(text) - left_out
        short = text[: (kept + 1) // 2] + ".." + text[len(text) - kept // 2 :]
        if font.getlength(short) <= width:
            return short
    return ""


@functools.cache
def font_for(text: str, size: int = SIZE) -> ImageFont.FreeTypeFont | ImageFont.ImageFont | None:
    """A font that has every character of ``text``; None where this machine has none."""
    if text.isascii() and text.isprintable():
        return ImageFont.load_default(size)
    if any(map(_is_unwritable, text)):
        return None
    if _is_complex(text) and not features.check("raqm"):
        return None
    file = _file_for(frozenset(map(ord, text)) - IGNORED)
    return None if file is None else ImageFont.truetype(file, size)


def figure_families(texts: Iterable[str]) -> list[str]:
    """The font families with which matplotlib can write all of ``texts``, each of which :func:`font_for` has a font
    for: it takes each character from the first that has it."""
    load_matplotlib()
    from matplotlib.font_manager import fontManager

    files = [_file_for(frozenset(map(ord, text)) - IGNORED) for text in texts if not text.isascii()]
    families = {entry.fname: entry.name for entry in fontManager.ttflist}
    return list(dict.fromkeys(["DejaVu Sans", *(families[file] for file in files if file in families)]))


@functools.cache
def _file_for(codes: frozenset[int]) -> str | None:
    return next((file for file in _font_files() if codes <= _characters(file)), None)


@functools.cache
def _font_files() -> list[str]:
    """DejaVu Sans, which comes with matplotlib, then the upright ones of ordinary weight that the system has."""
    matplotlib = load_matplotlib()
    from matplotlib.font_manager import fontManager

    shipped = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    others = [
        entry
        for entry in fontManager.ttflist
        if entry.style == "normal"
        and entry.weight in (400, "normal", "regular")
        and entry.name != "DejaVu Sans"
        and not entry.name.startswith("Last Resort")  # a box for every character
    ]
    others.sort(key=lambda entry: ("Sans" not in entry.name, entry.name, entry.fname))
    return [str(shipped), *(entry.fname for entry in others)]


@functools.cache
def _characters(file: str) -> frozenset[int]:
    """The code points that a font file has glyphs for; none of a font that cannot be drawn in this size."""
    from matplotlib.ft2font import FT2Font

    try:
        ImageFont.truetype(file, SIZE)  # some fonts of emoji are pictures of one size
        return frozenset(FT2Font(file).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


def _one_line(text: str) -> str:
    """Composed characters, and a space for each stretch of white space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _is_unwritable(character: str) -> bool:
    return unicodedata.category(character) in UNWRITABLE or ord(character) in TURNING


def _is_complex(text: str) -> bool:
    """Whether characters change by their neighbours, or run from right to left."""
    return any(
        unicodedata.bidirectional(c) in ("R", "AL", "AN") or unicodedata.category(c) in ("Mn", "Mc", "Me") for c in text
    )
