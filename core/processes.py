"""This process among those that work on one command."""

import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

__all__ = ["join_processes", "share_cores"]


def share_cores() -> None:
    """On a CPU, divides the cores among this machine's processes (launchers set one thread a process)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def join_processes() -> PartialState:
    """This process's place among those that the launcher started.

    Without a GPU, Accelerate takes each of several processes for the only one, unless told that they are on the CPU.
    """
    share_cores()
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
