"""`--dry-run` of the training commands: measures the first steps of the real training and writes nothing."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from twostage.core.machine.memory import MEASURED_BY, peak_memory
from twostage.core.machine.processes import join_processes, lack_of_cores
from twostage.core.machine.sharding import units_to_shard
from twostage.core.training.base_run import BaseRun, ConfigT, DataT, resolve_precision
from twostage.core.training.random import BatchRandom

__all__ = ["DryRun"]


class DryRun(BaseRun[ConfigT]):
    """Measures three steps and writes nothing: two are timed, and the FLOPs and memory of the third are counted.

    The steps run as if at the end of the run, when every loss has started.

    Args:
        config: continue with :attr:`config`, in which `auto` is resolved.
        shardable: whether the launch may ask for FSDP; then see :attr:`units_to_shard`.
    """

    def __init__(self, config: ConfigT, shardable: bool = False) -> None:
        units = units_to_shard(shardable)
        super().__init__(resolve_precision(config, join_processes(), bool(units)), units)
        self.figures: dict[str, Any] = {}

    @property
    def progress(self) -> float:
        """1.0, the end of the run."""
        return 1.0

    def steps(self, read: Callable[[Tensor], DataT], read_ahead: bool) -> Iterator[list[tuple[DataT, BatchRandom]]]:
        """Yields the batches of three steps, times reading them too, and fills :attr:`figures`."""
        from twostage.core.training.flops import count_flops

        device = self.accelerator.device
        lack = lack_of_cores(torch.get_num_threads())
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
            "threads": torch.get_num_threads(),
            "lack_of_cores": lack,
        }

    def record(self, metrics: dict[str, Tensor]) -> None:
        """Drops the metrics."""

    def end(self, num_held_out: int) -> None:
        """Reports the figures.

        Args:
            num_held_out: held-out images.
        """
        self.figures["num_held_out"] = num_held_out
        self.report(*_describe(self.figures), f"dry run: nothing was written to {self.config.run.dir}")

    def _now(self) -> float:
        if self.accelerator.device.type != "cpu":
            torch.accelerator.synchronize()
        return self.clock()


def _count(net: nn.Module) -> dict[str, int]:
    return {
        "trainable": sum(p.numel() for p in net.parameters() if p.requires_grad),
        "all": sum(p.numel() for p in net.parameters()),
    }


def _describe(figures: dict[str, Any]) -> list[str]:
    networks = [
        f"{name} {count['all']:,} ({count['trainable']:,} trainable)" for name, count in figures["parameters"].items()
    ]
    processes, parts = figures["processes"], figures["gradient_accumulation_steps"]
    per_process = " per process" if processes > 1 else ""
    rows = {
        "parameters": ", ".join(networks),
        "FLOPs per step": f"{tqdm.format_sizeof(figures['flops_per_step'])}{per_process}: matrix products, "
        "convolutions and attention, forward and backward",
        "peak memory": f"{tqdm.format_sizeof(figures['peak_memory_bytes'], 'B', 1024)}{per_process} "
        f"({figures['peak_memory_measured_by']})",
        "seconds per step": f"{figures['seconds_per_step']:.3g} (the first step took "
        f"{figures['seconds_first_step']:.3g})",
        "steps": f"{figures['steps']:,} ({figures['steps_per_epoch']:,} per epoch): about "
        f"{tqdm.format_interval(figures['seconds_estimated'])}, without validations and checkpoints",
        "images": f"{figures['num_train']:,} for training, {figures['num_held_out']:,} held out; "
        f"{figures['batch_size']:,} per step, on {processes} process{'es' * (processes > 1)}"
        f"{f' in {parts} accumulation steps' if parts > 1 else ''}",
        "precision": f"train.mixed_precision {figures['mixed_precision']}, on {figures['device']}",
    }
    if figures["lack_of_cores"]:
        rows["cores"] = figures["lack_of_cores"]
    return [f"{name:<17} {value}" for name, value in rows.items()]
