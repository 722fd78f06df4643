"""The base of real runs and dry runs: processes, precision, learning rate, seeds, and updates of the weights."""

import itertools
import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, patch_environment
from torch import Tensor, nn
from torch.optim import Optimizer

from twostage.core.config.sections import RunConfig
from twostage.core.errors import InputError
from twostage.core.machine.launch import overruled
from twostage.core.machine.precision import reason_for_precision, state_float32
from twostage.core.machine.processes import choose_threads
from twostage.core.runs.contents import Contents
from twostage.core.training.batches import Batches
from twostage.core.training.journal import print_above_bar
from twostage.core.training.optimizer import FUSED_DEVICES, TrainedNetwork, check_gradient
from twostage.core.training.random import seed_for
from twostage.core.training.train_config import TrainConfig

__all__ = ["BaseRun", "ConfigT", "DataT", "resolve_precision"]


class _TrainingSections(Protocol):
    @property
    def run(self) -> RunConfig: ...
    @property
    def train(self) -> TrainConfig: ...
    def model_dump(self, *, mode: str) -> dict[str, Any]: ...
    def model_copy(self, *, update: dict[str, Any]) -> Any: ...


ConfigT = TypeVar("ConfigT", bound=_TrainingSections)
DataT = TypeVar("DataT")


class BaseRun(Generic[ConfigT]):
    """The base of real runs and dry runs: processes, precision, learning rate, seeds, and updates of the weights.

    Args:
        config: with the precision resolved.
        units_to_shard: class names, for FSDP.
    """

    clock = staticmethod(time.perf_counter)

    def __init__(self, config: ConfigT, units_to_shard: list[str]) -> None:
        self.config, self.units_to_shard = config, units_to_shard
        train = config.train
        # torch 2.14 has a newer name for `broadcast_buffers`, which older versions and Accelerate do not know yet.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        # FSDP models are sharded before Accelerate sees them. The other variable does more in Accelerate than the
        # argument of the same name.
        parts = train.gradient_accumulation_steps
        if AcceleratorState._shared_state and AcceleratorState().mixed_precision != train.mixed_precision:
            AcceleratorState._reset_state()  # of an earlier training in this process, with another precision
        with patch_environment(accelerate_use_fsdp="false", accelerate_gradient_accumulation_steps=parts):
            self.accelerator = Accelerator(
                mixed_precision=train.mixed_precision,
                gradient_accumulation_steps=parts,
                dynamo_backend="no",
                # Broadcasting buffers would overwrite every process's codebook with that of the main process.
                kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
            )
        state_float32()
        device = self.accelerator.device
        if train.on_not_finite == "skip" and device.type not in FUSED_DEVICES:
            raise InputError(
                f"train.on_not_finite 'skip': needs a CPU or a CUDA device, but this run is on {device}. "
                "Set train.on_not_finite=stop"
            )
        self.seed = config.run.seed
        self.step = 0
        self.facts: dict[str, Any] = {}
        """State that a resumed run needs besides the tensors; plain JSON."""
        self._end_times: deque[float] = deque(maxlen=100)  # of the last steps
        self._lr = 0.0
        self._gradient_norms: dict[str, Tensor] = {}  # of the current update
        self.report(*overruled(train.mixed_precision, train.gradient_accumulation_steps))
        torch.manual_seed(seed_for(self.seed, "initial weights"))

    report = staticmethod(print_above_bar)

    def attach(
        self,
        batches: Batches,
        networks: Sequence[TrainedNetwork[Any]],
        sources: Mapping[str, Contents],
        name_rows: Callable[[Tensor], list[str]] | None = None,
    ) -> None:
        """Sets the networks and the data of the run. Call it before anything is loaded.

        Args:
            networks: the main one first.
            sources: the content behind each path in the configuration, by key.
            name_rows: returns the names of training rows for messages; `row 7` by default.
        """
        self.batches, self._networks, self._sources = batches, list(networks), sources
        self._name_rows = name_rows or (lambda rows: [f"row {row}" for row in rows.tolist()])
        self._modules: dict[str, nn.Module] = {network.name: network.module for network in networks}
        if (averaged := networks[0].averaged) is not None:
            self._modules["ema"] = averaged
        parameters = sum(p.numel() for p in networks[0].module.parameters())
        self.report(
            f"{parameters:,} parameters, {batches.steps_per_epoch} steps per epoch, {batches.max_steps} in total"
        )
        if self.accelerator.device.type == "cpu":
            parts = self.accelerator.num_processes * self.config.train.gradient_accumulation_steps
            per_pass = batches.batch_size // parts * parameters
            self.report(choose_threads(per_pass if is_fully_connected(self.config) else None))

    @property
    def progress(self) -> float:
        """The share of the steps that are done, in [0, 1]."""
        return self.step / self.batches.max_steps

    @property
    def history(self) -> list[dict[str, Any]]:
        """The metrics so far, one dictionary for each line of metrics.jsonl; [] for a dry run."""
        return []

    def begin_step(self) -> None:
        """Sets the learning rate and the seeds of the next step."""
        share = self.config.train.lr_share(self.step, self.batches.max_steps)
        for network in self._networks:
            for group in network.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * share
        self._lr = self.config.train.lr * share
        # Dropout draws from torch's own stream. Seeded by step and process, it is the same after a restart.
        seed, device = seed_for(self.seed, "torch", self.step, self.accelerator.process_index), self.accelerator.device
        # torch.manual_seed would queue a call for CUDA at each step of a process that never uses it.
        torch.default_generator.manual_seed(seed)
        if device.type != "cpu":
            torch.get_device_module(device).manual_seed(seed)

    def update(self, network: TrainedNetwork[Any], loss: Tensor) -> None:
        """Backpropagates ``loss``, and updates the weights after the last accumulation step of a batch."""
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            norm = self.check_gradient(network.module, network.wrapped_optimizer)
            self._gradient_norms[f"{network.prefix}grad_norm"] = norm
        network.wrapped_optimizer.step()
        network.wrapped_optimizer.zero_grad()

    def check_gradient(self, net: nn.Module, optimizer: Optimizer) -> Tensor:
        """See :func:`twostage.core.training.optimizer.check_gradient`."""
        return check_gradient(net, optimizer, self.accelerator, self.config.train)

    def advance(self) -> dict[str, float] | None:
        """Counts a finished update."""
        self.step += 1
        self._end_times.append(self.clock())
        return None

    @property
    def seconds_per_step(self) -> float:
        """The median seconds of the last steps by :attr:`clock`; nan before the second step."""
        seconds = [after - before for before, after in itertools.pairwise(self._end_times)]
        return statistics.median(seconds) if seconds else float("nan")

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        return self.accelerator.reduce(tensor, "sum")  # type: ignore[return-value]


def is_fully_connected(config: _TrainingSections) -> bool:
    """Whether each weight of the network is used once per image; only tokenizers' configs say so."""
    return getattr(config, "fully_connected", False)


def resolve_precision(
    config: ConfigT, state: PartialState, is_sharded: bool, stored_config: dict[str, Any] | None = None
) -> ConfigT:
    """Replaces `auto` by the precision that the run was started with, or else by this machine's fastest.

    Raises:
        InputError: fp16 without a GPU, or with FSDP.
    """
    precision, device = config.train.mixed_precision, torch.device(state.device or "cpu")
    if precision == "fp16" and device.type == "cpu":
        raise InputError(
            "train.mixed_precision 'fp16': needs a GPU, and this run is on the CPU. Set it to bf16, auto or no"
        )
    if precision == "fp16" and is_sharded:
        raise InputError("train.mixed_precision 'fp16': does not work with FSDP. Set it to bf16 or no")
    if precision != "auto":
        return config
    stored = (stored_config or {}).get("train", {}).get("mixed_precision")
    choice = [stored or reason_for_precision(device, is_fully_connected(config))[0]]
    if state.num_processes > 1:
        broadcast_object_list(choice)
    return config.model_copy(update={"train": config.train.model_copy(update={"mixed_precision": choice[0]})})
