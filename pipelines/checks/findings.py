"""What the checks of `twostage doctor` yield."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding"]


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    topic: str
    """What was looked at: `packages`, `GPU`, `run folder` ..."""
    status: Literal["ok", "warning", "problem"]
    """A warning may be meant so; a problem stops a training or makes it wrong."""
    message: str
    """What was found."""
    advice: str = ""
    """What to do about it; empty where it is ok."""
