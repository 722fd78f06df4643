"""`--dry-run` of a training verb: the first steps of the real training, measured, and nothing written."""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.module_tracker import ModuleTracker
from tqdm import tqdm

from twostage.core.errors import InputError
from twostage.core.machine.memory import MEASURED_BY, peak_memory
from twostage.core.machine.onednn import FLOP_FORMULAS
from twostage.core.runs.model_folder import write_json
from twostage.core.runs.places import Contents
from twostage.core.training.batches import Batches
from twostage.core.training.random import BatchRandom
from twostage.core.training.run import ConfigT, DataT, TrainingRun

__all__ = ["DryRun", "DryRunOption", "JsonOption", "check_json", "count_flops", "finish_dry_run"]

DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Measure a few steps (FLOPs, memory, time) and write nothing.")
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="A file for what --dry-run measures.")]

aten = torch.ops.aten
# What torch counts on a GPU, but not yet on a CPU.
ON_CPU = FLOP_FORMULAS | {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v)
    ),
}


class _NoModules(ModuleTracker):
    """Its hooks, which FLOPs by module need, cannot follow a step that calls autograd.grad."""

    def __enter__(self) -> "_NoModules":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def count_flops() -> FlopCounterMode:
    """A context whose `get_total_flops()` are those of the matrix products, convolutions and attention within it."""
    counter = FlopCounterMode(display=False, custom_mapping=ON_CPU)
    counter.mod_tracker = _NoModules()
    return counter


class DryRun(TrainingRun[ConfigT]):
    """A run of three steps in which nothing is read from or written to the run folder.

    The steps are worked on as at the run's end, when every loss has begun. The first and the second are timed, the
    third is counted.
    """

    def __init__(self, config: ConfigT, shardable: bool = False, time_limit: float | None = None) -> None:
        self.run_dir = config.run.dir
        never_made = Path(tempfile.gettempdir()) / f"dry-run-{os.urandom(8).hex()}"
        run = config.run.model_copy(update={"dir": str(never_made), "trackers": []})
        super().__init__(config.model_copy(update={"run": run}), shardable, time_limit)
        self.figures: dict[str, Any] = {}

    @property
    def progress(self) -> float:
        """1: the end of the run."""
        return 1.0

    def restore(
        self,
        batches: Batches,
        modules: Mapping[str, nn.Module],
        optimizers: dict[str, tuple[nn.Module, Optimizer]],
        begin: Callable[[], None] | None = None,
        sources: Mapping[str, Contents] | None = None,
        by_process: str = "",
    ) -> bool:
        """Always a new run."""
        self.batches, self._modules, self._optimizers = batches, modules, optimizers
        if begin:
            begin()
        return False

    def steps(self, read: Callable[[Tensor], DataT], read_ahead: bool) -> Iterator[list[tuple[DataT, BatchRandom]]]:
        """The batches of three steps, the reading of which is timed too; fills :attr:`figures`."""
        device = self.accelerator.device
        seconds = []
        for _ in range(2):
            start = self._now()
            self.begin_step()
            yield self.batches.at(self.step, read)
            seconds.append(self._now() - start)
        with count_flops() as counter, peak_memory(device) as peak:
            self.begin_step()
            yield self.batches.at(self.step, read)
        train, batches = self.config.train, self.batches
        self.figures = {
            "parameters": {name: _count(net) for name, net in self._modules.items() if name != "ema"},
            "flops_per_step": counter.get_total_flops(),
            "peak_memory_bytes": peak(),
            "peak_memory_measured_by": MEASURED_BY["cpu" if device.type == "cpu" else "gpu"],
            "seconds_first_step": seconds[0],
            "seconds_per_step": seconds[1],
            "steps_per_epoch": batches.steps_per_epoch,
            "steps": batches.max_steps,
            "seconds_estimated": seconds[1] * batches.max_steps,
            "num_train": batches.num_samples,
            "batch_size": batches.batch_size,
            "gradient_accumulation_steps": train.gradient_accumulation_steps,
            "mixed_precision": train.mixed_precision,
            "processes": self.accelerator.num_processes,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        }

    def advance(self) -> None:
        """Counts a finished update; nothing is logged."""
        self.step += 1

    def due(self, what: str) -> bool:
        """Never: nothing is validated, drawn or saved."""
        return False

    def end(self, num_held_out: int) -> None:
        """Says what was measured.

        Args:
            num_held_out: images.
        """
        self.figures["num_held_out"] = num_held_out
        for line in _lines(self.figures):
            self.say(line)
        self.say(f"dry run: nothing was written to {self.run_dir}")

    def _now(self) -> float:
        if self.accelerator.device.type != "cpu":
            torch.accelerator.synchronize()
        return self.clock()


def check_json(dry_run: bool, file: Path | None) -> None:
    """Refuses a ``--json`` that could not be written, before anything is measured."""
    if file and not dry_run:
        raise InputError(f"--json {file}: is of --dry-run; add that, or leave this out (a run writes metrics.jsonl)")
    if file and (file.is_dir() or not file.parent.is_dir()):
        raise InputError(f"--json {file}: expected a file in a folder that is there")


def finish_dry_run(run: TrainingRun[Any], file: Path | None) -> None:
    """Writes the figures of a dry run to ``file``, where one is given."""
    if file and isinstance(run, DryRun) and run.accelerator.is_main_process:
        write_json(file, run.figures)


def _count(net: nn.Module) -> dict[str, int]:
    return {
        "trainable": sum(p.numel() for p in net.parameters() if p.requires_grad),
        "all": sum(p.numel() for p in net.parameters()),
    }


def _lines(figures: dict[str, Any]) -> list[str]:
    nets = [
        f"{name} {count['all']:,} ({count['trainable']:,} trainable)" for name, count in figures["parameters"].items()
    ]
    share = " in each process" if figures["processes"] > 1 else ""
    parts = figures["gradient_accumulation_steps"]
    processes = figures["processes"]
    rows = {
        "parameters": ", ".join(nets),
        "FLOPs a step": f"{tqdm.format_sizeof(figures['flops_per_step'])}{share}: matrix products, convolutions and "
        "attention, forward and backward",
        "peak memory": f"{tqdm.format_sizeof(figures['peak_memory_bytes'], 'B', 1024)}{share} "
        f"({figures['peak_memory_measured_by']})",
        "seconds a step": f"{figures['seconds_per_step']:.3g} (the first {figures['seconds_first_step']:.3g})",
        "steps": f"{figures['steps_per_epoch']:,} an epoch, {figures['steps']:,} in all: about "
        f"{tqdm.format_interval(figures['seconds_estimated'])}, beside validations and checkpoints",
        "images": f"{figures['num_train']:,} to train on, {figures['num_held_out']:,} held out; "
        f"{figures['batch_size']:,} a step, shared by {processes} process{'es' * (processes > 1)}"
        f"{f', in {parts} parts each' if parts > 1 else ''}",
        "precision": f"train.mixed_precision {figures['mixed_precision']}, on {figures['device']}",
    }
    return [f"{name:<15} {value}" for name, value in rows.items()]
