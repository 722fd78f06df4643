"""Errors that end a command early: the user's mistakes and requests to stop. Any other error is a bug and keeps its
traceback."""

import signal

__all__ = ["INTERRUPTED", "START_AGAIN", "InputError", "StopAsked"]

START_AGAIN = 75
"""The exit status for "nothing is wrong: run the same command again to resume" (EX_TEMPFAIL in sysexits.h)."""
INTERRUPTED = 128 + signal.SIGINT
"""The exit status after Ctrl-C."""


class InputError(ValueError):
    """A mistake in a config, a path, an image or an option.

    The message names the field or file, the value, what was expected and the fix. Commands print it without a
    traceback.
    """


class StopAsked(BaseException):
    """A request to stop a command that resumes when it is run again. Not an error, so that no error handler catches it.

    Args:
        reason: who asked.
        status: the command's exit status.
    """

    def __init__(self, reason: str, status: int = START_AGAIN) -> None:
        super().__init__(reason)
        self.reason, self.status = reason, status
