"""Progress bars on a terminal, plain lines elsewhere."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from twostage.core.machine.command import print_once

__all__ = ["ProgressBar", "announced", "on_terminal"]

SECONDS_BETWEEN_LINES = 60.0
SECONDS_OF_SILENCE = 1.0


def on_terminal() -> bool:
    """Whether progress bars, which overwrite their line, are readable."""
    return sys.stderr.isatty()


@contextmanager
def announced(sentence: str) -> Iterator[None]:
    """Print ``sentence`` if the block takes more than a second."""
    timer = threading.Timer(SECONDS_OF_SILENCE, print_once, [sentence])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class ProgressBar(tqdm):
    """tqdm's bar; in a file or pipe one line per minute, because a bar would become one line of many kilobytes."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._in_lines = not on_terminal()
        if self._in_lines:
            options |= dict.fromkeys(("mininterval", "maxinterval", "delay"), SECONDS_BETWEEN_LINES) | {"leave": False}
            what = "{desc}: " if options.get("desc") else ""
            options["bar_format"] = what + "{percentage:.0f}%, {elapsed} so far, {remaining} left"
        super().__init__(*args, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:  # type: ignore[override]
        """Draw the bar, or write the line."""
        if not self._in_lines:
            return bool(super().display(msg, pos))
        if msg is None:
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return False  # nothing to erase
