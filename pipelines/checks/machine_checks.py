"""Installed packages, processor and GPUs."""

import importlib
import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from pipelines.checks.findings import Finding, ok, problem, warning
from twostage.core.machine.installation import pip_install
from twostage.core.wording import one_line

__all__ = ["check_cpu", "check_gpus", "check_packages"]

EXTRAS = {"app": "twostage app", "export": "twostage export", "imagenet": "type: imagenet / --features imagenet"}
"""The extras that users install, and the commands or options that need them."""
IMPORTED = ("torch", "torchvision", "accelerate")
"""Only an import shows that these are broken, as when torch and torchvision are builds for different versions."""
MIN_FREE = 0.2
"""Minimum free share of a GPU's memory."""


def check_packages() -> Iterator[Finding]:
    """Python and every package against the lowest versions that twostage allows."""
    try:
        python, requirements = metadata("twostage")["Requires-Python"], requires("twostage") or []
    except PackageNotFoundError:
        message = "twostage is not installed, so the versions it needs are unknown"
        yield warning("packages", message, "Run pip install -e . in the checkout.")
        return
    found = platform.python_version()
    if SpecifierSet(python).contains(found):
        yield ok("python", f"{found} ({python})")
    else:
        yield problem("python", f"{found}: twostage needs {python}", "Create an environment with a newer Python.")
    fitting = []
    for requirement in map(Requirement, requirements):
        extra = next((name for name in ("", *EXTRAS) if _is_needed(requirement, name)), None)
        if extra is None:
            continue  # belongs to an extra for developers
        finding = _check_package(requirement, extra)
        if finding:
            yield finding
        else:
            fitting.append(f"{requirement.name} {version(requirement.name)}")
    yield ok("packages", ", ".join(fitting))
    for name in IMPORTED:
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken build can raise almost anything
            message = f"{name} cannot be imported: {one_line(error)}"
            yield problem("packages", message, "Install torch and torchvision together, so that their builds match.")


def _is_needed(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _check_package(requirement: Requirement, extra: str) -> Finding | None:
    """The missing or outdated package as a finding; None if a fitting version is installed."""
    name, kind = requirement.name, warning if extra else problem
    what = f"twostage[{extra}]" if extra else "twostage"
    upgrade = f"pip install --upgrade '{name}{requirement.specifier}'"
    try:
        found = version(name)
    except PackageNotFoundError:
        only = f"; only `{EXTRAS[extra]}` needs it" if extra else ""
        return kind("packages", f"{name} is not installed{only}", pip_install(extra) if extra else upgrade)
    if requirement.specifier.contains(found, prereleases=True):
        return None
    return kind("packages", f"{name} {found}: {what} needs {requirement.specifier}", upgrade)


def check_cpu() -> Iterator[Finding]:
    """Cores, threads, limits on them, memory, and the precision that `mixed_precision: auto` chooses."""
    import psutil
    import torch

    from twostage.core.machine.precision import reason_for_precision
    from twostage.core.machine.processes import (
        available_cores,
        lack_of_cores,
        limit_of_container,
        thread_variable,
        threads_of,
    )

    cores, all_cores, limit, threads = available_cores(), os.cpu_count() or 1, limit_of_container(), threads_of(1)
    memory, variable = psutil.virtual_memory(), thread_variable()
    message = (
        f"{cores}{f' of {all_cores}' if cores < all_cores else ''} cores available; threads in one process: "
        f"{threads}, in each of two: {threads_of(2)}"
        f"{f' ({variable}={os.environ[variable]})' if variable else ''}; "
        f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB of memory free"
    )
    if limit is not None and limit < threads:
        advice = f"export {variable}={cores}" if cores < threads else "Give the container at least one whole core."
        yield warning("CPU", f"{message}; the container limits it to {limit:g} cores, so threads have to wait", advice)
    elif lack := lack_of_cores(threads):
        fewer = max(1, cores // 2)
        advice = f", or export {variable or 'OMP_NUM_THREADS'}={fewer}" if fewer < threads else ""
        yield warning("CPU", f"{message}; {lack}", f"Stop other programs{advice}.")
    else:
        yield ok("CPU", message)
    precision, reason = reason_for_precision(torch.device("cpu"))
    exception = ", but no for the backbone mlp" if precision == "bf16" else ""
    yield ok("CPU", f"train.mixed_precision=auto means {precision} here: {reason}{exception}")


def check_gpus() -> Iterator[Finding]:
    """Every GPU: its name, its free memory, and whether it computes a matrix product correctly."""
    import torch

    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        yield _no_gpu(torch.version.cuda)
        return
    for index in range(torch.accelerator.device_count()):
        yield _check_gpu(kind.type, index)


def _no_gpu(built_for: str | None) -> Finding:
    """The finding when torch has no GPU: the machine has none, or something is missing."""
    import torch

    if not (shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").is_file()):
        return ok("GPU", "none; everything runs on the CPU")
    if not built_for:
        message = f"this machine has an NVIDIA driver, but torch {torch.__version__} is built without CUDA"
        return problem("GPU", message, "Install torch's build for CUDA (https://pytorch.org/get-started/locally).")
    try:
        torch.cuda.init()
        reason = "torch finds no GPU (CUDA_VISIBLE_DEVICES hides them, or this container has none)"
    except (RuntimeError, AssertionError) as error:
        reason = one_line(error)
    advice = f"Run nvidia-smi. The driver must support CUDA {built_for}, for which this torch is built."
    return problem("GPU", f"this machine has an NVIDIA driver, but: {reason}", advice)


def _check_gpu(kind: str, index: int) -> Finding:
    import torch

    device = torch.device(kind, index)
    try:
        with torch.inference_mode():
            x = torch.ones(64, 64, device=device)
            right = bool(((x @ x) == 64).all())
        name, memory = str(device), ""
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            name = f"{device}: {torch.cuda.get_device_name(device)}"
            memory = f", {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, CUDA {torch.version.cuda}"
            if free < MIN_FREE * total:
                return warning("GPU", f"{name}{memory}", "Run nvidia-smi to see which other programs use it.")
    except RuntimeError as error:  # no kernels for this GPU in this build, no memory, a driver that is too old
        built_for = " ".join(torch.cuda.get_arch_list()) or "other devices"
        advice = f"Install a build of torch for this GPU and its driver (torch {torch.__version__} is for {built_for})."
        return problem("GPU", f"{device}: a matrix product fails: {one_line(error)}", advice)
    if not right:
        return problem("GPU", f"{name}: a matrix product is wrong", "The driver or the GPU is broken: replace it.")
    return ok("GPU", f"{name}{memory}; a matrix product is correct")
