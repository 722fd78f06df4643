"""The training commands. It loads no torch, so that `--help` and the answer of a finished run are instant."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twostage.core.errors import InputError
from twostage.core.files import write_json
from twostage.core.machine.command import print_once
from twostage.core.runs.finished_answer import FinishedAnswer

if TYPE_CHECKING:
    from twostage.core.training.base_run import BaseRun

__all__ = ["run_training"]


def run_training(
    train: "Callable[[], BaseRun[Any]]", dry_run: bool, json_file: Path | None, answer: FinishedAnswer | None = None
) -> None:
    """Runs a training command: ``train`` resumes after SIGTERM, and its dry run's figures go to ``json_file``.

    Args:
        answer: printed in place of training if the run is finished; stored when it finishes.

    Raises:
        InputError: a ``json_file`` without a dry run, or one that cannot be written. Nothing has run then.
    """
    if json_file and not dry_run:
        raise InputError(
            f"--json {json_file}: only works with --dry-run. Add --dry-run or remove --json (a real run writes "
            "metrics.jsonl)"
        )
    if json_file and (json_file.is_dir() or not json_file.parent.is_dir()):
        raise InputError(f"--json {json_file}: expected a file in an existing folder")
    if answer and not dry_run and (lines := answer.lines()):
        print_once("\n".join(lines))
        return
    from twostage.core.machine.stopping import resumable
    from twostage.core.training.dry_run import DryRun
    from twostage.core.training.training_run import TrainingRun

    with resumable():
        run = train()
    if json_file and isinstance(run, DryRun) and run.accelerator.is_main_process:
        write_json(json_file, run.figures)
    if answer and isinstance(run, TrainingRun):
        run.keep_answer(answer)
