"""How a command ends: a user's mistake is one sentence, never a traceback."""

import errno
import functools
import os
import sys
from collections.abc import Callable

import typer

from core.errors import InputError

__all__ = ["as_command", "new_app", "run_command"]

OF_THE_DISK = {errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOSPC, errno.EROFS}
"""Of files and folders: a wrong place or a full disk, and no mistake of the program."""


def new_app(help_text: str | None = None) -> typer.Typer:
    """A command line whose bugs show Python's own traceback."""
    return typer.Typer(help=help_text, add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


def as_command(function: Callable[..., object]) -> Callable[..., None]:
    """``function`` as a command: an :class:`InputError`, or a file that cannot be written where it should, is said
    once, by the main process, and exits with 2; Ctrl-C exits with 130."""

    @functools.wraps(function)
    def command(*args: object, **kwargs: object) -> None:
        try:
            function(*args, **kwargs)
        except InputError as error:
            if os.environ.get("RANK", "0") == "0":
                print(f"error: {error}", file=sys.stderr, flush=True)
            raise typer.Exit(2) from None
        except OSError as error:
            if error.errno not in OF_THE_DISK or error.filename is None:
                raise
            if os.environ.get("RANK", "0") == "0":
                where = error.filename2 or error.filename
                print(f"error: {where}: {error.strerror}; give another place, or mend it", file=sys.stderr, flush=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            print("\nstopped; a training goes on from its last checkpoint by the same command", file=sys.stderr)
            raise typer.Exit(130) from None

    return command


def run_command(function: Callable[..., object]) -> None:
    """Runs ``function`` on this process's arguments: what `python -m` and `accelerate launch -m` start."""
    app = new_app()
    app.command()(as_command(function))
    app()
