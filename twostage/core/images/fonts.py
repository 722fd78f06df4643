"""Fonts for text that is drawn into images: class names may be in any script."""

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

__all__ = ["class_labels", "figure_families", "fit_width", "font_for", "legible", "load_matplotlib"]

SIZE = 13  # pixels
IGNORED = {*range(0xFE00, 0xFE10), 0x200B, 0x200C, 0x200D, 0x200E, 0x200F, 0x2060, 0xFEFF}
"""Characters without a glyph of their own, which select or join the glyphs of others."""
DIRECTION_MARKS = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}
"""Characters that change the direction of the text after them, so that one name can be made to look like another."""
UNWRITABLE = ("Cc", "Cs", "Co", "Cn")
"""Categories of characters that cannot be drawn: control characters, surrogates, private and unassigned ones."""


@functools.cache
def load_matplotlib() -> Any:
    """Import matplotlib, even if MPLBACKEND names a missing backend; an existing one stays selected."""
    asked = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if asked is not None:
            os.environ["MPLBACKEND"] = asked
    if asked:
        with contextlib.suppress(ValueError):  # a missing backend does not matter: twostage draws with Agg
            matplotlib.rcParams["backend"] = asked
    return matplotlib


def class_labels(
    names: Sequence[str],
    numbers: Iterable[int] | None = None,
    *,
    max_width: float = math.inf,
    complex_scripts: bool = True,
) -> list[str]:
    """The text for each class in an image: its name, or `class 3` if no font can write it.

    Args:
        numbers: the number of each class; None: 0, 1, 2 ...
        max_width: in pixels; longer names are shortened.
        complex_scripts: whether the renderer can join letters and write from right to left.
    """
    found = []
    for name, number in zip(names, range(len(names)) if numbers is None else numbers, strict=True):
        text = _one_line(name)
        font = font_for(text) if set(map(ord, text)) - IGNORED else None
        if font is None or (not complex_scripts and _is_complex(text)):
            found.append(f"class {number}")
        else:
            found.append(fit_width(text, font, max_width))
    return found


def legible(text: str) -> str:
    """``text`` on one line; if no font has all its characters, those missing in DejaVu Sans become escapes."""
    text = _one_line(text)
    if font_for(text) is not None:
        return text
    available = _characters(_font_files()[0])
    known = [ord(c) in available and not _is_unwritable(c) and not _is_complex(c) for c in text]
    return "".join(
        c if is_known else c.encode("unicode_escape").decode() for c, is_known in zip(text, known, strict=True)
    )


def fit_width(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """``text``, without its middle if it is wider than ``width`` pixels: names often only differ at their ends."""
    if font.getlength(text) <= width:
        return text
    for kept in range(len(text) - 1, 0, -1):
        short = text[: (kept + 1) // 2] + ".." + text[len(text) - kept // 2 :]
        if font.getlength(short) <= width:
            return short
    return ""


@functools.cache
def font_for(text: str, size: int = SIZE) -> ImageFont.FreeTypeFont | ImageFont.ImageFont | None:
    """A font with every character of ``text``; None if this machine has none."""
    if text.isascii() and text.isprintable():
        return ImageFont.load_default(size)
    if any(map(_is_unwritable, text)):
        return None
    if _is_complex(text) and not features.check("raqm"):
        return None
    file = _file_for(frozenset(map(ord, text)) - IGNORED)
    return None if file is None else ImageFont.truetype(file, size)


def figure_families(texts: Iterable[str]) -> list[str]:
    """The font families for matplotlib to write ``texts``, for each of which :func:`font_for` finds a font. matplotlib
    takes each character from the first family that has it."""
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
    """DejaVu Sans, which comes with matplotlib, then the system's upright fonts of regular weight."""
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
    """The code points with a glyph in a font file; none if the font cannot be drawn in this size."""
    from matplotlib.ft2font import FT2Font

    try:
        ImageFont.truetype(file, SIZE)  # some emoji fonts only have bitmaps of one size
        return frozenset(FT2Font(file).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


def _one_line(text: str) -> str:
    """Compose characters and replace each run of white space by one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _is_unwritable(character: str) -> bool:
    return unicodedata.category(character) in UNWRITABLE or ord(character) in DIRECTION_MARKS


def _is_complex(text: str) -> bool:
    """Whether characters change shape next to others, or are written from right to left."""
    return any(
        unicodedata.bidirectional(c) in ("R", "AL", "AN") or unicodedata.category(c) in ("Mn", "Mc", "Me") for c in text
    )
