"""Trains a tokenizer or another autoencoder, by a config file or by one that fits the images and that it writes.

accelerate launch -m pipelines.train_tokenizer configs/tokenizer/vqvae_cifar10.yaml [key=value ...]
accelerate launch -m pipelines.train_tokenizer my_photos [key=value ...]
"""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twostage.core.machine.command import run_command
from twostage.core.options import DryRunOption, JsonOption, OverridesArgument, TimeLimitOption, WeightsDirOption
from twostage.core.runs.finished_answer import FinishedAnswer
from twostage.core.training.training_command import run_training

if TYPE_CHECKING:
    from stage1_tokenizer.tokenizer_training import TokenizerConfig
    from twostage.core.training.base_run import BaseRun

__all__ = ["command"]


def command(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|IMAGES",
            help="A config file, for example from configs/tokenizer/. Or images (shapes, a folder, a parquet file, "
            "$TWOSTAGE_DATA/NAME, owner/name): a fitting config is then written to runs/NAME_tokenizer.yaml.",
        ),
    ],
    overrides: OverridesArgument = None,
    weights_dir: WeightsDirOption = None,
    dry_run: DryRunOption = False,
    time_limit: TimeLimitOption = None,
    json_file: JsonOption = None,
) -> None:
    """Train a tokenizer or another autoencoder, by a config file or one that fits your images. Run the same command
    again to resume."""

    def start() -> "BaseRun[TokenizerConfig]":
        from pipelines.recipes.fitting_config import is_config, open_tokenizer_config
        from stage1_tokenizer.tokenizer_training import train
        from twostage.core.training.training_run import TrainingRun

        run = train(open_tokenizer_config(config, overrides or [], dry_run), weights_dir, dry_run, time_limit)
        if isinstance(run, TrainingRun) and not is_config(config):
            folder, data = run.folder.path, run.config.data
            variants = " --horizontal-flip" * data.horizontal_flip + " --crops 2" * (data.random_crop is not None)
            encode = f"{shlex.join(['twostage', 'encode', str(folder)])}{variants}"
            run.report(f"Next: {encode}", f"Then: {shlex.join(['twostage', 'train-prior', f'codes/{folder.name}'])}")
        return run

    run_training(start, dry_run, json_file, FinishedAnswer(Path(config), overrides or []))


if __name__ == "__main__":
    run_command(command)
