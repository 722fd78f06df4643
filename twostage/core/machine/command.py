"""How a command ends: a user's mistake is one sentence, never a traceback."""

import errno
import functools
import io
import os
import sys
from collections.abc import Callable

import typer

from twostage.core.errors import INTERRUPTED, InputError, StopAsked

__all__ = ["as_command", "new_app", "prepare_process", "print_once", "run_command"]

OF_THE_DISK = {
    *(errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO),
}
"""Of files and folders: a wrong place, a full disk or a broken one, and no mistake of the program."""
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""What torch's gloo says where another process has ended."""


def prepare_process() -> None:
    """Makes this process independent of where it was started; called first by every command.

    Characters that the terminal's encoding does not have are written as escapes. Of matplotlib only its Agg canvas is
    used, so the backend that MPLBACKEND names for other programs (a notebook's, say) need not be there.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    os.environ["MPLBACKEND"] = "agg"


def new_app(help_text: str | None = None) -> typer.Typer:
    """A command line whose bugs show Python's own traceback."""
    return typer.Typer(help=help_text, add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


def as_command(function: Callable[..., object]) -> Callable[..., None]:
    """``function`` as a command, which ends with the status

    - 2 after an :class:`InputError`, or a file that cannot be written where it should: said once, by the first of
      several processes that has one;
    - 1 where another process of the run has ended, which says why;
    - 75 (start me again) where it was asked to stop, and 130 after Ctrl-C.
    """

    @functools.wraps(function)
    def command(*args: object, **kwargs: object) -> None:
        try:
            function(*args, **kwargs)
        except InputError as error:
            _end(f"error: {error}", 2)
        except OSError as error:
            if error.errno not in OF_THE_DISK:
                raise
            where = error.filename2 or error.filename or "a file"
            _end(f"error: {where}: {error.strerror}; make room, mend it or give another place", 2)
        except StopAsked as stop:
            _end(f"stopped ({stop.reason}); the same command goes on", stop.status)
        except KeyboardInterrupt:
            _end("\nstopped; a training goes on from its last checkpoint by the same command", INTERRUPTED)
        except RuntimeError as error:
            if not any(lost in str(error) for lost in LOST):
                raise
            _end("error: another process of this run has ended, and so does this one; the same command goes on", 1)

    return command


def run_command(function: Callable[..., object]) -> None:
    """Runs ``function`` on this process's arguments: what `python -m` and `accelerate launch -m` start."""
    prepare_process()
    app = new_app()
    app.command()(as_command(function))
    app()


def print_once(message: str) -> None:
    """Prints from the first of the processes that a launcher started, also before they have met."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def _end(message: str, status: int) -> None:
    if _is_first_to_speak():
        print(message, file=sys.stderr, flush=True)
    raise typer.Exit(status) from None


def _is_first_to_speak() -> bool:
    """Of the processes that one command was launched as, the first that has something to say at its end says it."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    distributed = sys.modules.get("torch.distributed")  # not imported for its own sake: that takes a second
    if distributed is None or not distributed.is_initialized():
        return os.environ.get("RANK", "0") == "0"  # they have not met yet: all have the same to say
    try:
        return distributed.distributed_c10d._get_default_store().add("twostage: has spoken", 1) == 1
    except RuntimeError:  # the process that kept the store is gone
        return True
