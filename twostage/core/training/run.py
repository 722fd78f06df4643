"""A training run: its processes, its precision, and how it begins, takes its steps and ends.

The steps are visible in `train_tokenizer`, `train_features` and `train_prior`. :class:`Journal` keeps what they
measure, :class:`Health` stops the run if its numbers break.
"""

import itertools
import math
import shutil
import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, patch_environment
from torch import Tensor, nn
from torch.optim import Optimizer

from twostage.core.config.sections import RunConfig
from twostage.core.errors import InputError, StopAsked
from twostage.core.machine.launch import overruled
from twostage.core.machine.precision import fastest_precision
from twostage.core.machine.processes import join_processes
from twostage.core.machine.sharding import share_like, units_to_shard
from twostage.core.machine.stopping import StopRequests
from twostage.core.runs.checkpoint import optimizer_tensors, restore_optimizer
from twostage.core.runs.model_folder import fill
from twostage.core.runs.places import Contents
from twostage.core.runs.run_folder import STOPPED, RunFolder
from twostage.core.training.batches import Batches
from twostage.core.training.health import ADVICE, GRADIENT_NORMS, Health, check_gradient
from twostage.core.training.journal import Journal, check_trackers, print_above_bar
from twostage.core.training.optimizer import FUSED_DEVICES, TrainedNetwork
from twostage.core.training.random import BatchRandom, seed_for
from twostage.core.training.schedules import lr_at
from twostage.core.training.train_config import TrainConfig

__all__ = ["BaseRun", "ConfigT", "DataT", "TrainingRun", "resolve_precision"]

FORMER_FACTS = {"data.source": "data", "codes": "codes"}
"""By key: where older checkpoints recorded what sources.json records now."""


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
    """What real runs and dry runs share: processes, precision, learning rate, seeds, and updates of the weights.

    Args:
        config: with the precision resolved.
        units_to_shard: class names, for FSDP.
    """

    clock = staticmethod(time.perf_counter)

    def __init__(self, config: ConfigT, units_to_shard: list[str], trackers: Sequence[str] = ()) -> None:
        self.config, self.units_to_shard = config, units_to_shard
        train = config.train
        # torch 2.14 has a newer name for `broadcast_buffers`, which older versions and Accelerate do not know yet.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        # FSDP models are sharded before Accelerate sees them. The other variable does more in Accelerate than the
        # argument of the same name.
        parts = train.gradient_accumulation_steps
        with patch_environment(accelerate_use_fsdp="false", accelerate_gradient_accumulation_steps=parts):
            self.accelerator = Accelerator(
                mixed_precision=train.mixed_precision,
                gradient_accumulation_steps=parts,
                dynamo_backend="no",
                log_with=list(trackers) or None,  # it warns about an empty list
                project_dir=config.run.dir,
                # Broadcasting buffers would overwrite every process's codebook with that of the main process.
                kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
            )
        device = self.accelerator.device
        if train.on_not_finite == "skip" and device.type not in FUSED_DEVICES:
            raise InputError(
                f"train.on_not_finite 'skip': needs a CPU or a CUDA device, but this run is on {device}. "
                "Set train.on_not_finite=stop"
            )
        self.seed = config.run.seed
        self.step = 0
        self.facts: dict[str, Any] = {}
        """What a resumed run must know beside the tensors; plain JSON."""
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
        """Hands the run what it trains, before anything is loaded.

        Args:
            networks: the main one first.
            sources: what the paths in the configuration lead to, by their keys.
            name_rows: names rows of the training split in messages; `row 7` by default.
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

    @property
    def progress(self) -> float:
        """The share of the steps that are done, in [0, 1]."""
        return self.step / self.batches.max_steps

    def begin_step(self) -> None:
        """Sets the learning rate and the seeds of the next step."""
        train = self.config.train
        factor = lr_at(
            self.step,
            lr=1.0,
            max_steps=self.batches.max_steps,
            warmup_steps=train.warmup_steps,
            schedule=train.lr_schedule,
        )
        for network in self._networks:
            for group in network.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
        self._lr = train.lr * factor
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
        """See :func:`twostage.core.training.health.check_gradient`."""
        return check_gradient(net, optimizer, self.accelerator, self.config.train)

    def advance(self) -> dict[str, float] | None:
        """Counts a finished update."""
        self.step += 1
        self._end_times.append(self.clock())
        return None

    @property
    def seconds_per_step(self) -> float:
        """The median of the last steps by :attr:`clock`; nan before the second step."""
        seconds = [after - before for before, after in itertools.pairwise(self._end_times)]
        return statistics.median(seconds) if seconds else float("nan")

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        return self.accelerator.reduce(tensor, "sum")  # type: ignore[return-value]


class TrainingRun(BaseRun[ConfigT]):
    """A run with a folder: it resumes from its latest checkpoint, and keeps a journal.

    Args:
        config: continue with :attr:`config`, in which `auto` is resolved.
        shardable: whether the launch may ask for FSDP; then see :attr:`units_to_shard`.
        time_limit: minutes after which the run saves and stops; None: no limit.
    """

    def __init__(self, config: ConfigT, shardable: bool = False, time_limit: float | None = None) -> None:
        self._stop_requests = StopRequests(time_limit)
        check_trackers(config.run.trackers)
        self.folder = RunFolder(config.run.dir)
        units, state = units_to_shard(shardable), join_processes()
        config = resolve_precision(config, state, bool(units), self.folder.stored_config())
        self.folder.check(config)  # type: ignore[arg-type]
        state.wait_for_everyone()
        super().__init__(config, units, config.run.trackers)
        self.health = Health(self.accelerator, self.folder)
        self.journal = Journal(self.folder, self.accelerator, config.train.keep_checkpoints)
        self.finished: str | None = None
        """Why the run has finished; None: it has not."""
        self._stop: StopAsked | None = None

    # --- beginning ----------------------------------------------------------------------------------------------------

    def latest_checkpoint(self) -> Path | None:
        """The newest intact checkpoint to :meth:`load`, or None for a new run.

        Raises:
            InputError: all checkpoints are damaged, another process trains into this folder, or a new run's sources
                have changed since its folder was made.
        """
        checkpoint = self.journal.latest_checkpoint()
        if checkpoint is None:
            self.folder.check_sources(self.config, self._sources, begun=False)  # type: ignore[arg-type]
        return checkpoint

    def load(self, checkpoint: Path, process_setting: str = "") -> None:
        """Continues from a checkpoint.

        Args:
            process_setting: a setting, if any, that makes each process draw for itself (such as `model.dropout=0.1`):
                the number of processes must then stay the same.

        Raises:
            InputError: files are missing, sources have changed, or the number of processes has.
        """
        tensors, state = self.journal.checkpoints.load(checkpoint)
        self.step, self.facts, self.finished = state["step"], state["facts"], state["finished"]
        remembered = {key: self.facts[name] for key, name in FORMER_FACTS.items() if name in self.facts}
        self.folder.check_sources(self.config, self._sources, remembered)  # type: ignore[arg-type]
        processes = self.accelerator.num_processes
        processes_before = int(state.get("processes") or processes)
        if processes_before != processes and process_setting and not self.finished:
            raise InputError(
                f"{self.folder.path}: trained by {_count_processes(processes_before)} up to step {self.step}, but "
                f"launched with {_count_processes(processes)}. With {process_setting} each process draws its own "
                f"random numbers, so the result would change. Launch it with --num_processes {processes_before}"
            )
        self._load_tensors(tensors, checkpoint)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        means = {names: part.to(self.accelerator.device) for names, part in tensors.get("means", {}).items()}
        self.journal.means.restore(means, self.accelerator.process_index, processes)
        if self.finished:
            self.report(f"{self.folder.path}: finished at step {self.step} ({self.finished}); nothing left to do")
            return
        self.report(f"Resuming from step {self.step} ({checkpoint})")
        if processes_before != processes:
            self.report(
                f"with {_count_processes(processes)} instead of {processes_before}: the batches and the random numbers "
                "stay the same, only the order of sums changes"
            )

    def _load_tensors(self, tensors: dict[str, dict[str, Tensor]], checkpoint: Path) -> None:
        optimizers = {f"{network.prefix}optimizer": network for network in self._networks}
        if missing := (self._modules.keys() | optimizers.keys()) - tensors.keys():
            raise InputError(
                f"{checkpoint}: {min(missing)}.safetensors is missing. Put back a copy of it, or remove the run's "
                "folder to start over"
            )
        for name, module in self._modules.items():
            own = module.state_dict()
            shares = {key: share_like(t, own[key]) if key in own else t for key, t in tensors[name].items()}
            fill(module, shares, checkpoint)
        for name, network in optimizers.items():
            restore_optimizer(network.module, network.optimizer, tensors[name])

    # --- stepping -----------------------------------------------------------------------------------------------------

    def steps(self, read: Callable[[Tensor], DataT], read_ahead: bool) -> Iterator[list[tuple[DataT, BatchRandom]]]:
        """Creates the run's folder, then yields the batches of the remaining steps.

        Only now, so that a start that failed leaves nothing behind.

        Raises:
            StopAsked: after the step at which the processes agreed to stop; its checkpoint is written.
        """
        is_new = self._create_folder()
        if self.finished:
            return
        try:
            self.journal.start_trackers(self.config.run.trackers, self.step)
        except InputError:
            if is_new:  # config.yaml names the tracker, so this folder would refuse another one
                shutil.rmtree(self.folder.path, ignore_errors=True)
            raise
        ahead = self.batches.read_ahead(self.step, read) if read_ahead else None
        with self.journal.progress_bar(self.batches, self.step), self._stop_requests.listening():
            while self.step < self.batches.max_steps and not self.finished and not self._stop:
                self.begin_step()
                yield next(ahead) if ahead else self.batches.at(self.step, read)
        self.accelerator.end_training()
        if self._stop and not self.finished:
            if self.accelerator.is_main_process:
                lines = [f"step {self.step}: {self._stop.reason}", "Run the same command again to resume."]
                self.folder.write_note(STOPPED, lines)
            raise self._stop

    def _create_folder(self) -> bool:
        """Creates the folder, or drops what it holds of later steps; returns whether it is new (main process only)."""
        is_new = False
        self.accelerator.wait_for_everyone()  # nobody writes before all have looked
        if self.accelerator.is_main_process:
            is_new = not self.folder.config_file.exists()
            self.folder.create(self.config, self._sources)  # type: ignore[arg-type]
            self.folder.cut_metrics(self.step)
        self.accelerator.wait_for_everyone()
        return is_new

    def record(self, metrics: dict[str, Tensor]) -> None:
        """Adds scalars by name, from one part of a batch or one update; their mean is logged."""
        if self.journal.means.begins(metrics):  # a new term: the steps before it get a line of their own
            self._log_training()
        self.journal.means.add(metrics, self.step)

    def advance(self) -> dict[str, float] | None:
        """Counts a finished update; returns the training metrics if a line of them was due, the same in all
        processes."""
        self.record(self._gradient_norms)
        self._gradient_norms = {}
        super().advance()
        self._stop = self._stop_requests.agreed()
        self.journal.bar.update(self.batches.batch_size)
        if self.step % self.config.train.log_every == 0 or self._scheduled("validate") or self._scheduled("checkpoint"):
            return self._log_training()
        return None

    def due(self, what: str) -> bool:
        """Whether `validate` or `checkpoint` follows the update just finished. Both follow the last one; a checkpoint
        also follows when the run was asked to stop."""
        return self._scheduled(what) or (what == "checkpoint" and self._stop is not None)

    def _scheduled(self, what: str) -> bool:
        every = getattr(self.config.train, f"{what}_every") or self.batches.steps_per_epoch
        return self.step % every == 0 or self.step == self.batches.max_steps

    def _log_training(self) -> dict[str, float]:
        means = self.journal.means.take(self.journal.gather)
        if means.first_broken:
            problem = self.health.describe_not_finite(means, lambda step: self._name_rows(self.batches.rows(step)))
            if self.config.train.on_not_finite == "stop":
                raise self.health.stop(problem, f"{ADVICE}; train.on_not_finite=skip skips such updates")
            skipped = sum(means.num_broken.get(name, 0) for name in GRADIENT_NORMS)
            self.facts["skipped_updates"] = self.facts.get("skipped_updates", 0) + skipped
            self.report(f"{problem}; updates skipped so far: {self.facts['skipped_updates']}")
        return self.journal.write_training(means, self.step, self._lr, self.batches, self.seconds_per_step)

    # --- measuring, saving, ending ------------------------------------------------------------------------------------

    def log_validation(self, metrics: dict[str, float], label: str = "held out") -> None:
        """Writes held-out metrics, and reports them as ``label``.

        Raises:
            InputError: a number is not finite; this step gets no checkpoint.
        """
        self.health.check_finite(metrics, self.step)
        self.journal.write_validation(metrics, self.step, label)

    def finish(self, reason: str) -> None:
        """Ends the run after this step."""
        self.finished = reason

    def save(
        self,
        title: str,
        baselines: dict[str, float] | None = None,
        curve: str = "loss",
        write_model: Callable[[Path], None] | None = None,
    ) -> None:
        """Writes a checkpoint, and the curves of the metric ``curve``; called by every process.

        Args:
            title: of the curves.
            baselines: level lines beside the curves, by name.
            write_model: called first, with the folder `model/`, if the weights are finite.

        Raises:
            InputError: weights are not finite or not the same in all processes, or the checkpoint cannot be written.
        """
        if self.step == self.batches.max_steps and not self.finished:
            self.finish("all steps done")
        self._check_weights()
        tensors = {name: module.state_dict() for name, module in self._modules.items()}
        for network in self._networks:
            tensors[f"{network.prefix}optimizer"] = optimizer_tensors(network.module, network.optimizer)
        scaler = self.accelerator.scaler
        state = {
            "facts": self.facts,
            "finished": self.finished,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "processes": self.accelerator.num_processes,
        }
        curves = {"title": title, "baselines": baselines, "metric": curve}
        self.journal.save(self.step, tensors, state, curves, write_model)

    def _check_weights(self) -> None:
        """The losses were finite before this update. Weights and codebooks must be so after it, and the same in all
        processes; otherwise the last good ones are kept."""
        tensors = {
            f"{part} {name}": tensor.detach()
            for part, module in self._modules.items()
            for name, tensor in module.state_dict().items()
        }
        norm = self.health.weights_norm(tensors)
        if not math.isfinite(norm):
            self._log_training()  # names the term, if the run was asked to stop between two lines
        self.health.check_finite({"the norm of the weights": norm}, self.step)
        self.health.check_equal(tensors, self.step)


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
    choice = [(stored_config or {}).get("train", {}).get("mixed_precision") or fastest_precision(device)]
    if state.num_processes > 1:
        broadcast_object_list(choice)
    return config.model_copy(update={"train": config.train.model_copy(update={"mixed_precision": choice[0]})})


def _count_processes(count: int) -> str:
    return f"{count} process{'es' * (count > 1)}"
