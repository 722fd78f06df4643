"""Environment variables, and Accelerate's own file, that change what a launch does."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import yaml

from pipelines.checks.findings import Finding
from pipelines.saved.proxies import broken_proxy
from twostage.core.files import expand_home
from twostage.core.machine.launch import is_thread_count

__all__ = ["check_accelerate_file", "check_environment", "hugging_face_home"]

OF_A_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
WAITING = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
"""Of them, those that make a command wait for other processes, or keep its errors to itself."""


@dataclass(frozen=True)
class Rule:
    """A variable, the values of it that matter, what they do and what to do about them."""

    names: tuple[str, ...]
    matters: Callable[[str], bool]
    effect: str
    advice: str
    status: Literal["warning", "problem"] = "warning"


def _is_set(value: str) -> bool:
    return value != ""


def _is_true(value: str) -> bool:
    return value.lower() in ("1", "true", "yes", "on", "y", "t")


RULES = [
    Rule(
        ("CUDA_VISIBLE_DEVICES",),
        lambda value: value.strip() in ("", "-1"),
        "hides every GPU",
        "unset it, or name GPUs (0,1)",
    ),
    Rule(
        ("OMP_NUM_THREADS",),
        lambda value: not is_thread_count("OMP_NUM_THREADS", value),
        "is not a number of threads: `accelerate launch` stops at it, and other commands do not use it",
        "set a number of threads, or unset it to use all cores",
    ),
    Rule(
        ("OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"),
        lambda value: value.lower() not in ("", "false", "none", "disabled"),
        "ties threads to cores; several processes end up on the same ones",
        "unset it when more than one process works on this machine's CPU",
    ),
    Rule(
        ("ACCELERATE_USE_CPU",),
        _is_true,
        "keeps every training on the CPU, also where there are GPUs",
        "unset it to train on a GPU",
    ),
    Rule(("ACCELERATE_TORCH_DEVICE",), _is_set, "sends every training to that device", "unset it; launchers choose"),
    Rule(
        ("ACCELERATE_USE_FSDP",),
        _is_true,
        "asks every training for this, also those that are not launched",
        "unset it; give accelerate launch a --config_file",
    ),
    Rule(
        ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG"),
        _is_true,
        "asks every training for what none of them supports, so it stops",
        "unset it; for models that do not fit one GPU see configs/accelerate/fsdp_8.yaml",
        "problem",
    ),
    Rule(
        ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"),
        _is_set,
        "is not used: train.mixed_precision and train.gradient_accumulation_steps of the configuration decide",
        "set those, and unset it",
    ),
    Rule(
        ("ACCELERATE_DYNAMO_BACKEND",),
        lambda value: value.lower() not in ("", "no"),
        "is not used: nothing is compiled",
        "unset it",
    ),
    Rule(
        ("ACCELERATE_DEBUG_MODE",),
        _is_true,
        "compares shapes at every exchange between processes: slow",
        "unset it unless you look for a hang",
    ),
    Rule(
        ("TORCH_DISTRIBUTED_DEBUG",),
        lambda value: value.upper() == "DETAIL",
        "checks every exchange between processes: slow",
        "unset it unless you look for a hang",
    ),
    Rule(
        ("CUDA_LAUNCH_BLOCKING", "PYTORCH_NO_CUDA_MEMORY_CACHING"),
        lambda value: value not in ("", "0"),
        "is for debugging: GPUs become several times slower",
        "unset it",
    ),
    Rule(
        ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),
        lambda value: value != "" and ":" not in value,
        "cannot be read, so torch stops when it first uses a GPU",
        "expected option:value pairs, such as expandable_segments:True; or unset it",
        "problem",
    ),
    Rule(
        ("GLOO_SOCKET_IFNAME",),
        lambda value: not set(value.split(",")) <= psutil.net_if_addrs().keys(),
        "names a network interface that this machine does not have, so processes do not find each other",
        f"unset it, or name one of {', '.join(psutil.net_if_addrs())}",
        "problem",
    ),
    Rule(
        ("NCCL_SOCKET_IFNAME",),
        lambda value: (
            not value.startswith("^")
            and not any(there.startswith(tuple(value.lstrip("=").split(","))) for there in psutil.net_if_addrs())
        ),
        "names a network interface that this machine does not have, so GPUs do not find each other",
        f"unset it, or name one of {', '.join(psutil.net_if_addrs())}",
        "problem",
    ),
    Rule(
        ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"),
        _is_true,
        "takes data sets and models `owner/name` from the cache alone",
        "unset it to download them",
    ),
    Rule(
        ("HF_ENDPOINT",),
        _is_set,
        "asks that server instead of Hugging Face's",
        "unset it unless it is a mirror that you trust",
    ),
]


def check_environment() -> Iterator[Finding]:
    """What in the environment breaks a launch, slows it, or overrides a config."""
    found = [*_leftovers_of_a_launch(), *_known_variables(), *_proxies()]
    yield from found or [Finding("environment", "ok", "no variable that disturbs a launch")]


def _leftovers_of_a_launch() -> Iterator[Finding]:
    there = [name for name in OF_A_LAUNCH if name in os.environ]
    if not there:
        return
    shown = ", ".join(f"{name}={os.environ[name]}" for name in there)
    if any(name in WAITING for name in there):
        effect = "every command takes itself for one of several processes: it waits for the others, or says no errors"
        yield Finding("environment", "problem", f"{shown}, outside of a launch: {effect}", f"unset {' '.join(there)}")
    else:
        yield Finding("environment", "warning", f"{shown}, outside of a launch", f"unset {' '.join(there)}")


def _known_variables() -> Iterator[Finding]:
    for rule in RULES:
        for name in rule.names:
            value = os.environ.get(name)
            if value is not None and rule.matters(value):
                yield Finding("environment", rule.status, f"{name}={value!r}: {rule.effect}", rule.advice)


def _proxies() -> Iterator[Finding]:
    if trouble := broken_proxy():
        message = f"{trouble}; datasets and models `owner/name` cannot be downloaded"
        yield Finding("environment", "warning", message, "fix or unset the variable; local data and models need none")


def hugging_face_home() -> Path:
    """Where Hugging Face's libraries, Accelerate among them, keep their files."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(expand_home(os.environ.get("HF_HOME") or f"{cache}/huggingface"))


def check_accelerate_file() -> Iterator[Finding]:
    """What a bare `accelerate launch` takes from Accelerate's default file."""
    file = hugging_face_home() / "accelerate" / "default_config.yaml"
    if not file.is_file():
        yield Finding("accelerate", "ok", f"no {file}: a bare `accelerate launch` takes every GPU, or one process")
        return
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("expected keys and values")
    except (OSError, ValueError, yaml.YAMLError) as error:
        message = f"{file} cannot be read ({' '.join(str(error).split())[:100]}): `accelerate launch` stops at it"
        yield Finding("accelerate", "problem", message, "remove it, or write it anew: accelerate config")
        return
    keys = ("distributed_type", "num_processes", "num_machines", "mixed_precision", "use_cpu")
    shown = ", ".join(f"{key} {settings[key]}" for key in keys if key in settings)
    message = f"a bare `accelerate launch` takes from {file}: {shown or 'nothing'}"
    problem = _does_not_fit(settings)
    if problem:
        advice = f"give accelerate launch --num_processes or a --config_file, or remove {file}"
        yield Finding("accelerate", "problem", f"{message}; {problem}", advice)
    else:
        yield Finding("accelerate", "ok", f"{message} (precision is train.mixed_precision's, whatever stands there)")


def _does_not_fit(settings: dict[str, object]) -> str | None:
    import torch

    wanted, machines = settings.get("num_processes"), settings.get("num_machines", 1)
    gpus = torch.accelerator.device_count()
    if machines == 1 and not settings.get("use_cpu") and gpus and isinstance(wanted, int) and wanted > gpus:
        return f"this machine has {gpus} GPU{'s' * (gpus != 1)}"
    if isinstance(machines, int) and machines > 1:
        return f"it waits for {machines - 1} other machine{'s' * (machines != 2)}"
    return None
