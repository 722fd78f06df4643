"""The journal of a run: metrics, progress, trackers, curves and checkpoints."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from twostage.core.images.sheets import draw_curves, save_image
from twostage.core.machine.progress import on_terminal
from twostage.core.machine.sharding import full_tensors
from twostage.core.runs.checkpoint import Checkpoints
from twostage.core.runs.run_folder import RunFolder, read_metrics
from twostage.core.training.batches import Batches
from twostage.core.training.running_means import Means, RunningMeans
from twostage.core.training.trackers import show_in_trackers

__all__ = ["Journal", "print_above_bar"]


def print_above_bar(*messages: str) -> None:
    """Prints a line for each message from the main process, above a progress bar."""
    if PartialState().is_main_process:
        for message in messages:
            tqdm.write(message)


class Journal:
    """Writes what one run keeps. All processes call it; the main one writes.

    Args:
        keep_checkpoints: how many of the newest to keep.
    """

    def __init__(self, folder: RunFolder, accelerator: Accelerator, keep_checkpoints: int) -> None:
        self.folder, self.accelerator = folder, accelerator
        self.checkpoints = Checkpoints(folder.checkpoints, keep_checkpoints)
        self.means = RunningMeans()
        self.bar = tqdm(disable=True)

    def latest_checkpoint(self) -> Path | None:
        """The newest intact checkpoint, or None; reports damaged ones. Locks the folder of a run that has begun.

        Raises:
            InputError: another process trains into the folder, or all checkpoints are damaged.
        """
        found: list[Any] = [None, []]
        if self.accelerator.is_main_process:
            if self.folder.config_file.exists():
                self.folder.lock()
            found = list(self.checkpoints.latest())
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        checkpoint, damaged = found
        print_above_bar(*damaged)
        return checkpoint

    def progress_bar(self, batches: Batches, step: int) -> tqdm:
        """A bar of steps from ``step`` to the last; it is only drawn on a terminal."""
        self.bar = tqdm(
            total=batches.max_steps,
            initial=step,
            unit="step",
            smoothing=0.05,
            dynamic_ncols=True,
            mininterval=0.5,
            disable=not (self.accelerator.is_main_process and on_terminal()),
        )
        return self.bar

    def gather(self, tensor: Tensor) -> Tensor:
        """(...) of each process -> (processes, ...)."""
        return self.accelerator.gather(tensor[None])  # type: ignore[return-value]

    def write_metrics(self, split: str, step: int, metrics: Mapping[str, float]) -> None:
        """Adds one line to metrics.jsonl, and hands it to the trackers."""
        if self.accelerator.is_main_process:
            self.folder.append_metrics({"step": step, "split": split, **metrics})
        self.accelerator.log({f"{split}/{name}": value for name, value in metrics.items()}, step=step)

    def write_training(
        self, means: Means, step: int, lr: float, batches: Batches, seconds_per_step: float
    ) -> dict[str, float]:
        """Writes and shows the means that are finite, and returns them.

        Args:
            lr: the learning rate of this step.
            seconds_per_step: nan: not known yet.
        """
        metrics = {name: value for name, value in means.values.items() if np.isfinite(value)}
        self.write_metrics("train", step, metrics | {"lr": lr})
        shown = _shown(metrics)
        if seconds_per_step > 0:
            shown += f", {batches.batch_size / seconds_per_step:.4g} img/s"
        self.bar.set_postfix_str(shown, refresh=False)
        if not on_terminal():
            line = f"step {step}/{batches.max_steps}: {shown}"
            if seconds_per_step > 0:
                line += f", {tqdm.format_interval(seconds_per_step * (batches.max_steps - step))} left"
            print_above_bar(line)
        return metrics

    def write_validation(self, metrics: Mapping[str, float], step: int, label: str) -> None:
        """Writes and reports held-out metrics."""
        self.write_metrics("val", step, metrics)
        print_above_bar(f"step {step}: {label}: {_shown(metrics)}")

    def show_image(self, image: Image.Image, step: int, tag: str, name: str) -> None:
        """Writes an RGB image into samples/, and hands it to the trackers as ``tag``; only the main process calls it.

        Args:
            name: the end of the file's name, after the step; "" for a run's main images.
        """
        save_image(image, self.folder.samples / f"step_{step:08d}{name and '_'}{name}.png")
        show_in_trackers(self.accelerator, image, step, tag)

    def save(
        self,
        step: int,
        tensors: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        curves: dict[str, Any],
        write_model: Callable[[Path], None] | None,
    ) -> None:
        """Writes the model, the curves and a checkpoint.

        Args:
            tensors: by the name of their file; FSDP's shards are gathered.
            curves: the title and further arguments of :func:`draw_curves`.
            write_model: called with the folder `model/`.
        """
        tensors = {name: full_tensors(group) for name, group in tensors.items()}
        if means := self.means.state(self.gather):  # not empty if the run was asked to stop between two lines
            tensors["means"] = means
        if self.accelerator.is_main_process:
            # The checkpoint is written last: a run that resumes from it finds all other files.
            if write_model:
                write_model(self.folder.model)
            draw_curves(read_metrics(self.folder.metrics_file), self.folder.curves, **curves)
            self.checkpoints.save(step, tensors, state)
        self.accelerator.wait_for_everyone()


def _shown(metrics: Mapping[str, float]) -> str:
    """The metrics as text; a loss that is the nats per image is shown once."""
    twice = metrics.get("loss") == metrics.get("nats_per_image")
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if not (twice and name == "loss"))
