"""Checks this machine: packages, devices, environment, disk, data, weights, and two processes working together.

twostage doctor [--run-dir DIR] [--time-limit SECONDS] [--json FILE]

Nothing is downloaded. torch may be missing or broken, so modules are imported where they are checked, not at the top.
"""

import shutil
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipelines.checks.all_checks import run_checks
from pipelines.checks.findings import Finding
from twostage.core.errors import InputError
from twostage.core.files import write_json
from twostage.core.machine.command import run_command

__all__ = ["command"]

WIDTH = 120


def command(
    run_dir: Annotated[Path, typer.Option(help="The folder for runs.")] = Path("runs"),
    time_limit: Annotated[float, typer.Option(min=0.0, help="Seconds within which two processes must connect.")] = 60.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the findings to this file.")] = None,
) -> None:
    """Check this machine: versions, devices, processes, disk, weights. Exits with 1 if it finds a problem."""
    if json_file and (json_file.is_dir() or not json_file.parent.is_dir()):
        raise InputError(f"--json {json_file}: expected a file in an existing folder.")
    findings = []
    for finding in run_checks(run_dir, time_limit):
        findings.append(finding)
        print(_line(finding), flush=True)
    counts = {status: sum(f.status == status for f in findings) for status in ("ok", "warning", "problem")}
    print(f"\n{counts['ok']} ok, {_number(counts['warning'], 'warning')}, {_number(counts['problem'], 'problem')}")
    if json_file:
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
