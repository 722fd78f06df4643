"""TensorBoard and Weights & Biases: they show a run's metrics, images and configuration under the run's name."""

import secrets
from collections.abc import Sequence

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker, get_available_trackers
from PIL import Image

from twostage.core.config.sections import RunConfig, Section, dump_config
from twostage.core.errors import InputError
from twostage.core.runs.run_folder import RunFolder
from twostage.core.wording import one_line

__all__ = ["check_trackers", "show_in_trackers", "start_trackers"]


def check_trackers(names: Sequence[str]) -> None:
    """Refuses `run.trackers` that are not installed.

    Raises:
        InputError: says how to install the tracker, or how to train without it.
    """
    missing = set(names) - {str(tracker) for tracker in get_available_trackers()}
    if missing:
        name = min(missing)
        others = [other for other in names if other not in missing]
        raise InputError(
            f"run.trackers {name}: {name} is not installed; install it (pip install {name}) or set "
            f"run.trackers=[{', '.join(others)}]"
        )


def start_trackers(accelerator: Accelerator, folder: RunFolder, run: RunConfig, config: Section, step: int) -> None:
    """Starts the trackers of a run at ``step``; TensorBoard drops later steps.

    TensorBoard's files lie in the run folder itself, because it names a run after their folder.

    Args:
        config: the whole configuration, to show.

    Raises:
        InputError: one cannot start, for example without a login or a network.
    """
    if accelerator.is_main_process:  # only this process logs
        accelerator.log_with += [_make_tracker(name, folder, run.project, step) for name in run.trackers]
    try:
        accelerator.init_trackers(run.project)
    except Exception as error:  # a tracker can raise anything: no login, no network, a broken installation
        raise InputError(
            f"run.trackers {', '.join(run.trackers)}: could not be started ({one_line(error)}). Log in (wandb login), "
            "set WANDB_MODE=offline, or remove the tracker: run.trackers=[]"
        ) from error
    for tracker in accelerator.trackers:
        if isinstance(tracker, TensorBoardTracker):
            tracker.tracker.add_text("config", f"```yaml\n{dump_config(config)}```", step)
        else:
            tracker.store_init_configuration(config.model_dump(mode="json"))


def _make_tracker(name: str, folder: RunFolder, project: str, step: int) -> GeneralTracker:
    if name == "tensorboard":
        return TensorBoardTracker("", folder.path, purge_step=step)
    known = folder.path / "wandb_id.txt"  # with it, a resumed run continues its curves
    if not known.exists():
        known.write_text(secrets.token_hex(4))
    return WandBTracker(project, name=folder.path.name, dir=folder.path, id=known.read_text(), resume="allow")


def show_in_trackers(accelerator: Accelerator, image: Image.Image, step: int, tag: str) -> None:
    """Hands an RGB image to the trackers as ``tag``; only the main process calls it."""
    for tracker in accelerator.trackers:
        form = {"dataformats": "NHWC"} if isinstance(tracker, TensorBoardTracker) else {}
        tracker.log_images({tag: np.asarray(image)[None]}, step=step, **form)
