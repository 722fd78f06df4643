"""Start and end commands: a user's mistake is one sentence, never a traceback."""

import errno
import functools
import gc
import io
import os
import sys
from collections.abc import Callable

import typer

from twostage.core.errors import INTERRUPTED, InputError, StopAsked

__all__ = ["as_command", "is_first_process", "new_app", "prepare_process", "print_once", "run_command"]

DISK_ERRORS = {
    *(errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO),
}
"""A wrong path, or a full or broken disk: not a bug."""
LOST_CONNECTION = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""Parts of the errors of torch's gloo when another process has exited."""


def prepare_process() -> None:
    """Make this process independent of the environment it was started in; every command calls it first.

    Characters missing in the terminal's encoding are written as escapes. twostage only uses matplotlib's Agg canvas, so
    the backend that MPLBACKEND names for other programs, such as a notebook, need not be installed.
    """
    # Importing torch makes a million objects. With Python's default, 700, the collector takes a fifth of each start.
    gc.set_threshold(5000)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    os.environ["MPLBACKEND"] = "agg"


def new_app(help_text: str | None = None) -> typer.Typer:
    """A command line that shows bugs with Python's own traceback."""
    return typer.Typer(
        help=help_text,
        add_completion=False,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def as_command(function: Callable[..., object]) -> Callable[..., None]:
    """``function`` as a command that exits with the status

    - 2 after an :class:`InputError`, or if a file cannot be written; of several processes, the first to fail prints it;
    - 1 if another process of the run exited (that process prints why);
    - 75 (run again to resume) if it was asked to stop, and 130 after Ctrl-C.
    """

    @functools.wraps(function)
    def command(*args: object, **kwargs: object) -> None:
        try:
            function(*args, **kwargs)
        except InputError as error:
            _exit(f"error: {error}", 2)
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            where = error.filename2 or error.filename or "a file"
            _exit(f"error: {where}: {error.strerror}. Free some space, fix the permissions, or choose another path", 2)
        except StopAsked as stop:
            _exit(f"stopped ({stop.reason}). Run the same command again to resume", stop.status)
        except KeyboardInterrupt:
            _exit("\nstopped. Run the same command again to resume from the last checkpoint", INTERRUPTED)
        except RuntimeError as error:
            if not any(text in str(error) for text in LOST_CONNECTION):
                raise
            _exit(
                "error: another process of this run exited, so this one is stopping. Fix its error, then run the same "
                "command again to resume",
                1,
            )

    return command


def run_command(function: Callable[..., object]) -> None:
    """Run ``function`` with this process's arguments, for `python -m` and `accelerate launch -m`."""
    prepare_process()
    app = new_app()
    app.command()(as_command(function))
    app()


def is_first_process() -> bool:
    """Whether this is the first of the processes that a launcher started; known even before they are connected."""
    return os.environ.get("RANK", "0") == "0"


def print_once(message: str) -> None:
    """Print from the first process only."""
    if is_first_process():
        print(message, flush=True)


def _exit(message: str, status: int) -> None:
    if _is_first_to_speak():
        print(message, file=sys.stderr, flush=True)
    raise typer.Exit(status) from None


def _is_first_to_speak() -> bool:
    """Whether this process is the first to print the command's last message; the others print nothing."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    distributed = sys.modules.get("torch.distributed")  # importing it would take a second
    if distributed is None or not distributed.is_initialized():
        return is_first_process()  # not connected yet: all have the same message
    try:
        return distributed.distributed_c10d._get_default_store().add("twostage: has spoken", 1) == 1
    except RuntimeError:  # the process with the store has exited
        return True
