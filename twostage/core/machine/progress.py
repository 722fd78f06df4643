"""Progress bars on a terminal, and plain lines where there is none."""

import sys
from typing import Any

from tqdm import tqdm

__all__ = ["ProgressBar", "on_terminal"]

SECONDS = 60.0
"""Between two lines where there is no terminal."""


def on_terminal() -> bool:
    """Whether a progress bar, which draws over itself, can be seen."""
    return sys.stderr.isatty()


class ProgressBar(tqdm):
    """tqdm's bar; in a file or a pipe a line a minute instead, because a bar is one line of many kilobytes there."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._in_lines = not on_terminal()
        if self._in_lines:
            options |= {"leave": False, "mininterval": SECONDS, "maxinterval": SECONDS, "delay": SECONDS}
            what = "{desc}: " if options.get("desc") else ""
            options["bar_format"] = what + "{percentage:.0f}%, {elapsed} so far, {remaining} left"
        super().__init__(*args, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:  # type: ignore[override]
        """Draws the bar, or writes the line."""
        if not self._in_lines:
            return bool(super().display(msg, pos))
        if msg is None:
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return False  # nothing to wipe out
