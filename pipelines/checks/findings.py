"""The findings of `twostage doctor`."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "ok", "problem", "warning"]


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    topic: str
    """What was checked: `packages`, `GPU`, `run folder` ..."""
    status: Literal["ok", "warning", "problem"]
    """A warning may be intended. A problem stops a training or makes it wrong."""
    message: str
    advice: str = ""
    """How to fix it; empty if it is ok."""


def ok(topic: str, message: str) -> Finding:
    """A finding that needs no action."""
    return Finding(topic, "ok", message)


def warning(topic: str, message: str, advice: str) -> Finding:
    """A finding that may be intended."""
    return Finding(topic, "warning", message, advice)


def problem(topic: str, message: str, advice: str) -> Finding:
    """A finding that stops a training or makes it wrong."""
    return Finding(topic, "problem", message, advice)
