"""This process among those that work on one command, and the threads that it works with."""

import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, patch_environment

from twostage.core.machine.launch import THREAD_VARIABLES, check_flags, find_launch, is_thread_count

__all__ = ["available_cores", "join_processes", "share_cores", "thread_variable", "threads_of"]


def available_cores() -> int:
    """The cores that this process may use, by its affinity."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_variable() -> str | None:
    """The variable by which the person who started this process has set the number of its threads, or None.

    Launchers set OMP_NUM_THREADS for their children by themselves: it counts where the launcher was started with it,
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
    """The threads that each of so many processes of this machine works with on a CPU: what torch has taken from the
    environment where it is set there, else the process's share of the cores."""
    return torch.get_num_threads() if thread_variable() else max(1, available_cores() // processes)


def share_cores() -> None:
    """Sets the number of this process's threads on a CPU to :func:`threads_of` this machine's processes."""
    torch.set_num_threads(threads_of(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def join_processes() -> PartialState:
    """This process's place among those that the launcher started.

    Without a GPU, Accelerate takes each of several processes for the only one, unless told that they are on the CPU.

    Raises:
        InputError: a variable of Accelerate's that is neither true nor false.
    """
    check_flags()
    share_cores()
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    # Where the variable is not set, or is no number, Accelerate sets the threads by itself, or fails.
    with patch_environment(omp_num_threads=torch.get_num_threads()):
        return PartialState(cpu=on_cpu)
