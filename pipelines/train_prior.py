"""Trains a prior over the codes of a tokenizer, by a config file or by one that fits the codes and that it writes.
Decodes a few samples at each validation.

accelerate launch -m pipelines.train_prior configs/prior/gpt_cifar10.yaml codes=codes/vqvae_cifar10 [key=value ...]
accelerate launch -m pipelines.train_prior codes/my_photos_tokenizer [key=value ...]
"""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twostage.core.machine.command import run_command
from twostage.core.options import DryRunOption, JsonOption, TimeLimitOption
from twostage.core.runs.finished_answer import FinishedAnswer
from twostage.core.training.training_command import run_training

if TYPE_CHECKING:
    from stage2_prior.prior_training import PriorTrainingConfig
    from twostage.core.training.base_run import BaseRun

__all__ = ["command"]


def command(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|CODES",
            help="A config file, for example from configs/prior/. Or the folder of codes: a fitting config is then "
            "written to runs/NAME_prior.yaml.",
        ),
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="codes=DIR and other settings as key=value.")] = None,
    dry_run: DryRunOption = False,
    time_limit: TimeLimitOption = None,
    json_file: JsonOption = None,
) -> None:
    """Train a prior over a tokenizer's codes. It draws samples at each validation. Run the same command again to
    resume."""

    def start() -> "BaseRun[PriorTrainingConfig]":
        from pipelines.drawing.rebuilt_images import find_decoder
        from pipelines.recipes.fitting_config import is_config, open_prior_config
        from stage2_prior.prior_training import train
        from twostage.core.training.training_run import TrainingRun

        opened = open_prior_config(config, overrides or [], dry_run)
        run = train(opened, dry_run, time_limit, None if dry_run else find_decoder(opened.codes))
        if isinstance(run, TrainingRun) and not is_config(config):
            run.report(f"Next: {shlex.join(['twostage', 'generate', str(run.folder.path)])}")
        return run

    run_training(start, dry_run, json_file, FinishedAnswer(Path(config), overrides or []))


if __name__ == "__main__":
    run_command(command)
