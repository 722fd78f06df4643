"""All checks of `twostage doctor`, one after another."""

import importlib
from collections.abc import Iterator
from pathlib import Path

from pipelines.checks.disk_checks import check_data, check_run_folder, check_weight_files
from pipelines.checks.environment_checks import check_accelerate_file, check_environment
from pipelines.checks.findings import Finding, problem
from pipelines.checks.machine_checks import check_cpu, check_gpus, check_packages
from pipelines.checks.two_processes import check_two_processes

__all__ = ["run_checks"]


def run_checks(run_dir: Path, time_limit: float) -> Iterator[Finding]:
    """The findings of every check, each as soon as it is made. ``run_dir`` need not exist yet; two processes must
    connect within ``time_limit`` seconds."""
    yield from check_packages()
    try:
        importlib.import_module("torch")
    except Exception:  # check_packages reports it
        yield problem("other checks", "skipped: torch cannot be imported", "Fix torch first.")
        return
    yield from check_cpu()
    yield from check_gpus()
    yield from check_environment()
    yield from check_accelerate_file()
    yield from check_run_folder(run_dir)
    yield from check_data()
    yield from check_weight_files()
    yield from check_two_processes(time_limit)
