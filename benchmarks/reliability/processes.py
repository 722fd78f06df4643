"""Run real commands in one or two processes of their own, and kill them."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

__all__ = ["Command", "run"]

ROOT = Path(__file__).parents[2]
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no",
          "--dynamo_backend", "no"]  # fmt: skip
TIME_LIMIT = 180.0


class Command:
    """A running command and all the processes that belong to it.

    Args:
        words: the arguments after `python` (one process) or after `accelerate launch`.
        processes: the number of working processes; several are started by the launcher.
        folder: the working directory; output goes to its `said.txt`.
    """

    def __init__(
        self, words: Sequence[object], folder: Path, processes: int = 1, environment: dict[str, str] | None = None
    ) -> None:
        self.said_file = folder / "said.txt"
        launcher: list[str] = []
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            launcher = [*LAUNCH, "--num_processes", str(processes), "--main_process_port", str(port)]
        # One thread per process, so that sums do not depend on how many cores are free.
        settings = {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        settings |= {"LOCAL_WORLD_SIZE": "1000"} if processes == 1 else {}
        with self.said_file.open("a", encoding="utf-8") as said:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, *map(str, words)],
                cwd=folder,
                env=os.environ | settings | (environment or {}),
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        self.num_processes = processes

    @property
    def said(self) -> str:
        """All output in this folder so far."""
        return self.said_file.read_text(encoding="utf-8", errors="replace")

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def wait(self, seconds: float = TIME_LIMIT) -> int:
        """The exit status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {seconds:.0f} s:\n{self.said[-3000:]}") from None

    def wait_until(self, condition: Callable[[], bool], seconds: float = TIME_LIMIT) -> bool:
        """Wait for ``condition()``; returns False if the command ended first."""
        deadline = time.monotonic() + seconds
        while not condition():
            if not self.running:
                return False
            assert time.monotonic() < deadline, f"never got that far:\n{self.said[-3000:]}"
            time.sleep(0.001)
        return True

    def workers(self) -> list[psutil.Process]:
        """The processes that do the work, without the launcher."""
        if self.num_processes == 1:
            return [psutil.Process(self.process.pid)]
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if "RANK" in child.environ()]

    def kill(self) -> None:
        """Send SIGKILL to all its processes at once."""
        try:
            everything = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            everything = []
        for process in everything:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()
        psutil.wait_procs(everything, 30)


def run(words: Sequence[object], folder: Path, processes: int = 1, environment: dict[str, str] | None = None) -> str:
    """The output of a command that has to succeed."""
    command = Command(words, folder, processes, environment)
    status = command.wait()
    assert status == 0, command.said[-4000:]
    return command.said
