"""Accelerate's trackers, such as tensorboard: a missing one is an error before training, and none fails in silence."""

from collections.abc import Sequence

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from twostage.core.errors import InputError

__all__ = ["check_trackers", "start_trackers"]


def check_trackers(names: Sequence[str]) -> None:
    """Refuses `run.trackers` that are not installed.

    Raises:
        InputError: one is not; says how to install it, or how to train without it.
    """
    missing = set(names) - {str(tracker) for tracker in get_available_trackers()}
    if missing:
        name = min(missing)
        others = [other for other in names if other not in missing]
        raise InputError(
            f"run.trackers {name}: {name} is not installed; install it (pip install {name}) or set "
            f"run.trackers=[{', '.join(others)}]"
        )


def start_trackers(accelerator: Accelerator, names: Sequence[str], step: int) -> None:
    """Starts the trackers of a run that is at ``step``; what tensorboard had of later steps is dropped.

    Raises:
        InputError: one cannot start, such as without a login or a network.
    """
    purge = {"tensorboard": {"purge_step": step}} if "tensorboard" in names else {}
    try:
        accelerator.init_trackers("tensorboard", init_kwargs=purge)
    except Exception as error:  # a tracker can raise anything: no login, no network, a broken installation
        raise InputError(
            f"run.trackers {', '.join(names)}: could not be started "
            f"({' '.join(str(error).split()) or type(error).__name__}). Log in (wandb login), set "
            "WANDB_MODE=offline, or remove the tracker: run.trackers=[]"
        ) from error
