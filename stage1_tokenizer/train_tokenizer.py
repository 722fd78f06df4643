"""Trains a tokenizer or another autoencoder.

accelerate launch -m stage1_tokenizer.train_tokenizer configs/tokenizer/vqvae_cifar10.yaml [key=value ...]
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twostage.core.machine.command import print_once, run_command
from twostage.core.options import DryRunOption, JsonOption, OverridesArgument, TimeLimitOption, WeightsDirOption
from twostage.core.runs.finished_answer import FinishedAnswer
from twostage.core.training.training_command import run_training

if TYPE_CHECKING:
    from stage1_tokenizer.tokenizer_training import TokenizerConfig
    from twostage.core.training.base_run import BaseRun

__all__ = ["command"]


def command(
    config: Annotated[Path, typer.Argument(help="A config file, for example from configs/tokenizer/.")],
    overrides: OverridesArgument = None,
    weights_dir: WeightsDirOption = None,
    dry_run: DryRunOption = False,
    time_limit: TimeLimitOption = None,
    json_file: JsonOption = None,
) -> None:
    """Train a tokenizer or another autoencoder from a config file. Run the same command again to resume."""

    def start() -> "BaseRun[TokenizerConfig]":
        from stage1_tokenizer.tokenizer_training import TokenizerConfig, train
        from twostage.core.config.sections import load_config

        return train(load_config(TokenizerConfig, config, overrides, print_once), weights_dir, dry_run, time_limit)

    run_training(start, dry_run, json_file, FinishedAnswer(config, overrides or []))


if __name__ == "__main__":
    run_command(command)
