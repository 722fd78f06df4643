"""Whether the packages fit, and what there is to compute on."""

import importlib
import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from pipelines.checks.findings import Finding

__all__ = ["check_cpu", "check_gpus", "check_packages"]

EXTRAS = {"app": "twostage app", "export": "twostage export"}
"""The extras of the package, and the verbs that need them."""
IMPORTED = ("torch", "torchvision", "accelerate")
"""Broken installations of these are seen only when they are imported: builds for other versions of each other."""
LITTLE_FREE = 0.2
"""Of a GPU's memory."""


def check_packages() -> Iterator[Finding]:
    """Python and every package against the lowest versions that the package's metadata allow."""
    try:
        python, requirements = metadata("twostage")["Requires-Python"], requires("twostage") or []
    except PackageNotFoundError:
        yield Finding(
            "packages",
            "warning",
            "twostage is not installed, so the versions that it needs are not known",
            "pip install -e . in the checkout",
        )
        return
    found = platform.python_version()
    if SpecifierSet(python).contains(found):
        yield Finding("python", "ok", f"{found} ({python})")
    else:
        yield Finding("python", "problem", f"{found}: twostage needs {python}", "make an environment with a newer one")
    fitting = []
    for requirement in map(Requirement, requirements):
        extra = next((name for name in EXTRAS if _wanted(requirement, name) and not _wanted(requirement, "")), None)
        if not extra and not _wanted(requirement, ""):
            continue  # of an extra for developers
        what = f"twostage[{extra}]" if extra else "twostage"
        mend = f"pip install --upgrade '{requirement.name}{requirement.specifier}'"
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            if extra:
                message = f"{requirement.name} is not installed; only `{EXTRAS[extra]}` needs it"
                yield Finding("packages", "warning", message, f"for that: pip install '{what}'")
            else:
                yield Finding("packages", "problem", f"{requirement.name} is not installed", mend)
            continue
        if requirement.specifier.contains(found, prereleases=True):
            fitting.append(f"{requirement.name} {found}")
        else:
            message = f"{requirement.name} {found}: {what} needs {requirement.specifier}"
            yield Finding("packages", "warning" if extra else "problem", message, mend)
    yield Finding("packages", "ok", ", ".join(fitting))
    for name in IMPORTED:
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken build can raise nearly anything
            yield Finding(
                "packages",
                "problem",
                f"{name} cannot be imported: {_one_line(error)}",
                "install torch and torchvision together, by one command, so that their builds fit",
            )


def _wanted(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def check_cpu() -> Iterator[Finding]:
    """Cores, threads, what limits them, memory, and what `mixed_precision: auto` means."""
    import psutil
    import torch

    from twostage.core.machine.precision import reason_for_precision
    from twostage.core.machine.processes import available_cores, thread_variable, threads_of

    cores, all_cores, quota = available_cores(), os.cpu_count() or 1, _cgroup_cores()
    memory, variable = psutil.virtual_memory(), thread_variable()
    message = (
        f"{cores} cores{f' of {all_cores}, by the affinity' if cores < all_cores else ''}: a training uses "
        f"{_threads(threads_of(1))}, two processes {threads_of(2)} each"
        f"{f' ({variable}={os.environ[variable]})' if variable else ''}; "
        f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB of memory free"
    )
    if quota is not None and quota < threads_of(1):
        yield Finding(
            "CPU",
            "warning",
            f"{message}; but the container may use the time of {quota:g} cores only, so threads wait for each other",
            f"export OMP_NUM_THREADS={max(1, round(quota))}, or start the container with --cpuset-cpus",
        )
    else:
        yield Finding("CPU", "ok", message)
    precision, reason = reason_for_precision(torch.device("cpu"))
    yield Finding("CPU", "ok", f"train.mixed_precision=auto means {precision} here: {reason}")


def _threads(number: int) -> str:
    return f"{number} thread{'s' * (number != 1)}"


def _cgroup_cores(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """The CPU time that a container may use, in cores; None where it is not limited."""
    try:
        if (root / "cpu.max").is_file():  # version 2
            quota, period = (root / "cpu.max").read_text().split()
        else:
            quota, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):  # no cgroups; "max"
        return None


def check_gpus() -> Iterator[Finding]:
    """Every GPU: its name and free memory, and whether a matrix product runs on it."""
    import torch

    if not torch.accelerator.is_available():
        yield _no_gpu(torch.version.cuda)
        return
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    for index in range(torch.accelerator.device_count()):
        yield _check_gpu(kind.type, index)


def _no_gpu(built_for: str | None) -> Finding:
    """Why torch has no GPU: there is none, or what stands between."""
    import torch

    if not (shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").is_file()):
        return Finding("GPU", "ok", "none; everything runs on the CPU")
    if not built_for:
        return Finding(
            "GPU",
            "problem",
            f"this machine has an NVIDIA driver, but torch {torch.__version__} is built without CUDA",
            "install torch's build for CUDA (https://pytorch.org/get-started/locally)",
        )
    try:
        torch.cuda.init()
        reason = "torch sees none (CUDA_VISIBLE_DEVICES, or no device given to this container)"
    except (RuntimeError, AssertionError) as error:
        reason = _one_line(error)
    advice = f"see what nvidia-smi says; the driver must support CUDA {built_for}, for which this torch is built"
    return Finding("GPU", "problem", f"this machine has an NVIDIA driver, but: {reason}", advice)


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
            if free < LITTLE_FREE * total:
                return Finding("GPU", "warning", f"{name}{memory}", "see with nvidia-smi what else runs on it")
    except RuntimeError as error:  # no kernels for this GPU in this build, no memory, a driver that is too old
        return Finding(
            "GPU",
            "problem",
            f"{device}: a matrix product does not run: {_one_line(error)}",
            f"install a build of torch for this GPU and its driver (this one: {torch.__version__}, for "
            f"{' '.join(torch.cuda.get_arch_list()) or 'other devices'})",
        )
    if not right:
        return Finding("GPU", "problem", f"{name}: a matrix product is wrong", "the driver or the GPU is broken")
    return Finding("GPU", "ok", f"{name}{memory}; a matrix product runs")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
