"""Trains a prior over the codes of a tokenizer, by a config file or by one that fits the codes and that it writes.
Decodes a few samples at each validation.

accelerate launch -m pipelines.train_prior configs/prior/gpt_cifar10.yaml codes=codes/vqvae_cifar10 [key=value ...]
accelerate launch -m pipelines.train_prior codes/my_photos_tokenizer [key=value ...]
"""

import shlex
from typing import Annotated

import typer

from pipelines.drawing.rebuilt_images import decode_codes
from pipelines.recipes.fitting_config import is_config, open_prior_config
from pipelines.saved.saved_model import tokenizer_of_codes
from stage2_prior.codes import CodeCache
from stage2_prior.sample_sheets import Decoder
from stage2_prior.train_prior import PriorTrainingConfig, train
from twostage.core.errors import InputError
from twostage.core.machine.command import print_once, run_command
from twostage.core.machine.stopping import TimeLimitOption
from twostage.core.training.base_run import BaseRun
from twostage.core.training.dry_run import DryRunOption, JsonOption, run_training
from twostage.core.training.training_run import TrainingRun

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

    def start() -> BaseRun[PriorTrainingConfig]:
        opened = open_prior_config(config, overrides or [], dry_run)
        run = train(opened, dry_run, time_limit, None if dry_run else _find_decoder(opened.codes))
        if isinstance(run, TrainingRun) and not is_config(config):
            run.report(f"Next: {shlex.join(['twostage', 'generate', str(run.folder.path)])}")
        return run

    run_training(start, dry_run, json_file)


def _find_decoder(codes: str) -> Decoder | None:
    """Decodes by the tokenizer that wrote the codes; None, with a line that says why, if it is not found.

    Raises:
        InputError: there are no such codes.
    """
    cache = CodeCache(codes)
    try:
        tokenizer = tokenizer_of_codes(cache)
    except (InputError, OSError) as error:
        print_once(f"No samples are drawn during training: {error}")
        return None
    return lambda given: decode_codes(tokenizer.to(given.device), given)


if __name__ == "__main__":
    run_command(command)
