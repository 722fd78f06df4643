"""How a command ends: a user's mistake is one sentence, never a traceback."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from core.errors import InputError

__all__ = ["run_command"]


def run_command(command: Callable[[], object]) -> NoReturn:
    """Runs ``command`` and exits: 0, or 2 after an :class:`InputError` (said once, by the main process), or 130 after
    Ctrl-C."""
    status = 0
    try:
        command()
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        status = 130
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)
