"""The bookkeeping that both trainings call: what is written when, and how a run goes on. The steps themselves are
visible in `train_tokenizer` and `train_prior`."""

import itertools
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
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, patch_environment
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from tqdm import tqdm

from core.batches import Batches
from core.checkpoint import Checkpoints, optimizer_tensors, restore_optimizer
from core.config import RunConfig
from core.errors import InputError
from core.model_folder import fill
from core.pictures import draw_curves
from core.precision import fastest_precision
from core.processes import join_processes
from core.random import BatchRandom, seed_for
from core.run_folder import RunFolder, read_metrics
from core.schedules import lr_at
from core.sharding import share_like, units_to_shard, whole
from core.train_config import TrainConfig

__all__ = ["ConfigT", "DataT", "TrainingRun", "make_optimizer"]

ADVICE = "Try a lower train.lr, train.max_grad_norm=1.0, or train.mixed_precision=no"


class _TrainingSections(Protocol):
    @property
    def run(self) -> RunConfig: ...
    @property
    def train(self) -> TrainConfig: ...
    def model_dump(self, *, mode: str) -> dict[str, Any]: ...
    def model_copy(self, *, update: dict[str, Any]) -> Any: ...


ConfigT = TypeVar("ConfigT", bound=_TrainingSections)
DataT = TypeVar("DataT")


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


class TrainingRun(Generic[ConfigT]):
    """One run: its processes, its folder, and what is written when.

    Args:
        config: of the training verb; the run goes on with :attr:`config`, in which `auto` is decided.
        shardable: whether the launch may ask for FSDP; the training then looks at :attr:`units_to_shard`.
    """

    clock = staticmethod(time.perf_counter)

    def __init__(self, config: ConfigT, shardable: bool = False) -> None:
        self.folder = RunFolder(config.run.dir)
        self.units_to_shard = units_to_shard(shardable)
        state = join_processes()
        self.config: ConfigT = self._resolve(config, state)
        self.folder.check(self.config)  # type: ignore[arg-type]
        state.wait_for_everyone()
        train = self.config.train
        # torch 2.14 has a newer name for `broadcast_buffers`, which older ones and Accelerate do not know yet.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        with patch_environment(accelerate_use_fsdp="false"):  # a model that is sharded is so before it sees it
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
        check: Callable[[], None] | None = None,
    ) -> bool:
        """Names what checkpoints hold and loads the newest one; True where the run goes on from one.

        A new run's folder is made here: a start that failed before leaves nothing that would be in the way of the next.

        Args:
            modules: unwrapped, by name.
            optimizers: by name, each with the module whose parameters it has.
            begin: gives a new run's modules their first weights, before the folder is made.
            check: looks at the :attr:`facts` of a run that goes on, before its weights are loaded.
        """
        self.batches, self._modules, self._optimizers = batches, modules, optimizers
        found = [self._checkpoints.latest()]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        if found[0] is None:
            if begin:
                begin()
        else:
            tensors, state = self._checkpoints.load(found[0])
            self.step, self.facts, self.finished = state["step"], state["facts"], state["finished"]
            if check:
                check()
            for name, module in modules.items():
                own = module.state_dict()
                shares = {key: share_like(t, own[key]) if key in own else t for key, t in tensors[name].items()}
                fill(module, shares, found[0])
            for name, (module, optimizer) in optimizers.items():
                restore_optimizer(module, optimizer, tensors[name])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
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
                self.begin_step()
                yield next(ahead) if ahead else self.batches.at(self.step, read)
        self.accelerator.end_training()

    def begin_step(self) -> None:
        """Sets the learning rate and the seeds of the step that comes."""
        self._set_lr()
        # Dropout draws from torch's own stream: seeded by step and rank, it is the same after a restart.
        _seed_torch(seed_for(self.seed, "torch", self.step, self.accelerator.process_index), self.accelerator.device)

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
        if self.accelerator.is_main_process:
            if write_model:
                write_model(self.folder.model)
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

    def _check_weights(self) -> None:
        """The losses were finite before this update; the weights and codebooks must be so after it, or nothing is
        written over the last good ones."""
        tensors = [t.detach() for module in self._modules.values() for t in module.state_dict().values()]
        tensors = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if t.is_floating_point()]
        # Of all processes, so that none goes on alone where one has a broken share.
        norm = self.accelerator.reduce(get_total_norm([t.float() for t in tensors]), "sum")
        self._check_finite({"the weights' norm": norm.item()})  # type: ignore[union-attr]

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
