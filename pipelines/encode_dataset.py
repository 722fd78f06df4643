"""Encodes a dataset with a trained tokenizer.

accelerate launch -m pipelines.encode_dataset runs/TOKENIZER [--out DIR] [--data SOURCE] [--horizontal-flip] [--crops N]
    [data.KEY=VALUE ...]

All processes must run on the same machine. Several machines take a share each (--shard 1/4, --shard 2/4, ...); then the
same command without --shard puts the codes together.
"""

from typing import Annotated

import typer

from twostage.core.errors import InputError
from twostage.core.machine.command import run_command

__all__ = ["command"]


def command(
    tokenizer: Annotated[str, typer.Argument(help="runs/NAME of a trained tokenizer, or its model folder.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DATA.KEY=VALUE]...",
            help="Settings of captions, vectors and maps, such as data.on_missing_caption=skip; the tokenizer's apply "
            "to the rest.",
        ),
    ] = None,
    out: Annotated[str | None, typer.Option(help="The folder for the codes; codes/NAME by default.")] = None,
    data: Annotated[str | None, typer.Option(help="A dataset other than the one it was trained on.")] = None,
    horizontal_flip: Annotated[
        bool, typer.Option("--horizontal-flip", help="Also encode the training images mirrored.")
    ] = False,
    crops: Annotated[int, typer.Option(min=0, help="Also encode this many crops of each training image.")] = 0,
    map_tokenizer: Annotated[
        str | None, typer.Option(help="runs/NAME of a tokenizer of maps, whose codes are stored instead of the maps.")
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER/COUNT",
            help="Only encode this share, such as 2/4, on one of several machines. When all are done, run the command "
            "without it.",
        ),
    ] = None,
) -> None:
    """Encode a dataset with a trained tokenizer. Run the same command again to resume."""
    from pipelines.encoding.dataset_codes import encode_dataset
    from stage2_prior.codes import Augmentation
    from twostage.core.machine.stopping import resumable

    share = _parse_shard(shard)
    augmentation = Augmentation(horizontal_flip=horizontal_flip, crops=crops)
    with resumable():
        encode_dataset(tokenizer, out, data, augmentation, settings, share, map_tokenizer)


def _parse_shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise InputError(f"--shard {text}: expected NUMBER/COUNT with a number from 1 to the count, such as 2/4")
    return int(number), int(count)


if __name__ == "__main__":
    run_command(command)
