"""Trains a feature network on labelled images.

accelerate launch -m stage1_tokenizer.train_features cifar10 [--out runs/features_cifar10]
"""

from pathlib import Path
from typing import Annotated

import typer

from twostage.core.machine.command import run_command
from twostage.core.options import DryRunOption, JsonOption, LabelColumnOption, TimeLimitOption, ValueRangeOption
from twostage.core.training.training_command import run_training

__all__ = ["command"]


def command(
    data: Annotated[
        str,
        typer.Argument(help="Labelled images: shapes, a folder, a parquet file, $TWOSTAGE_DATA/NAME, or owner/name."),
    ],
    out: Annotated[Path | None, typer.Option(help="The run folder; runs/features_NAME by default.")] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Size in pixels; by default the commonest size.")
    ] = None,
    channels: Annotated[int | None, typer.Option(help="1 (grey), 3 or 4; by default as in the images.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per update.")] = 64,
    horizontal_flip: Annotated[bool, typer.Option("--horizontal-flip", help="Mirror half of the images.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all random numbers.")] = 0,
    width: Annotated[
        int, typer.Option(min=1, help="Channels at full resolution; doubled at each of the two lower resolutions.")
    ] = 32,
    label_column: LabelColumnOption = "auto",
    value_range: ValueRangeOption = None,
    dry_run: DryRunOption = False,
    time_limit: TimeLimitOption = None,
    json_file: JsonOption = None,
) -> None:
    """Train a feature network for perceptual losses, Frechet distances and class accuracy.

    Run the same command again to resume."""
    from stage1_tokenizer.features.feature_training import features_config, train

    out = out or Path("runs") / f"features_{Path(data).resolve().stem}"
    config = features_config(
        data, out, image_size, channels, epochs, batch_size, horizontal_flip, seed, width, label_column, value_range
    )
    run_training(lambda: train(config, dry_run, time_limit), dry_run, json_file)


if __name__ == "__main__":
    run_command(command)
