"""Whether two processes of this machine can add their numbers: what every training of several processes does.

Run as a program it is one of the two.
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

from pipelines.checks.findings import Finding

__all__ = ["check_two_processes"]

NUMBERS = 4 << 20  # float32: 16 MiB


def check_two_processes(time_limit: float) -> Iterator[Finding]:
    """Two processes join each other as a training's do, and add a tensor: on two GPUs by NCCL, else on the CPU by gloo.

    Args:
        time_limit: seconds, after which they are stopped.
    """
    import torch

    on_gpus = torch.accelerator.device_count() >= 2
    where = "two GPUs" if on_gpus else "the CPU"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {} if on_gpus else {"ACCELERATE_USE_CPU": "true"}
    common |= {"PYTHONPATH": os.pathsep.join(sys.path)}  # as this one found the packages
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / f"{rank}.txt" for rank in range(2)]
        returned = _run_both(
            [os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)], said, time_limit
        )
        lines = [file.read_text(errors="replace").strip().splitlines() or ["nothing was said"] for file in said]
    if returned == [0, 0]:
        result = json.loads(next(line for line in lines[0] if line.startswith("{")))
        speed = NUMBERS * 4 / 1e6 / result["seconds"]
        right = "" if result["right"] else ", but the sum is WRONG"
        yield Finding(
            "two processes",
            "ok" if result["right"] else "problem",
            f"added {NUMBERS * 4 >> 20} MiB on {where} by {result['backend']} at {speed:,.0f} MB/s{right}",
            "" if result["right"] else "a driver or an interconnect is broken: try NCCL_P2P_DISABLE=1",
        )
    elif None in returned and not any(returned):
        yield Finding(
            "two processes",
            "problem",
            f"two processes on {where} had not added their numbers after {time_limit:g} s and were stopped",
            "where the machine is only slow, give a larger --time-limit; else a firewall or a wrong network interface "
            f"may be between them: try {'NCCL_P2P_DISABLE=1' if on_gpus else 'GLOO_SOCKET_IFNAME=lo'}",
        )
    else:
        rank = next(rank for rank, code in enumerate(returned) if code)
        yield Finding(
            "two processes",
            "problem",
            f"process {rank} of two on {where} failed: {lines[rank][-1][:300]}",
            "mend what the lines above say of packages and environment first",
        )


def _run_both(environments: list[dict[str, str]], said: list[Path], time_limit: float) -> list[int | None]:
    """How the processes ended; None of one that had to be stopped, because of the limit or because the other failed."""
    processes = []
    try:
        for environment, file in zip(environments, said, strict=True):
            with file.open("w") as out:
                command = [sys.executable, "-m", "pipelines.checks.two_processes"]
                processes.append(subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT))
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


def _work() -> None:
    import torch
    import torch.distributed

    from twostage.core.machine.processes import join_processes

    state = join_processes()
    numbers = torch.full((NUMBERS,), state.process_index + 1.0, device=state.device)
    torch.distributed.all_reduce(numbers)  # the first one connects
    start = time.perf_counter()
    torch.distributed.all_reduce(numbers)
    right = bool((numbers == 6).all())  # (1 + 2) of both
    seconds = time.perf_counter() - start
    state.destroy_process_group()
    print(json.dumps({"backend": state.backend, "seconds": seconds, "right": right}), flush=True)


if __name__ == "__main__":
    _work()
