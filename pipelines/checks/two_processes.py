"""Checks that two processes of this machine can exchange numbers, as every training in several processes does.

Run as a program, this module is one of the two processes.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pipelines.checks.findings import Finding, ok, problem

__all__ = ["check_two_processes"]

TOPIC = "two processes"
COUNT = 4 << 20  # float32 numbers: 16 MiB


def check_two_processes(time_limit: float) -> Iterator[Finding]:
    """Two processes connect as in a training and sum a tensor: with NCCL on two GPUs, otherwise with gloo on the CPU.
    After ``time_limit`` seconds they are stopped."""
    import torch

    on_gpus = torch.accelerator.device_count() >= 2
    where = "two GPUs" if on_gpus else "the CPU"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {} if on_gpus else {"ACCELERATE_USE_CPU": "true"}
    common |= {"PYTHONPATH": os.pathsep.join(sys.path)}  # so that they find the packages where this process did
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / f"{rank}.txt" for rank in range(2)]
        environments = [os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        codes = _run_both(environments, outputs, time_limit)
        lines = [file.read_text(errors="replace").strip().splitlines() or ["(no output)"] for file in outputs]
    if codes == [0, 0]:
        result = json.loads(next(line for line in lines[0] if line.startswith("{")))
        size = COUNT * 4
        message = f"summed {size >> 20} MiB with {result['backend']} on {where}"
        if result["right"]:
            yield ok(TOPIC, f"{message} at {size / 1e6 / result['seconds']:,.0f} MB/s")
        else:
            yield problem(TOPIC, f"{message}: the sum is wrong", "A driver or link is broken. Try NCCL_P2P_DISABLE=1.")
    elif None in codes and not any(codes):
        remedy = "NCCL_P2P_DISABLE=1" if on_gpus else "GLOO_SOCKET_IFNAME=lo"
        yield problem(
            TOPIC,
            f"two processes on {where} did not finish within {time_limit:g} s and were stopped",
            f"On a slow machine, increase --time-limit. For a firewall or the wrong interface, try {remedy}.",
        )
    else:
        rank = next(rank for rank, code in enumerate(codes) if code)
        message = f"process {rank} of two on {where} failed: {lines[rank][-1][:300]}"
        yield problem(TOPIC, message, "First fix the package and environment problems above.")


def _run_both(environments: list[dict[str, str]], outputs: list[Path], time_limit: float) -> list[int | None]:
    """The exit codes; None for a process that had to be stopped, at the limit or because the other one failed."""
    processes = []
    try:
        for environment, file in zip(environments, outputs, strict=True):
            with file.open("w") as output:
                command = [sys.executable, "-m", "pipelines.checks.two_processes"]
                processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
        end = time.monotonic() + time_limit
        while time.monotonic() < end:
            codes = [process.poll() for process in processes]
            if None not in codes or any(codes):
                break
            time.sleep(0.05)
        return [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _sum_numbers() -> None:
    import torch
    import torch.distributed

    from twostage.core.machine.processes import join_processes

    state = join_processes()
    numbers = torch.full((COUNT,), state.process_index + 1.0, device=state.device)
    torch.distributed.all_reduce(numbers)  # the first call connects the processes
    start = time.perf_counter()
    torch.distributed.all_reduce(numbers)
    right = bool((numbers == 6).all())  # (1 + 2) from each process
    seconds = time.perf_counter() - start
    state.destroy_process_group()
    print(json.dumps({"backend": state.backend, "seconds": seconds, "right": right}), flush=True)


if __name__ == "__main__":
    _sum_numbers()
