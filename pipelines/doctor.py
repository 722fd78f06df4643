"""Checks this machine: packages, devices, environment, two processes, disk, and where data and weights are looked for.

Nothing is fetched. Torch, which may be missing or broken, is imported where it is checked, never on top.
"""

import importlib
import shutil
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipelines.checks.disk_checks import check_data, check_run_folder, check_weights
from pipelines.checks.environment_checks import check_accelerate_file, check_environment
from pipelines.checks.findings import Finding
from pipelines.checks.machine_checks import check_cpu, check_gpus, check_packages
from pipelines.checks.two_processes import check_two_processes
from twostage.core.errors import InputError
from twostage.core.machine.command import run_command

__all__ = ["diagnose"]

WIDTH = 120


def diagnose(run_dir: Path, time_limit: float) -> Iterator[Finding]:
    """The findings of every check, each as soon as it is made.

    Args:
        run_dir: where runs are to be written; it need not be there yet.
        time_limit: seconds that two processes have to find each other.
    """
    yield from check_packages()
    try:
        importlib.import_module("torch")
    except Exception:  # has been told as a finding
        yield Finding("all else", "problem", "was not looked at, because torch cannot be imported", "mend torch first")
        return
    checks: list[Callable[[], Iterator[Finding]]] = [
        check_cpu,
        check_gpus,
        check_environment,
        check_accelerate_file,
        lambda: check_run_folder(run_dir),
        check_data,
        check_weights,
        lambda: check_two_processes(time_limit),
    ]
    for check in checks:
        yield from check()


def command(
    run_dir: Annotated[Path, typer.Option(help="Where runs are to be written.")] = Path("runs"),
    time_limit: Annotated[float, typer.Option(min=0.0, help="Seconds that two processes have to add numbers.")] = 60.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="A file for what was found.")] = None,
) -> None:
    """Check this machine: versions, devices, environment, processes, disk, weights. Ends with 1 where one is a
    problem."""
    if json_file and (json_file.is_dir() or not json_file.parent.is_dir()):
        raise InputError(f"--json {json_file}: expected a file in a folder that is there")
    findings = []
    for finding in diagnose(run_dir, time_limit):
        findings.append(finding)
        print(_line(finding), flush=True)
    counts = {status: sum(f.status == status for f in findings) for status in ("ok", "warning", "problem")}
    print(f"\n{counts['ok']} ok, {_number(counts['warning'], 'warning')}, {_number(counts['problem'], 'problem')}")
    if json_file:
        from twostage.core.runs.model_folder import write_json  # imports torch

        write_json(json_file, {"counts": counts, "findings": [asdict(finding) for finding in findings]})
    if counts["problem"]:
        raise typer.Exit(1)


def _line(finding: Finding) -> str:
    start = f"{finding.status:<8} {finding.topic:<14} "
    wrapper = textwrap.TextWrapper(
        min(WIDTH, shutil.get_terminal_size((WIDTH, 0)).columns),
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_long_words=False,
        break_on_hyphens=False,
    )
    lines = wrapper.wrap(finding.message)
    if finding.advice:
        wrapper.initial_indent = f"{'->':>{len(start) - 1}} "
        lines += wrapper.wrap(finding.advice)
    return "\n".join(lines)


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


if __name__ == "__main__":
    run_command(command)
