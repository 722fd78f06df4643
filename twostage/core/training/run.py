"""The bookkeeping that both trainings call: what is written when, and how a run goes on. The steps themselves are
visible in `train_tokenizer` and `train_prior`."""

import itertools
import shutil
import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, patch_environment
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from tqdm import tqdm

from twostage.core.config.sections import RunConfig
from twostage.core.errors import InputError, StopAsked
from twostage.core.images.sheets import draw_curves
from twostage.core.machine.launch import overruled
from twostage.core.machine.precision import fastest_precision
from twostage.core.machine.processes import join_processes
from twostage.core.machine.progress import on_terminal
from twostage.core.machine.sharding import share_like, units_to_shard, whole
from twostage.core.machine.stopping import StopRequests
from twostage.core.runs.checkpoint import Checkpoints, optimizer_tensors, restore_optimizer
from twostage.core.runs.model_folder import fill
from twostage.core.runs.places import Contents
from twostage.core.runs.run_folder import STOPPED, RunFolder, read_metrics
from twostage.core.training.batches import Batches
from twostage.core.training.optimizer import FUSED
from twostage.core.training.random import BatchRandom, seed_for
from twostage.core.training.running_means import Means, RunningMeans
from twostage.core.training.schedules import lr_at
from twostage.core.training.trackers import check_trackers, start_trackers
from twostage.core.training.train_config import TrainConfig

__all__ = ["ConfigT", "DataT", "TrainingRun"]

ADVICE = "Try a lower train.lr, train.max_grad_norm=1.0, or train.mixed_precision=no"
WHOLES = {"loss", "nats_per_image", "bits_per_dim", "grad_norm", "discriminator_grad_norm"}
"""Metrics that are not finite because a part of them is not."""


FORMER_FACTS = {"data.source": "data", "codes": "codes"}
"""By key: where checkpoints had what sources.json has now."""


class _TrainingSections(Protocol):
    @property
    def run(self) -> RunConfig: ...
    @property
    def train(self) -> TrainConfig: ...
    def model_dump(self, *, mode: str) -> dict[str, Any]: ...
    def model_copy(self, *, update: dict[str, Any]) -> Any: ...


ConfigT = TypeVar("ConfigT", bound=_TrainingSections)
DataT = TypeVar("DataT")


def _seed_torch(seed: int, device: torch.device) -> None:
    """torch.manual_seed for every step: where CUDA is never used, that one would queue a call for it each time."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


class TrainingRun(Generic[ConfigT]):
    """One run: its processes, its folder, and what is written when.

    Args:
        config: of the training verb; the run goes on with :attr:`config`, in which `auto` is decided.
        shardable: whether the launch may ask for FSDP; the training then looks at :attr:`units_to_shard`.
        time_limit: minutes after which the run saves and stops; None: no limit.
    """

    clock = staticmethod(time.perf_counter)

    def __init__(self, config: ConfigT, shardable: bool = False, time_limit: float | None = None) -> None:
        self._stop_requests = StopRequests(time_limit)
        self._stop: StopAsked | None = None
        check_trackers(config.run.trackers)
        self.folder = RunFolder(config.run.dir)
        self.units_to_shard = units_to_shard(shardable)
        state = join_processes()
        self.config: ConfigT = self._resolve(config, state)
        self.folder.check(self.config)  # type: ignore[arg-type]
        state.wait_for_everyone()
        train = self.config.train
        # torch 2.14 has a newer name for `broadcast_buffers`, which older ones and Accelerate do not know yet.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        # A model that is sharded is so before Accelerate sees it. To Accelerate the other variable means more than the
        # argument of the same name.
        parts = train.gradient_accumulation_steps
        with patch_environment(accelerate_use_fsdp="false", accelerate_gradient_accumulation_steps=parts):
            self.accelerator = Accelerator(
                mixed_precision=train.mixed_precision,
                gradient_accumulation_steps=parts,
                dynamo_backend="no",
                log_with=list(self.config.run.trackers) or None,  # it warns about an empty list
                project_dir=self.folder.path,
                # Broadcasting buffers would overwrite every rank's codebook with rank 0's.
                kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
            )
        self.seed = self.config.run.seed
        self.step = 0
        self._is_new = False
        self.facts: dict[str, Any] = {}  # what a restart must know beside the tensors; plain JSON
        self.finished: str | None = None
        self._checkpoints = Checkpoints(self.folder.checkpoints, train.keep_checkpoints)
        if train.on_not_finite == "skip" and self.accelerator.device.type not in FUSED:
            raise InputError(
                f"train.on_not_finite 'skip': needs a CPU or a CUDA device, this run is on {self.accelerator.device}; "
                "use stop"
            )
        self._modules: Mapping[str, nn.Module] = {}
        self._optimizers: dict[str, tuple[nn.Module, Optimizer]] = {}
        self.name_rows: Callable[[Tensor], list[str]] = lambda rows: [f"row {row}" for row in rows.tolist()]
        self._means = RunningMeans()
        self._ended: deque[float] = deque(maxlen=100)  # when the last steps ended
        self._bar: tqdm | None = None
        self._lr = 0.0
        for line in overruled(train.mixed_precision, train.gradient_accumulation_steps):
            self.say(line)
        torch.manual_seed(seed_for(self.seed, "initial weights"))

    def _resolve(self, config: ConfigT, state: PartialState) -> ConfigT:
        """`auto` becomes what the run was started with, or else what this machine is fastest in."""
        if config.train.mixed_precision == "fp16" and state.device is not None and state.device.type == "cpu":
            raise InputError(
                "train.mixed_precision 'fp16': needs a GPU, and this run is on the CPU; use bf16, auto or no"
            )
        if config.train.mixed_precision == "fp16" and self.units_to_shard:
            raise InputError("train.mixed_precision 'fp16': cannot be trained with under FSDP; use bf16 or no")
        if config.train.mixed_precision != "auto":
            return config
        stored = self.folder.stored_config() or {}
        choice = [
            stored.get("train", {}).get("mixed_precision") or fastest_precision(torch.device(state.device or "cpu"))
        ]
        if state.num_processes > 1:
            broadcast_object_list(choice)
        return config.model_copy(update={"train": config.train.model_copy(update={"mixed_precision": choice[0]})})

    def say(self, message: str) -> None:
        """One line for the person who watches, from the main process, above the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(message)

    # --- beginning, stepping, ending ---------------------------------------------------------------------------------

    def restore(
        self,
        batches: Batches,
        modules: Mapping[str, nn.Module],
        optimizers: dict[str, tuple[nn.Module, Optimizer]],
        begin: Callable[[], None] | None = None,
        sources: Mapping[str, Contents] | None = None,
        by_process: str = "",
    ) -> bool:
        """Names what checkpoints hold and loads the newest one; True where the run goes on from one.

        A new run's folder is made here: a start that failed before leaves nothing that would be in the way of the next.

        Args:
            modules: unwrapped, by name.
            optimizers: by name, each with the module whose parameters it has.
            begin: gives a new run's modules their first weights, before the folder is made.
            sources: what the paths of the configuration lead to, by their keys.
            by_process: the setting, if any, by which each process works in its own way, so that their number counts.

        Raises:
            InputError: only damaged checkpoints; sources that hold other things than when the run began; or such a
                setting and another number of processes than before.
        """
        sources = sources or {}
        self.batches, self._modules, self._optimizers = batches, modules, optimizers
        if self.accelerator.is_main_process and self.folder.config_file.exists():
            self.folder.lock()
        found: list[Any] = list(self._checkpoints.latest()) if self.accelerator.is_main_process else [None, []]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        checkpoint, damaged = found
        for line in damaged:
            self.say(line)
        if checkpoint is None:
            self.folder.check_sources(self.config, sources, begun=False)  # type: ignore[arg-type]
            if begin:
                begin()
        else:
            self._load(checkpoint, sources, by_process)
        self.accelerator.wait_for_everyone()  # nobody writes before all have looked
        if self.accelerator.is_main_process:
            self._is_new = not self.folder.config_file.exists()
            self.folder.create(self.config, sources)  # type: ignore[arg-type]
            self.folder.cut_metrics(self.step)
        self.accelerator.wait_for_everyone()
        return checkpoint is not None

    def _load(self, checkpoint: Path, sources: Mapping[str, Contents], by_process: str) -> None:
        tensors, state = self._checkpoints.load(checkpoint)
        self.step, self.facts, self.finished = state["step"], state["facts"], state["finished"]
        remembered = {key: self.facts[name] for key, name in FORMER_FACTS.items() if name in self.facts}
        self.folder.check_sources(self.config, sources, remembered)  # type: ignore[arg-type]
        processes = self.accelerator.num_processes
        before = int(state.get("processes") or processes)
        if before != processes and by_process and not self.finished:
            raise InputError(
                f"{self.folder.path}: was trained by {before} process{'es' * (before > 1)} up to step {self.step}, now "
                f"there {'are' if processes > 1 else 'is'} {processes}. With {by_process} each process draws for "
                f"itself, so the run would not go on as it was: start it with {before} (--num_processes {before})"
            )
        if missing := (self._modules.keys() | self._optimizers.keys()) - tensors.keys():
            raise InputError(
                f"{checkpoint}: holds no {min(missing)}.safetensors, which this run needs; put back a copy of it, or "
                "remove the run's folder to begin anew"
            )
        for name, module in self._modules.items():
            own = module.state_dict()
            shares = {key: share_like(t, own[key]) if key in own else t for key, t in tensors[name].items()}
            fill(module, shares, checkpoint)
        for name, (module, optimizer) in self._optimizers.items():
            restore_optimizer(module, optimizer, tensors[name])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        means = {names: part.to(self.accelerator.device) for names, part in tensors.get("means", {}).items()}
        self._means.restore(means, self.accelerator.process_index, processes)
        if self.finished:
            self.say(f"{self.folder.path}: finished at step {self.step} ({self.finished}); nothing left to do")
            return
        self.say(f"going on from step {self.step} ({checkpoint})")
        if before != processes:
            self.say(
                f"with {processes} process{'es' * (processes > 1)} instead of {before}: the same batches and draws, "
                "sums in another order"
            )

    def steps(self, read: Callable[[Tensor], DataT], read_ahead: bool) -> Iterator[list[tuple[DataT, BatchRandom]]]:
        """The batches of the steps that are left. Sets the learning rate and the seeds of each, draws the bar.

        Raises:
            StopAsked: after the step that the processes agreed to stop at; its checkpoint is written.
        """
        if self.finished:
            return
        try:
            start_trackers(self.accelerator, self.config.run.trackers, self.step)
        except InputError:
            if self._is_new:  # the configuration names the tracker, so another one could not go on in this folder
                shutil.rmtree(self.folder.path, ignore_errors=True)
            raise
        ahead = self.batches.read_ahead(self.step, read) if read_ahead else None
        size, last = self.batches.batch_size, self.batches.max_steps
        self._bar = tqdm(
            total=last * size,
            initial=self.step * size,
            unit="img",
            unit_scale=True,
            smoothing=0.05,
            dynamic_ncols=True,
            mininterval=0.5,
            disable=not (self.accelerator.is_main_process and on_terminal()),
        )
        with self._bar, self._stop_requests.held():
            while self.step < last and not self.finished and not self._stop:
                self.begin_step()
                yield next(ahead) if ahead else self.batches.at(self.step, read)
        self.accelerator.end_training()
        if self._stop and not self.finished:
            if self.accelerator.is_main_process:
                self.folder.write_note(STOPPED, [f"step {self.step}: {self._stop.reason}", "the same command goes on"])
            raise self._stop

    def begin_step(self) -> None:
        """Sets the learning rate and the seeds of the step that comes."""
        self._set_lr()
        # Dropout draws from torch's own stream: seeded by step and rank, it is the same after a restart.
        _seed_torch(seed_for(self.seed, "torch", self.step, self.accelerator.process_index), self.accelerator.device)

    def record(self, metrics: dict[str, Tensor]) -> None:
        """Takes scalars by name, of one part of a batch or of an update; what is logged is their mean."""
        if self._means.begins(metrics):  # a term does: what came before has a line of its own
            self._log_training()
        self._means.add(metrics, self.step)

    def check_gradient(self, net: nn.Module, optimizer: Optimizer) -> Tensor:
        """The norm of the gradient of ``net``, which is clipped to `train.max_grad_norm`; called before each update.

        Where it is not finite and `train.on_not_finite` is `skip`, ``optimizer`` leaves the update out.
        """
        train = self.config.train
        # Accelerate's own clipping would take fp16's scale from the gradients of other optimizers, too.
        self.accelerator.unscale_gradients(optimizer)
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        norm = get_total_norm(gradients)
        if train.max_grad_norm:
            clip_grads_with_norm_(net.parameters(), train.max_grad_norm, norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if self.accelerator.scaler is not None:  # it leaves such updates out by itself, and lowers fp16's scale
            return norm.nan_to_num(0.0, 0.0, 0.0)
        if train.on_not_finite == "skip":
            # What torch's GradScaler tells a fused optimizer; the gradient is the same in all processes.
            inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
            inner.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        return norm

    def advance(self) -> dict[str, float] | None:
        """Counts a finished update; the training metrics where a line of them was due, the same in every process."""
        self.step += 1
        self._stop = self._stop_requests.agreed()
        self._ended.append(self.clock())
        if self._bar is not None:
            self._bar.update(self.batches.batch_size)
        if self.step % self.config.train.log_every == 0 or self._falls("validate") or self._falls("checkpoint"):
            return self._log_training()
        return None

    @property
    def seconds_per_step(self) -> float:
        """By :attr:`clock`: the median of the last steps without validations and checkpoints; nan before the second."""
        steps = [after - before for before, after in itertools.pairwise(self._ended)]
        return statistics.median(steps) if steps else float("nan")

    @property
    def progress(self) -> float:
        """The share of the run that is done, in [0, 1]."""
        return self.step / self.batches.max_steps

    def due(self, what: str) -> bool:
        """Whether `validate` or `checkpoint` falls on the update just finished; both always on the last, and a
        checkpoint where the run was asked to stop."""
        return self._falls(what) or (what == "checkpoint" and self._stop is not None)

    def _falls(self, what: str) -> bool:
        every = getattr(self.config.train, f"{what}_every") or self.batches.steps_per_epoch
        return self.step % every == 0 or self.step == self.batches.max_steps

    def log_validation(self, metrics: dict[str, float], what: str = "held out") -> None:
        """Writes a `val` line, and says it as ``what``.

        Raises:
            InputError: a number that is not finite; no checkpoint is written of this step.
        """
        self._check_finite(metrics)
        self._write_metrics("val", metrics)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self.say(f"step {self.step}: {what}: {shown}")

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
        """Writes a checkpoint and the curves of the metric ``curve``; called by every process.

        Args:
            write_model: called first, with the folder `model/`, once the weights are known to be finite.
        """
        if self.step == self.batches.max_steps and not self.finished:
            self.finish("all steps done")
        self._check_weights()
        tensors = {name: module.state_dict() for name, module in self._modules.items()}
        tensors |= {name: optimizer_tensors(*pair) for name, pair in self._optimizers.items()}
        tensors = {name: whole(group) for name, group in tensors.items()}
        if means := self._means.state(self._gather):  # where the run was asked to stop between two lines
            tensors["means"] = means
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None
            state = {"facts": self.facts, "finished": self.finished, "scaler": scaler}
            state["processes"] = self.accelerator.num_processes
            # The checkpoint comes last: a run that goes on from it, or ends with it, has all the rest.
            if write_model:
                write_model(self.folder.model)
            draw_curves(
                read_metrics(self.folder.metrics_file), self.folder.path / "losses.png", title, baselines, curve
            )
            self._checkpoints.save(self.step, tensors, state)
        self.accelerator.wait_for_everyone()

    # --- within ------------------------------------------------------------------------------------------------------

    def _set_lr(self) -> None:
        train = self.config.train
        factor = lr_at(
            self.step,
            lr=1.0,
            max_steps=self.batches.max_steps,
            warmup_steps=train.warmup_steps,
            schedule=train.lr_schedule,
        )
        for _, optimizer in self._optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
        self._lr = train.lr * factor

    def _gather(self, tensor: Tensor) -> Tensor:
        """Of all processes, (processes, ...)."""
        return self.accelerator.gather(tensor[None])  # type: ignore[return-value]

    def _log_training(self) -> dict[str, float]:
        means = self._means.take(self._gather)
        if means.first_broken:
            self._report_broken(means)
        metrics = {name: value for name, value in means.values.items() if np.isfinite(value)}
        self._write_metrics("train", metrics | {"lr": self._lr})
        shown = {name: f"{value:.4g}" for name, value in metrics.items()}
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            if not on_terminal():
                self.say(self._describe_step(shown))
        return metrics

    def _describe_step(self, metrics: dict[str, str]) -> str:
        seconds = self.seconds_per_step
        left, speed = seconds * (self.batches.max_steps - self.step), self.batches.batch_size / seconds
        time_left = f", {speed:.4g} img/s, {tqdm.format_interval(left)} left" if seconds > 0 else ""
        terms = ", ".join(f"{name} {value}" for name, value in metrics.items())
        return f"step {self.step}/{self.batches.max_steps}: {terms}{time_left}"

    def _report_broken(self, means: Means) -> None:
        """Names the term that was not finite first, the step, and the samples of that step's batch; ends the run, or,
        under `skip`, counts."""
        first = min(means.first_broken.values())
        terms = [name for name, step in means.first_broken.items() if step == first]
        parts = [name for name in terms if name not in WHOLES] or terms
        names = self.name_rows(self.batches.rows(first))
        note = self.folder.path / "not_finite.txt"
        if self.accelerator.is_main_process:
            self.folder.write_note(note.name, [f"step {first + 1}: {', '.join(terms)}", *names])
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more (all in {note})" if len(names) > 3 else "")
        said = f"step {first + 1}: {', '.join(parts)} is not finite for the batch of {shown}"
        if self.config.train.on_not_finite == "skip":
            left_out = sum(means.num_broken.get(name, 0) for name in ("grad_norm", "discriminator_grad_norm"))
            self.facts["skipped_updates"] = self.facts.get("skipped_updates", 0) + left_out
            self.say(f"{said}; updates left out so far: {self.facts['skipped_updates']}")
            return
        raise InputError(
            f"{said}; the run stops, and its last good checkpoint in {self.folder.checkpoints} is kept. {ADVICE}; "
            "train.on_not_finite=skip leaves such updates out"
        )

    def _check_weights(self) -> None:
        """The losses were finite before this update; the weights and codebooks must be so after it, and the same in all
        processes, or nothing is written over the last good ones."""
        named = {
            f"{part} {name}": tensor.detach()
            for part, module in self._modules.items()
            for name, tensor in module.state_dict().items()
        }
        shares = [t.to_local() if isinstance(t, DTensor) else t for t in named.values() if t.is_floating_point()]
        # Of all processes, so that none goes on alone where one has a broken share.
        norm = self.accelerator.reduce(get_total_norm([t.float() for t in shares]), "sum")
        if not norm.isfinite():  # type: ignore[union-attr]
            self._log_training()  # where the run was asked to stop between two lines, this one names the term
        self._check_finite({"the weights' norm": norm.item()})  # type: ignore[union-attr]
        if self.accelerator.num_processes == 1:
            return
        common = {name: tensor for name, tensor in named.items() if not isinstance(tensor, DTensor)}
        if not common:
            return
        digests = [torch.hash_tensor(t.contiguous()).view(torch.int64) for t in common.values()]
        every = self._gather(torch.stack(digests))
        differs = (every != every[0]).any(0).tolist()
        if others := [name for name, other in zip(common, differs, strict=True) if other]:
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            raise InputError(
                f"step {self.step}: the processes no longer have the same {', '.join(others[:3])}{more}; the run "
                f"stops, and its last good checkpoint in {self.folder.checkpoints} is kept. Give the same command to "
                "go on from it; if it happens again, a device or its memory is at fault"
            )

    def _check_finite(self, metrics: dict[str, float]) -> None:
        broken = [name for name, value in metrics.items() if not np.isfinite(value)]
        if broken:
            raise InputError(
                f"step {self.step}: {', '.join(broken)} is not finite; the run stops, and its last good checkpoint in "
                f"{self.folder.checkpoints} is kept. {ADVICE}"
            )

    def _write_metrics(self, split: str, metrics: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            self.folder.append_metrics({"step": self.step, "split": split, **metrics})
        self.accelerator.log({f"{split}/{name}": value for name, value in metrics.items()}, step=self.step)
