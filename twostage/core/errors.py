"""How a command ends before its work is done: by the user's mistake, or because it was asked to stop. Everything else
is a bug and keeps its traceback."""

import signal

__all__ = ["INTERRUPTED", "START_AGAIN", "InputError", "StopAsked"]

START_AGAIN = 75
"""The exit status that says: nothing is wrong, the same command goes on (EX_TEMPFAIL of sysexits.h)."""
INTERRUPTED = 128 + signal.SIGINT
"""The exit status after Ctrl-C."""


class InputError(ValueError):
    """A mistake in a config, a path, an image or an option.

    The message names the field or file, what was got, what was expected and what to do. Commands print it as one
    clear sentence without a traceback.
    """


class StopAsked(BaseException):
    """Ends a command that goes on when it is started again. No error, so that nothing on the way takes it for one.

    Args:
        reason: who asked.
        status: that the command exits with.
    """

    def __init__(self, reason: str, status: int = START_AGAIN) -> None:
        super().__init__(reason)
        self.reason, self.status = reason, status
