"""Requests to stop a command early: a scheduler's signal, Ctrl-C, or a time limit."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from twostage.core.errors import INTERRUPTED, StopAsked
from twostage.core.machine.command import is_first_process

__all__ = ["StopRequests", "resumable"]


@contextmanager
def resumable() -> Iterator[None]:
    """Make SIGTERM and SIGUSR1 (a scheduler's notice) raise :class:`StopAsked` within the block. Use it for work that
    can resume from disk at any time."""

    def stop(number: int, _: FrameType | None) -> None:
        raise StopAsked(signal.Signals(number).name)

    with _handled({signal.SIGTERM: stop, signal.SIGUSR1: stop}):
        yield


class StopRequests:
    """Requests to stop a run, on which all its processes agree.

    A request may reach one process or all, each at a different step. So the processes combine their requests in the
    background, on the CPU, and read the result one step later: all stop after the same step, and no step waits.

    Args:
        minutes: time limit from now; None: no limit.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self._minutes = minutes
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self._asked: StopAsked | None = None
        self._group: Any = None
        self._pending: tuple[Tensor, Any] | None = None  # the last reduction that was started

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block, signals are noted for :meth:`agreed`; a second Ctrl-C raises at once."""
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo")
        with _handled(dict.fromkeys((signal.SIGTERM, signal.SIGUSR1, signal.SIGINT), self._note)):
            yield
            if self._pending:
                self._pending[1].wait()  # no process leaves while another still needs it

    def agreed(self) -> StopAsked | None:
        """Why all processes stop now, or None. Every process calls it after every step."""
        if self._end is not None and self._asked is None and time.monotonic() >= self._end:
            self._asked = StopAsked(f"the time limit of {self._minutes:g} minutes")
        if self._group is None:
            return self._asked
        before, asked = self._pending, torch.tensor([self._asked.status if self._asked else 0])
        self._pending = asked, dist.all_reduce(asked, dist.ReduceOp.MAX, self._group, async_op=True)
        if before is None:
            return None
        before[1].wait()
        status = int(before[0])
        return (self._asked or StopAsked("a request to another process", status)) if status else None

    def _note(self, number: int, _: FrameType | None) -> None:
        if number != signal.SIGINT:
            self._asked = self._asked or StopAsked(signal.Signals(number).name)
        elif self._asked is None:
            self._asked = StopAsked("Ctrl-C", INTERRUPTED)
            if is_first_process():
                os.write(2, b"\nSaving after this step. Press Ctrl-C again to stop at once.\n")
        else:
            raise KeyboardInterrupt


@contextmanager
def _handled(handlers: dict[signal.Signals, Any]) -> Iterator[None]:
    """Replaces the handlers of signals within the block."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
