"""The options that the launcher of this process got.

`accelerate launch` and `torchrun` set variables for their children on their own; these are not the user's choice.
"""

import functools
import os
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath

import psutil

from twostage.core.errors import InputError

__all__ = ["THREAD_VARIABLES", "Launch", "check_flags", "check_threads", "find_launch", "is_thread_count", "overruled"]

MODULES = {
    "accelerate.commands.accelerate_cli": "accelerate",
    "accelerate.commands.launch": "accelerate-launch",
    "torch.distributed.run": "torchrun",
    "torch.distributed.launch": "torchrun",
}
"""The launcher behind each module name after `python -m`."""
THREAD_VARIABLES = {
    "MKL_NUM_THREADS": r"(?!\s*0*\s*$).*",  # MKL reads a word as 1 and ignores 0
    "MKL_DOMAIN_NUM_THREADS": r".+",
    "OMP_NUM_THREADS": r"\s*\+?0*[1-9]\d*\s*(,.*\d\s*)?",  # libgomp rejects other values
}
"""The variables from which torch takes its number of threads, in order of precedence, and the values that work."""
FLAGS = tuple(
    f"ACCELERATE_{name}"
    for name in ("USE_CPU", "USE_FSDP", "USE_DEEPSPEED", "USE_MEGATRON_LM", "USE_PARALLELISM_CONFIG", "DEBUG_MODE")
)
WORDS = ("y", "yes", "t", "true", "on", "1", "n", "no", "f", "false", "off", "0")


@dataclass(frozen=True)
class Launch:
    """The launcher that started this process."""

    environment: Mapping[str, str]
    """The environment that the launcher itself was started with."""
    options: Namespace | None
    """The options of `accelerate launch` (each None if not given); None for torchrun."""


@functools.cache
def find_launch() -> Launch | None:
    """The launcher among this process's parents; None without one, or if it cannot be inspected."""
    try:
        for process in psutil.Process().parents():
            name, arguments = _command(process.cmdline())
            if name:
                return Launch(process.environ(), None if name == "torchrun" else _options(arguments))
    except psutil.Error:  # another user's process, or it has exited
        pass
    return None


def _command(words: list[str]) -> tuple[str, list[str]]:
    """The launcher that a command line starts, and its arguments; ("", []) if it starts none."""
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
    """Check Accelerate's environment variables, which it would reject with a traceback.

    Raises:
        InputError: a variable is neither true nor false.
    """
    for name in FLAGS:
        value = os.environ.get(name)
        if value is not None and value.lower() not in WORDS:
            raise InputError(
                f"environment variable {name}={value!r}: expected true or false. Set it to one, or unset it"
            )


def is_thread_count(name: str, value: str) -> bool:
    """Whether torch accepts ``value`` for one of the `THREAD_VARIABLES`."""
    return re.fullmatch(THREAD_VARIABLES[name], value, re.DOTALL) is not None


def check_threads() -> None:
    """Check the variables that set the number of threads, which OpenMP ignores and MKL misreads if they are wrong.

    Raises:
        InputError: a variable is not a number of threads.
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        value = os.environ.get(name, "")
        if value.strip() and not is_thread_count("OMP_NUM_THREADS", value):
            raise InputError(
                f"environment variable {name}={value!r}: expected a number of threads, such as 4. Set it to one, or "
                "unset it to use all cores"
            )


def overruled(mixed_precision: str, gradient_accumulation_steps: int) -> list[str]:
    """One sentence for each launch option or variable that the training's configuration overrides.

    Args:
        mixed_precision: the configuration's value.
        gradient_accumulation_steps: the configuration's value.
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
        if asked is None and variable != "no":  # launchers set "no" on their own
            asked = variable
        if asked and str(asked) != value:
            sentences.append(f"the launch option {name}={asked} is ignored: {reason} (the configuration decides)")
    return sentences
