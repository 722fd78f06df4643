"""A training run: how it begins, takes its steps, saves and ends.

The steps are visible in `train_tokenizer`, `feature_training` and `train_prior`. :class:`Journal` keeps what they
measure, :class:`Health` stops the run if its numbers break.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from twostage.core.errors import InputError, StopAsked
from twostage.core.machine.processes import join_processes
from twostage.core.machine.sharding import share_like, units_to_shard
from twostage.core.machine.stopping import StopRequests
from twostage.core.runs.checkpoint import optimizer_tensors, restore_optimizer
from twostage.core.runs.finished_answer import FinishedAnswer, stamp
from twostage.core.runs.model_folder import fill
from twostage.core.runs.run_folder import STOPPED, RunFolder, read_metrics
from twostage.core.training.base_run import BaseRun, ConfigT, DataT, resolve_precision
from twostage.core.training.health import ADVICE, GRADIENT_NORMS, Health
from twostage.core.training.journal import Journal
from twostage.core.training.random import BatchRandom
from twostage.core.training.trackers import check_trackers, start_trackers

__all__ = ["TrainingRun"]

FORMER_FACTS = {"data.source": "data", "codes": "codes"}
"""The fact in older checkpoints that became each key of sources.json."""


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
        super().__init__(config, units)
        self.health = Health(self.accelerator, self.folder)
        self.journal = Journal(self.folder, self.accelerator, config.train.keep_checkpoints)
        self._stop: StopAsked | None = None
        self._stamps: dict[str, str | None] = {}  # of the data, when it was read

    @property
    def finished(self) -> str | None:
        """Why the run ends after this step; None: it continues."""
        return self.config.train.reason_to_end(self.step, self.batches.max_steps, self.facts)

    @property
    def progress(self) -> float:
        """The share of the planned steps that are done, in [0, 1]; a run that was extended later stays at 1."""
        return min(1.0, self.step / self.facts.get("planned_steps", self.batches.max_steps))

    @property
    def history(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder.metrics_file)

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

    def load(self, checkpoint: Path, process_setting: str = "", shares: str = "") -> None:
        """Continues from a checkpoint.

        Args:
            process_setting: a setting, if any, that makes each process draw for itself (such as `model.dropout=0.1`):
                the number of processes must then stay the same.
            shares: the settings, if any, that count in shares of the planned steps, see :attr:`progress`.

        Raises:
            InputError: files are missing, sources or the number of processes have changed, or the run is already longer
                than its new length.
        """
        tensors, state = self.journal.checkpoints.load(checkpoint)
        self.step, self.facts = state["step"], state["facts"]
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
        self._report_length(state, shares)
        self._load_tensors(tensors, checkpoint)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        means = {names: part.to(self.accelerator.device) for names, part in tensors.get("means", {}).items()}
        self.journal.means.restore(means, self.accelerator.process_index, processes)
        if self.finished:
            self.report(self._answer())
            return
        self.report(f"Resuming from step {self.step} ({checkpoint})")
        if processes_before != processes:
            self.report(
                f"with {_count_processes(processes)} instead of {processes_before}: the batches and the random numbers "
                "stay the same, only the order of sums changes"
            )

    def _answer(self) -> str:
        return f"{self.folder.path}: finished at step {self.step} ({self.finished}); nothing left to do"

    def keep_answer(self, answer: FinishedAnswer) -> None:
        """Stores what to say if the same command is given again, which then starts nothing."""
        if self.accelerator.is_main_process and self.finished:
            own = (self.folder.config_file, self.folder.sources_file, self.folder.checkpoints)
            stamps = {str(path.absolute()): stamp(path) for path in own} | self._stamps
            answer.keep([self._answer(), self.folder.results], stamps)

    def _report_length(self, state: dict[str, Any], shares: str) -> None:
        """Reports what it means if the run has another length than at its checkpoint, and keeps the planned steps."""
        train, new = self.config.train, self.batches.max_steps
        # Checkpoints of earlier versions do not have the length.
        before = state.get("max_steps") or (self.step if state["finished"] == "all steps done" else new)
        if before == new:
            return
        if new < self.step or (new == self.step and not state["finished"]):
            key, value = ("max_steps", train.max_steps) if train.max_steps else ("epochs", train.epochs)
            raise InputError(
                f"train.{key} {value}: the run would end at step {new}, but {self.folder.path} has already taken "
                f"{self.step} steps. Set a larger train.{key}"
            )
        self.facts["planned_steps"] = planned = min(self.facts.get("planned_steps", before), new)
        line = f"{self.folder.path}: {new} steps instead of {before}"
        if train.lr_schedule == "cosine":
            rate = train.lr * train.lr_share(self.step, new)
            line += f"; the learning rate now follows the cosine over {new} steps: {rate:.3g} here, 0 at the end"
        if shares and planned < new:
            line += f"; {shares} still count the {planned} steps that were planned"
        self.report(line)

    def _load_tensors(self, tensors: dict[str, dict[str, Tensor]], checkpoint: Path) -> None:
        optimizers = {f"{network.prefix}optimizer": network for network in self._networks}
        if missing := (self._modules.keys() | optimizers.keys()) - tensors.keys():
            raise InputError(
                f"{checkpoint}: {min(missing)}.safetensors is missing. Restore a copy of it, or remove the run's "
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

        The folder is created this late so that a failed start leaves nothing behind.

        Raises:
            StopAsked: after the step at which the processes agreed to stop; its checkpoint is written.
        """
        self._create_folder()
        if self.finished:
            return
        start_trackers(self.accelerator, self.folder, self.config.run, self.config, self.step)  # type: ignore[arg-type]
        ahead = self.batches.read_ahead(self.step, read) if read_ahead else None
        with self.journal.progress_bar(self.batches, self.step), self._stop_requests.listening():
            while not self.finished and not self._stop:
                self.begin_step()
                yield next(ahead) if ahead else self.batches.at(self.step, read)
        self.accelerator.end_training()
        if self._stop and not self.finished:
            if self.accelerator.is_main_process:
                lines = [f"step {self.step}: {self._stop.reason}", "Run the same command again to resume."]
                self.folder.write_note(STOPPED, lines)
            raise self._stop

    def _create_folder(self) -> None:
        """Creates the folder, or drops its records of later steps."""
        self.accelerator.wait_for_everyone()  # no process writes before all have checked the folder
        if self.accelerator.is_main_process:
            places = [one.place for one in self._sources.values() if one.place and not one.only_to_begin]
            self._stamps = {str(place): stamp(place) for place in places}
            self.folder.create(self.config, self._sources)  # type: ignore[arg-type]
            self.folder.cut_metrics(self.step)
        self.accelerator.wait_for_everyone()

    def record(self, metrics: dict[str, Tensor]) -> None:
        """Adds scalars by name, from one part of a batch or one update; their mean is logged."""
        if self.journal.means.begins(metrics):  # a new term: the steps before it get a line of their own
            self._log_training()
        self.journal.means.add(metrics, self.step)

    def advance(self) -> dict[str, float] | None:
        """Counts a finished update; returns training metrics (the same in all processes) if a line was due."""
        self.record(self._gradient_norms)
        self._gradient_norms = {}
        super().advance()
        self._stop = self._stop_requests.agreed()
        self.journal.bar.update()
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
            problem = self.health.report_not_finite(means, lambda step: self._name_rows(self.batches.rows(step)))
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

    def show_image(self, image: Image.Image, tag: str, name: str = "") -> None:
        """Keeps an image of this step, see :meth:`Journal.show_image`; only the main process calls it."""
        self.journal.show_image(image, self.step, tag, name)

    def save(
        self,
        title: str,
        baselines: dict[str, float] | None = None,
        curve: str = "loss",
        write_model: Callable[[Path], None] | None = None,
    ) -> None:
        """Writes a checkpoint, and the curves of the metric ``curve``; called by every process.

        Args:
            title: the title of the curves.
            baselines: horizontal lines in the plot, by name.
            write_model: called first, with the folder `model/`, if the weights are finite.

        Raises:
            InputError: weights are not finite or not the same in all processes, or the checkpoint cannot be written.
        """
        self._check_weights()
        tensors = {name: module.state_dict() for name, module in self._modules.items()}
        for network in self._networks:
            tensors[f"{network.prefix}optimizer"] = optimizer_tensors(network.module, network.optimizer)
        scaler = self.accelerator.scaler
        state = {
            "facts": self.facts,
            "finished": self.finished,
            "max_steps": self.batches.max_steps,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "processes": self.accelerator.num_processes,
        }
        curves = {"title": title, "baselines": baselines, "metric": curve}
        self.journal.save(self.step, tensors, state, curves, write_model)

    def _check_weights(self) -> None:
        """Checks that weights and codebooks are finite after this update and the same in all processes; otherwise the
        last good ones are kept."""
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


def _count_processes(count: int) -> str:
    return f"{count} process{'es' * (count > 1)}"
