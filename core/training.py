"""The bookkeeping that both trainings call: processes, data order, metrics, checkpoints. The steps themselves are
visible in `train_tokenizer` and `train_prior`."""

import itertools
import os
import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, parse_flag_from_env
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from tqdm import tqdm

from core.checkpoint import Checkpoints, optimizer_tensors, restore_optimizer
from core.config import Count, Number, RunConfig, Section, Size
from core.errors import InputError
from core.model_folder import fill
from core.pictures import draw_curves
from core.precision import MixedPrecision, fastest_precision
from core.random import BatchRandom, seed_for
from core.run_folder import RunFolder, read_metrics
from core.schedules import Schedule, lr_at

__all__ = ["Batches", "Beta", "TrainConfig", "TrainingRun", "join_processes", "make_optimizer", "share_cores"]


ADVICE = "Try a lower train.lr, train.max_grad_norm=1.0, or train.mixed_precision=no"

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class TrainConfig(Section):
    """How long, how fast, and what is written when. Steps are updates of the weights."""

    batch_size: Count = 128
    """Samples an update, over all processes and accumulation steps together."""
    max_steps: Count | None = None
    """Updates; or give `epochs`."""
    epochs: Count | None = None
    """Passes over the training split; a last batch that is not full is left out."""
    lr: Number = Field(default=3e-4, gt=0)
    lr_schedule: Schedule = "constant"
    warmup_steps: Size = 0
    """Updates over which the learning rate rises from 0."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Adam's."""
    weight_decay: Number = Field(default=0.0, ge=0)
    """Decoupled (AdamW), on matrices and convolution kernels."""
    max_grad_norm: Number | None = Field(default=None, gt=0)
    """Gradients are clipped to this norm; None: never."""
    gradient_accumulation_steps: Count = 1
    """Parts that an update's batch is worked on in, one after another."""
    ema_decay: Number | None = Field(default=None, gt=0, lt=1)
    """Of the averaged weights that validation measures and inference loads; None: the weights themselves."""
    mixed_precision: MixedPrecision = "no"
    """`auto` measures this machine and takes bf16 where it is clearly faster."""
    log_every: Count = 50
    """Steps between training lines in metrics.jsonl (each the mean since the one before)."""
    validate_every: Count | None = None
    """Steps between validations and sample pictures; None: once an epoch."""
    checkpoint_every: Count | None = None
    """Steps between checkpoints; None: once an epoch."""
    keep_checkpoints: Count = 2

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError(f"give either max_steps or epochs, got max_steps={self.max_steps}, epochs={self.epochs}")
        return self


class _TrainingSections(Protocol):
    @property
    def run(self) -> RunConfig: ...
    @property
    def train(self) -> TrainConfig: ...
    def model_dump(self, *, mode: str) -> dict[str, Any]: ...
    def model_copy(self, *, update: dict[str, Any]) -> Any: ...


ConfigT = TypeVar("ConfigT", bound=_TrainingSections)
DataT = TypeVar("DataT")


def share_cores() -> None:
    """On a CPU, divides the cores among this machine's processes (launchers set one thread a process)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def join_processes() -> PartialState:
    """This process's place among those that the launcher started.

    Without a GPU, Accelerate takes each of several processes for the only one, unless told that they are on the CPU.
    """
    share_cores()
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def make_optimizer(
    model: nn.Module, train: TrainConfig, *, lr: float | None = None, betas: tuple[float, float] | None = None
) -> Optimizer:
    """AdamW over the trainable weights of ``model``; biases, gains and embeddings of one dimension are not decayed.

    Args:
        lr: of a second network; None: `train.lr`. Both follow the same schedule.
        betas: likewise.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if train.weight_decay:
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": train.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
    else:
        groups = [{"params": trained, "weight_decay": 0.0}]
    for group in groups:
        group["initial_lr"] = lr or train.lr
    fused = trained[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=lr or train.lr, betas=betas or train.betas, fused=fused)


def _seed_torch(seed: int, device: torch.device) -> None:
    """torch.manual_seed for every step: where CUDA is never used, that one would queue a call for it each time."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


class Batches:
    """The data order as a pure function of the step: nothing to save, and the same at any number of processes.

    Args:
        num_samples: of the training split.
        what: a sample's name for messages (`images`, `code grids`).

    Raises:
        InputError: fewer samples than one batch, or a batch that the processes cannot share equally.
    """

    def __init__(self, num_samples: int, train: TrainConfig, seed: int, accelerator: Accelerator, what: str) -> None:
        parts = accelerator.num_processes * train.gradient_accumulation_steps
        if num_samples < train.batch_size:
            raise InputError(
                f"train.batch_size {train.batch_size}: the training split has only {num_samples} {what}, fewer than "
                f"one batch; set train.batch_size to at most {num_samples}"
            )
        if train.batch_size % parts:
            raise InputError(
                f"train.batch_size {train.batch_size}: cannot be shared equally by {accelerator.num_processes} "
                f"processes x {train.gradient_accumulation_steps} accumulation steps; use a multiple of {parts}"
            )
        self.num_samples, self.batch_size, self.seed = num_samples, train.batch_size, seed
        self.steps_per_epoch = num_samples // train.batch_size
        self.max_steps = train.max_steps or (train.epochs or 0) * self.steps_per_epoch
        size = train.batch_size // parts
        index, total = accelerator.process_index, accelerator.num_processes
        starts = [(part * total + index) * size for part in range(train.gradient_accumulation_steps)]
        self.places = [slice(start, start + size) for start in starts]  # of this process in the global batch
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def rows(self, step: int) -> Tensor:
        """The rows of the training split in the global batch of ``step``, (batch_size,) int64."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            order = np.random.default_rng(seed_for(self.seed, "order", epoch)).permutation(self.num_samples)
            self._epoch, self._order = epoch, torch.from_numpy(order)
        return self._order[place * self.batch_size : (place + 1) * self.batch_size]

    def at(self, step: int, read: Callable[[Tensor], DataT]) -> list[tuple[DataT, BatchRandom]]:
        """This process's parts of the batch of ``step``: the data and the random numbers that go with it."""
        rows, seed = self.rows(step), seed_for(self.seed, "step", step)
        return [(read(rows[place]), BatchRandom(seed, place, self.batch_size)) for place in self.places]

    def read_ahead(self, start: int, read: Callable[[Tensor], DataT]) -> Iterator[list[tuple[DataT, BatchRandom]]]:
        """:meth:`at` from ``start`` to the last step, each read by a thread while the one before is worked on."""
        with ThreadPoolExecutor(1) as pool:
            upcoming = pool.submit(self.at, start, read)
            for step in range(start + 1, self.max_steps + 1):
                batch = upcoming.result()
                if step < self.max_steps:
                    upcoming = pool.submit(self.at, step, read)
                yield batch


class TrainingRun(Generic[ConfigT]):
    """One run: its processes, its folder, and what is written when.

    Args:
        config: of the training verb; the run goes on with :attr:`config`, in which `auto` is decided.
    """

    clock = staticmethod(time.perf_counter)

    def __init__(self, config: ConfigT) -> None:
        self.folder = RunFolder(config.run.dir)
        state = join_processes()
        self.config: ConfigT = self._resolve(config, state)
        self.folder.check(self.config)  # type: ignore[arg-type]
        state.wait_for_everyone()
        train = self.config.train
        # torch 2.14 has a newer name for `broadcast_buffers`, which older ones and Accelerate do not know yet.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        self.accelerator = Accelerator(
            mixed_precision=train.mixed_precision,
            gradient_accumulation_steps=train.gradient_accumulation_steps,
            log_with=list(self.config.run.trackers) or None,  # it warns about an empty list
            project_dir=self.folder.path,
            # Broadcasting buffers would overwrite every rank's codebook with rank 0's.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        self.seed = self.config.run.seed
        self.step = 0
        self.facts: dict[str, Any] = {}  # what a restart must know beside the tensors; plain JSON
        self.finished: str | None = None
        self._checkpoints = Checkpoints(self.folder.checkpoints, train.keep_checkpoints)
        self._modules: Mapping[str, nn.Module] = {}
        self._optimizers: dict[str, tuple[nn.Module, Optimizer]] = {}
        self.name_rows: Callable[[Tensor], list[str]] = lambda rows: [f"row {row}" for row in rows.tolist()]
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._first_broken: Tensor | None = None  # by metric: the step that was first not finite, or -1
        self._recorded = 0
        self._ended: deque[float] = deque(maxlen=100)  # when the last steps ended
        self._bar: tqdm | None = None
        self._lr = 0.0
        torch.manual_seed(seed_for(self.seed, "initial weights"))

    def _resolve(self, config: ConfigT, state: PartialState) -> ConfigT:
        """`auto` becomes what the run was started with, or else what this machine is fastest in."""
        if config.train.mixed_precision == "fp16" and state.device is not None and state.device.type == "cpu":
            raise InputError(
                "train.mixed_precision 'fp16': needs a GPU, and this run is on the CPU; use bf16, auto or no"
            )
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
        self, batches: Batches, modules: Mapping[str, nn.Module], optimizers: dict[str, tuple[nn.Module, Optimizer]]
    ) -> bool:
        """Names what checkpoints hold and loads the newest one; True where the run goes on from one.

        A new run's folder is made here: a start that failed before leaves nothing that would be in the way of the next.

        Args:
            modules: unwrapped, by name.
            optimizers: by name, each with the module whose parameters it has.
        """
        self.batches, self._modules, self._optimizers = batches, modules, optimizers
        found = [self._checkpoints.latest()]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        if found[0] is not None:
            tensors, state = self._checkpoints.load(found[0])
            for name, module in modules.items():
                fill(module, tensors[name], found[0])
            for name, (module, optimizer) in optimizers.items():
                restore_optimizer(module, optimizer, tensors[name])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.step, self.facts, self.finished = state["step"], state["facts"], state["finished"]
            self.say(
                f"going on from step {self.step} ({found[0]})"
                if not self.finished
                else f"{self.folder.path}: finished at step {self.step} ({self.finished}); nothing left to do"
            )
        if self.accelerator.is_main_process:
            self.folder.create(self.config)  # type: ignore[arg-type]
            self.folder.cut_metrics(self.step)
        self.accelerator.wait_for_everyone()
        return found[0] is not None

    def steps(self, read: Callable[[Tensor], DataT], read_ahead: bool) -> Iterator[list[tuple[DataT, BatchRandom]]]:
        """The batches of the steps that are left. Sets the learning rate and the seeds of each, draws the bar."""
        if self.finished:
            return
        purge = {"tensorboard": {"purge_step": self.step}} if "tensorboard" in self.config.run.trackers else {}
        self.accelerator.init_trackers("tensorboard", init_kwargs=purge)
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
            disable=not self.accelerator.is_main_process,
        )
        with self._bar:
            while self.step < last and not self.finished:
                self._set_lr()
                # Dropout draws from torch's own stream: seeded by step and rank, it is the same after a restart.
                _seed_torch(
                    seed_for(self.seed, "torch", self.step, self.accelerator.process_index), self.accelerator.device
                )
                yield next(ahead) if ahead else self.batches.at(self.step, read)
        self.accelerator.end_training()

    def record(self, metrics: dict[str, Tensor]) -> None:
        """Takes scalars by name (`loss` among them) from one part of a batch; what is logged is their mean."""
        values = torch.stack([value.detach().float() for value in metrics.values()])
        if self._sums is None or self._first_broken is None or self._names != list(metrics):
            if self._recorded:  # a term begins here: what came before has a line of its own
                self._log_training()
            self._names, self._sums = list(metrics), torch.zeros_like(values)
            self._first_broken = torch.full_like(values, -1, dtype=torch.long)
        self._recorded += 1
        self._sums += values
        # Remembered on the device: looking at it in every step would make the step wait.
        self._first_broken.masked_fill_(~values.isfinite() & (self._first_broken < 0), self.step)

    def advance(self) -> dict[str, float] | None:
        """Counts a finished update; the training metrics where a line of them was due, the same in every process."""
        self.step += 1
        self._ended.append(self.clock())
        if self._bar is not None:
            self._bar.update(self.batches.batch_size)
        # A line is due at every checkpoint too, so that a checkpoint never has a half-filled mean to remember.
        if self.step % self.config.train.log_every == 0 or self.due("validate") or self.due("checkpoint"):
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
        """Whether `validate` or `checkpoint` falls on the update just finished; both always on the last."""
        every = getattr(self.config.train, f"{what}_every") or self.batches.steps_per_epoch
        return self.step % every == 0 or self.step == self.batches.max_steps

    def log_validation(self, metrics: dict[str, float]) -> None:
        """Writes a `val` line.

        Raises:
            InputError: a number that is not finite; no checkpoint is written of this step.
        """
        self._check_finite(metrics)
        self._write_metrics("val", metrics)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self.say(f"step {self.step}: held out: {shown}")

    def finish(self, reason: str) -> None:
        """Ends the run after this step."""
        self.finished = reason

    def check_weights(self) -> None:
        """The losses were finite before this update; the weights and codebooks must be so after it, or nothing is
        written over the last good ones."""
        tensors = [t.detach() for module in self._modules.values() for t in module.state_dict().values()]
        norm = get_total_norm([t.float() for t in tensors if t.is_floating_point()])
        self._check_finite({"the weights' norm": norm.item()})

    def save(self, title: str, baselines: dict[str, float] | None = None, curve: str = "loss") -> None:
        """Writes a checkpoint and the curves of the metric ``curve``; called by every process."""
        if self.step == self.batches.max_steps and not self.finished:
            self.finish("all steps done")
        self.check_weights()
        if self.accelerator.is_main_process:
            tensors = {name: module.state_dict() for name, module in self._modules.items()}
            tensors |= {name: optimizer_tensors(*pair) for name, pair in self._optimizers.items()}
            scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None
            state = {"facts": self.facts, "finished": self.finished, "scaler": scaler}
            self._checkpoints.save(self.step, tensors, state)
            draw_curves(
                read_metrics(self.folder.metrics_file), self.folder.path / "losses.png", title, baselines, curve
            )
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

    def _log_training(self) -> dict[str, float]:
        assert self._sums is not None
        assert self._first_broken is not None
        means: list[float] = self.accelerator.reduce(self._sums / self._recorded, "mean").tolist()  # type: ignore[union-attr]
        metrics = dict(zip(self._names, means, strict=True))
        if not np.isfinite(means).all():
            self._stop_at_broken(metrics)
        self._sums.zero_()
        self._recorded = 0
        self._write_metrics("train", metrics | {"lr": self._lr})
        if self._bar is not None:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in metrics.items()}, refresh=False)
        return metrics

    def _stop_at_broken(self, metrics: dict[str, float]) -> None:
        """Names the term that was not finite first, the step, and the samples of that step's batch."""
        assert self._first_broken is not None
        steps = torch.where(self._first_broken < 0, self.batches.max_steps, self._first_broken)
        # The first in any process; each has the same names.
        steps = -self.accelerator.gather(-steps[None]).amax(0)  # type: ignore[union-attr,operator]
        first = int(steps.min())
        if first == self.batches.max_steps:  # every value was finite, their sum is not
            return self._check_finite(metrics)
        terms = [name for name, step in zip(self._names, steps.tolist(), strict=True) if step == first]
        parts = [name for name in terms if name not in ("loss", "nats_per_image", "bits_per_dim")] or terms
        rows = self.batches.rows(first)
        names = self.name_rows(rows)
        if self.accelerator.is_main_process:
            self.folder.write_note("not_finite.txt", [f"step {first + 1}: {', '.join(terms)}", *names])
        shown = ", ".join(names[:3])
        raise InputError(
            f"step {first + 1}: {', '.join(parts)} is not finite for the batch of {shown} and {len(names) - 3} more "
            f"(all in {self.folder.path / 'not_finite.txt'}); the run stops, and its last good checkpoint in "
            f"{self.folder.checkpoints} is kept. {ADVICE}"
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
