"""The processes that work on one command, and how many threads each of them uses."""

import os
from pathlib import Path

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, patch_environment

from twostage.core.machine.launch import THREAD_VARIABLES, check_flags, check_threads, find_launch, is_thread_count

__all__ = [
    "available_cores",
    "choose_threads",
    "join_processes",
    "lack_of_cores",
    "limit_of_container",
    "share_cores",
    "thread_variable",
    "threads_of",
]

MULTIPLICATIONS_PER_THREAD = 1 << 27
"""Multiplications of a fully connected network's forward pass that occupy one thread (measured in docs/scaling.md)."""


def available_cores() -> int:
    """The number of cores that this process may use, by its affinity and by the limit of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, int(limit_of_container() or cores)))


def limit_of_container(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """The CPU time that a container may use, in cores; None if it is not limited."""
    try:
        if (root / "cpu.max").is_file():  # version 2
            quota, period = (root / "cpu.max").read_text().split()
        else:
            quota, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):  # no cgroups; "max"
        return None


def thread_variable() -> str | None:
    """The variable by which the user set the number of threads, or None.

    Launchers set OMP_NUM_THREADS for their children on their own: it only counts if the launcher was started with it,
    or with --num_cpu_threads_per_process.
    """
    launch = find_launch()
    for name in THREAD_VARIABLES:
        if not is_thread_count(name, os.environ.get(name, "")):
            continue
        if name != "OMP_NUM_THREADS" or launch is None or name in launch.environment:
            return name
        if launch.options is not None and launch.options.num_cpu_threads_per_process is not None:
            return name
    return None


def threads_of(processes: int) -> int:
    """The CPU threads for each of ``processes`` on this machine: torch's number if the user set it in the environment,
    else an equal share of the cores."""
    return torch.get_num_threads() if thread_variable() else max(1, available_cores() // processes)


def share_cores() -> None:
    """Set this process's CPU threads to :func:`threads_of` the command's processes on this machine.

    Raises:
        InputError: an environment variable is not a number of threads.
    """
    check_threads()
    torch.set_num_threads(threads_of(_local_processes()))


def choose_threads(multiplications: int | None) -> str:
    """Set this process's CPU threads for training a network; the same at every start on this machine.

    A small fully connected network gets fewer than its share of the cores: its threads would mostly wait for each
    other, and be far slower if other programs use the cores. A number that the user set always counts.

    Args:
        multiplications: of a forward pass in this process, if the network is fully connected; else None.

    Returns:
        How many threads, and why.
    """
    processes, variable = _local_processes(), thread_variable()
    threads, reason = threads_of(processes), f"cores available: {available_cores()}"
    if processes > 1:
        reason += f", shared by {processes} processes"
    if variable:
        reason = f"{variable}={os.environ[variable]}"
    elif multiplications is not None and (useful := max(1, multiplications // MULTIPLICATIONS_PER_THREAD)) < threads:
        threads, reason = useful, "so small a network does not need more"
    torch.set_num_threads(threads)
    return f"CPU threads: {threads} ({reason})"


def lack_of_cores(threads: int) -> str | None:
    """A sentence if this command's processes and other programs want more cores than there are, else None.

    Call it before the command computes: it measures for a fifth of a second.

    Args:
        threads: of each process.
    """
    processes, cores = _local_processes(), available_cores()
    threads *= processes
    others = 0.0 if processes > 1 else busy_cores()
    if threads + others <= cores + 0.5:
        return None
    used = f"{threads} thread{'s' * (threads != 1)} of this command"
    if others >= 0.5:
        used += f" and other programs, which use {others:.1f} cores,"
    return f"{used} share {cores} core{'s' * (cores != 1)}: a step takes longer than on a quiet machine"


def busy_cores() -> float:
    """The cores, of those that this process may use, that are computing now."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    shares = psutil.cpu_percent(interval=0.2, percpu=True)
    return sum(share for core, share in enumerate(shares) if core in allowed) / 100


def _local_processes() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def join_processes() -> PartialState:
    """Connect to the other processes that the launcher started.

    Without a GPU, Accelerate needs `cpu=True`; otherwise each process believes that it is the only one.

    Raises:
        InputError: one of Accelerate's variables is neither true nor false, or one that sets the number of threads is
            wrong.
    """
    check_flags()
    share_cores()
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    # Without a number in this variable, Accelerate sets the threads itself, or fails.
    with patch_environment(omp_num_threads=torch.get_num_threads()):
        return PartialState(cpu=on_cpu)
