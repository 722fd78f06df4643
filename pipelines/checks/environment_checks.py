"""Environment variables, and Accelerate's default file, that change how a training runs."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from pipelines.checks.findings import Finding, ok, problem, warning
from pipelines.saved.proxies import broken_proxy
from twostage.core.files import expand_home
from twostage.core.machine.launch import is_thread_count
from twostage.core.wording import one_line

__all__ = ["check_accelerate_file", "check_environment", "hugging_face_home"]

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
"""A launcher sets these. Left over in a shell, they make a command act as one of several processes."""
LAUNCH_VARIABLES = (*RANK_VARIABLES, "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Rule:
    """Environment variables, and the values that change how a training runs."""

    names: tuple[str, ...]
    matters: Callable[[str], bool]
    effect: str
    advice: str
    kind: Callable[[str, str, str], Finding] = warning


def _is_unknown_interface(value: str) -> bool:
    """Whether no network interface has a name that begins with one of ``value``'s, as NCCL reads them."""
    names = tuple(value.lstrip("=").split(","))
    return not value.startswith("^") and not any(there.startswith(names) for there in psutil.net_if_addrs())


RULES = [
    Rule(
        ("CUDA_VISIBLE_DEVICES",),
        lambda value: value.strip() in ("", "-1"),
        "hides every GPU",
        "Unset it, or list GPUs (0,1).",
    ),
    Rule(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS"),
        lambda value: bool(value.strip()) and not is_thread_count("OMP_NUM_THREADS", value),
        "is not a number of threads, so every command stops",
        "Set a number of threads, or unset it to use all cores.",
        problem,
    ),
    Rule(
        ("CUDA_LAUNCH_BLOCKING", "TORCH_DISTRIBUTED_DEBUG"),
        lambda value: value.upper() not in ("", "0", "OFF", "INFO"),
        "is for debugging and makes training slow",
        "Unset it.",
    ),
    Rule(
        ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"),
        _is_unknown_interface,
        "names a network interface that this machine does not have, so processes cannot connect",
        "Unset it, or name an interface of this machine.",
        problem,
    ),
    Rule(
        ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"),
        lambda value: value.lower() in ("1", "true", "yes", "on"),
        "restricts datasets and models `owner/name` to those already downloaded",
        "Unset it to download them.",
    ),
]


def check_environment() -> Iterator[Finding]:
    """Environment variables that break a training, slow it down, or hide devices from it."""
    found = list(_leftovers_of_a_launch())
    for rule in RULES:
        for name in rule.names:
            value = os.environ.get(name)
            if value is not None and rule.matters(value):
                found.append(rule.kind("environment", f"{name}={value!r} {rule.effect}", rule.advice))
    if trouble := broken_proxy():
        message = f"{trouble}; datasets and models `owner/name` cannot be downloaded"
        advice = "Fix or unset the variable. Local data and models need no proxy."
        found.append(warning("environment", message, advice))
    yield from found or [ok("environment", "no variable interferes with training")]


def _leftovers_of_a_launch() -> Iterator[Finding]:
    there = [name for name in LAUNCH_VARIABLES if name in os.environ]
    if not there:
        return
    shown = f"{', '.join(f'{name}={os.environ[name]}' for name in there)}, outside of a launch"
    advice = f"unset {' '.join(there)}"
    if any(name in RANK_VARIABLES for name in there):
        effect = "every command acts as one of several processes: it waits for the others or hides its errors"
        yield problem("environment", f"{shown}: {effect}", advice)
    else:
        yield warning("environment", shown, advice)


def hugging_face_home() -> Path:
    """The folder in which Hugging Face's libraries, Accelerate among them, keep their files."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(expand_home(os.environ.get("HF_HOME") or f"{cache}/huggingface"))


def check_accelerate_file() -> Iterator[Finding]:
    """The settings that `accelerate launch` without options reads from Accelerate's default file."""
    file = hugging_face_home() / "accelerate" / "default_config.yaml"
    if not file.is_file():
        yield ok("accelerate", f"no {file}, so `accelerate launch` uses every GPU, or one process")
        return
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("expected keys and values")
    except (OSError, ValueError, yaml.YAMLError) as error:
        message = f"{file} cannot be read ({one_line(error)}), so `accelerate launch` stops"
        yield problem("accelerate", message, "Remove it, or write a new one: accelerate config")
        return
    keys = ("distributed_type", "num_processes", "num_machines", "mixed_precision", "use_cpu")
    shown = ", ".join(f"{key} {settings[key]}" for key in keys if key in settings)
    message = f"`accelerate launch` without options reads {file}: {shown or 'nothing'}"
    if conflict := _conflict(settings):
        advice = f"Give accelerate launch --num_processes or --config_file, or remove {file}."
        yield problem("accelerate", f"{message}; {conflict}", advice)
    else:
        yield ok("accelerate", f"{message} (mixed_precision is ignored: train.mixed_precision decides)")


def _conflict(settings: dict[str, object]) -> str | None:
    """The contradictions between the settings of a launch and this machine."""
    import torch

    wanted, machines = settings.get("num_processes"), settings.get("num_machines", 1)
    gpus = torch.accelerator.device_count()
    if machines == 1 and not settings.get("use_cpu") and gpus and isinstance(wanted, int) and wanted > gpus:
        return f"this machine has {gpus} GPU{'s' * (gpus != 1)}"
    if isinstance(machines, int) and machines > 1:
        return f"it waits for {machines - 1} other machine{'s' * (machines != 2)}"
    return None
