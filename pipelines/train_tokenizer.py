"""Trains a tokenizer or another autoencoder, by a config file or by one that fits the images and that it writes.

accelerate launch -m pipelines.train_tokenizer configs/tokenizer/vqvae_cifar10.yaml [key=value ...]
accelerate launch -m pipelines.train_tokenizer my_photos [key=value ...]
"""

import shlex
from typing import Annotated

import typer

from twostage.core.machine.command import run_command
from twostage.core.options import DryRunOption, JsonOption, OverridesArgument, TimeLimitOption, WeightsDirOption

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
    from pipelines.recipes.fitting_config import is_config, open_tokenizer_config
    from stage1_tokenizer.train_tokenizer import TokenizerConfig, train
    from twostage.core.training.base_run import BaseRun
    from twostage.core.training.dry_run import run_training
    from twostage.core.training.training_run import TrainingRun

    def start() -> BaseRun[TokenizerConfig]:
        run = train(open_tokenizer_config(config, overrides or [], dry_run), weights_dir, dry_run, time_limit)
        if isinstance(run, TrainingRun) and not is_config(config):
            folder, data = run.folder.path, run.config.data
            variants = " --horizontal-flip" * data.horizontal_flip + " --crops 2" * (data.random_crop is not None)
            encode = f"{shlex.join(['twostage', 'encode', str(folder)])}{variants}"
            run.report(f"Next: {encode}", f"Then: {shlex.join(['twostage', 'train-prior', f'codes/{folder.name}'])}")
        return run

    run_training(start, dry_run, json_file)


if __name__ == "__main__":
    run_command(command)
