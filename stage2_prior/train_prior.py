"""Trains a prior over the codes of a tokenizer.

accelerate launch -m stage2_prior.train_prior configs/prior/gpt_cifar10.yaml codes=codes/vqvae_cifar10 [key=value ...]
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twostage.core.machine.command import print_once, run_command
from twostage.core.options import DryRunOption, JsonOption, TimeLimitOption
from twostage.core.runs.finished_answer import FinishedAnswer
from twostage.core.training.training_command import run_training

if TYPE_CHECKING:
    from stage2_prior.prior_training import PriorTrainingConfig
    from twostage.core.training.base_run import BaseRun

__all__ = ["command"]


def command(
    config: Annotated[Path, typer.Argument(help="A config file, for example from configs/prior/.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="codes=DIR and other settings as key=value.")] = None,
    dry_run: DryRunOption = False,
    time_limit: TimeLimitOption = None,
    json_file: JsonOption = None,
) -> None:
    """Train a prior over a tokenizer's codes. Run the same command again to resume."""
    print_once(
        "No samples are drawn during training, because this command does not load the tokenizer. To see some at each "
        "validation, run twostage train-prior or accelerate launch -m pipelines.train_prior"
    )

    def start() -> "BaseRun[PriorTrainingConfig]":
        from stage2_prior.prior_training import PriorTrainingConfig, train
        from twostage.core.config.sections import load_config

        return train(load_config(PriorTrainingConfig, config, overrides, print_once), dry_run, time_limit)

    run_training(start, dry_run, json_file, FinishedAnswer(config, overrides or []))


if __name__ == "__main__":
    run_command(command)
