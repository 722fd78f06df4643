"""The processes that work on one command, and how many threads each of them uses."""

import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, patch_environment

from twostage.core.machine.launch import THREAD_VARIABLES, check_flags, find_launch, is_thread_count

__all__ = ["available_cores", "join_processes", "share_cores", "thread_variable", "threads_of"]


def available_cores() -> int:
    """The number of cores that this process may use, by its affinity."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    """Set this process's CPU threads to :func:`threads_of` the command's processes on this machine."""
    torch.set_num_threads(threads_of(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def join_processes() -> PartialState:
    """Connect to the other processes that the launcher started.

    Without a GPU, Accelerate needs `cpu=True`; otherwise each process believes that it is the only one.

    Raises:
        InputError: one of Accelerate's variables is neither true nor false.
    """
    check_flags()
    share_cores()
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    # Without a number in this variable, Accelerate sets the threads itself, or fails.
    with patch_environment(omp_num_threads=torch.get_num_threads()):
        return PartialState(cpu=on_cpu)
