"""What the launcher of this process was given: `accelerate launch` and `torchrun` set variables for their children by
themselves, which must not be taken for a person's wishes."""

import functools
import os
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath

import psutil

from twostage.core.errors import InputError

__all__ = ["THREAD_VARIABLES", "Launch", "check_flags", "find_launch", "is_thread_count", "overruled"]

MODULES = {
    "accelerate.commands.accelerate_cli": "accelerate",
    "accelerate.commands.launch": "accelerate-launch",
    "torch.distributed.run": "torchrun",
    "torch.distributed.launch": "torchrun",
}
"""What may stand after `python -m`, and the command that it is."""


THREAD_VARIABLES = {
    "MKL_NUM_THREADS": r"(?!\s*0*\s*$).*",  # to MKL a word is 1, and 0 nothing
    "MKL_DOMAIN_NUM_THREADS": r".+",
    "OMP_NUM_THREADS": r"\s*\+?0*[1-9]\d*\s*(,.*\d\s*)?",  # libgomp says that it is invalid, otherwise
}
"""The variables by which torch sets the number of its threads, the stronger ones first, and the values that work."""


FLAGS = tuple(
    f"ACCELERATE_{name}"
    for name in ("USE_CPU", "USE_FSDP", "USE_DEEPSPEED", "USE_MEGATRON_LM", "USE_PARALLELISM_CONFIG", "DEBUG_MODE")
)
WORDS = ("y", "yes", "t", "true", "on", "1", "n", "no", "f", "false", "off", "0")


@dataclass(frozen=True)
class Launch:
    """The launcher that started this process."""

    environment: Mapping[str, str]
    """As the launcher itself was started with."""
    options: Namespace | None
    """Of `accelerate launch`, as its command line gives them (None where an option is not given); None of torchrun."""


@functools.cache
def find_launch() -> Launch | None:
    """The launcher among the processes that this one descends from; None without one, or where it cannot be read."""
    try:
        for process in psutil.Process().parents():
            name, arguments = _command(process.cmdline())
            if name:
                return Launch(process.environ(), None if name == "torchrun" else _options(arguments))
    except psutil.Error:  # another user's, or gone
        pass
    return None


def _command(words: list[str]) -> tuple[str, list[str]]:
    """The launcher that a command line starts, and its arguments; ("", []) where it starts none."""
    for place, word in enumerate(words):
        name = MODULES.get(word, "") if words[max(0, place - 1)] == "-m" else PurePath(word).name
        rest = words[place + 1 :]
        if name == "accelerate" and rest[:1] == ["launch"]:
            return "accelerate-launch", rest[1:]
        if name in ("accelerate-launch", "torchrun"):
            return name, rest
    return "", []


def _options(arguments: list[str]) -> Namespace:
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser().parse_args(arguments)


def check_flags() -> None:
    """Refuses a value of Accelerate's variables at which it would stop.

    Raises:
        InputError: a variable that is neither true nor false.
    """
    for name in FLAGS:
        value = os.environ.get(name)
        if value is not None and value.lower() not in WORDS:
            raise InputError(f"environment variable {name}={value!r}: expected true or false; set one, or unset it")


def is_thread_count(name: str, value: str) -> bool:
    """Whether torch takes ``value`` of one of the `THREAD_VARIABLES` for a number of threads."""
    return re.fullmatch(THREAD_VARIABLES[name], value, re.DOTALL) is not None


def overruled(mixed_precision: str, gradient_accumulation_steps: int) -> list[str]:
    """A sentence for each setting of the launch, or of its variables, that a training's configuration overrules.

    Args:
        mixed_precision: of the training.
        gradient_accumulation_steps: likewise.
    """
    used = {
        "mixed_precision": (mixed_precision, f"train.mixed_precision is {mixed_precision}"),
        "gradient_accumulation_steps": (
            str(gradient_accumulation_steps),
            f"train.gradient_accumulation_steps is {gradient_accumulation_steps}",
        ),
        "dynamo_backend": ("no", "nothing is compiled"),
    }
    launch, sentences = find_launch(), []
    for name, (value, reason) in used.items():
        asked = getattr(launch.options, name, None) if launch else None
        variable = os.environ.get(f"ACCELERATE_{name.upper()}", "").lower()
        if asked is None and variable != "no":  # which is what a launcher sets by itself
            asked = variable
        if asked and str(asked) != value:
            sentences.append(
                f"the launch asks for {name} {asked}, which is not used: {reason} (the configuration decides)"
            )
    return sentences
