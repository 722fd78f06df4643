"""The disk that runs are written to, and where data and weights are looked for."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from pipelines.checks.environment_checks import hugging_face_home
from pipelines.checks.findings import Finding
from twostage.core.files import expand_home

__all__ = ["check_data", "check_run_folder", "check_weights"]

MEGABYTES = 64  # written to measure the speed
SLOW = 20.0  # MB a second: a checkpoint of 500 MB takes half a minute
LITTLE = 5.0  # GB
NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "afs"}
IN_MEMORY = {"tmpfs", "ramfs"}
INCEPTION = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")


def check_run_folder(run_dir: Path) -> Iterator[Finding]:
    """Free space, speed and reliability of the folder that runs are written to, or of where it would be made.

    A file of 64 MB is written there and removed again.
    """
    try:
        there = run_dir.absolute()
        while not there.exists():
            there = there.parent
    except OSError as error:
        yield Finding("run folder", "problem", f"{run_dir}: {error.strerror}", "choose another folder (run.dir=)")
        return
    made = "" if there == run_dir.absolute() else f" (not there yet; it would be made in {there})"
    if not there.is_dir():
        yield Finding("run folder", "problem", f"{run_dir}: {there} is a file", "choose another folder")
        return
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=".twostage-doctor-") as scratch:
            speed, renames = _write_speed(Path(scratch)), _rename_trouble(Path(scratch))
    except OSError as error:
        yield Finding(
            "run folder",
            "problem",
            f"{run_dir}{made}: cannot be written to ({error.strerror or error})",
            "choose another folder (run.dir=), or change its owner or rights",
        )
        return
    free, kind = shutil.disk_usage(there).free / 1e9, _file_system(there)
    message = f"{run_dir}{made}: {free:,.1f} GB free, written at {speed:,.0f} MB/s with fsync, file system {kind}"
    troubles = []
    if renames:
        yield Finding(
            "run folder",
            "problem",
            f"{run_dir}: {renames}; checkpoints rely on it",
            "choose a folder on a local disk",
        )
    if free < LITTLE:
        troubles.append(("little space", "free some: a run keeps two checkpoints (train.keep_checkpoints)"))
    if speed < SLOW:
        troubles.append(("slow", "choose a faster disk, or a larger train.checkpoint_every"))
    if kind in IN_MEMORY:
        troubles.append(("in memory: it is lost when the machine stops", "choose a folder on a disk"))
    if kind in NETWORK or kind.startswith("fuse."):
        troubles.append(("over a network: a break stops the training", "have a local folder, and copy it"))
    if troubles:
        words, advice = ("; ".join(parts) for parts in zip(*troubles, strict=True))
        yield Finding("run folder", "warning", f"{message}; {words}", advice)
    elif not renames:
        yield Finding("run folder", "ok", f"{message}, renames are atomic")


def _write_speed(folder: Path) -> float:
    """MB a second."""
    block = os.urandom(1 << 20)
    start = time.perf_counter()
    with (folder / "speed").open("wb") as file:
        for _ in range(MEGABYTES):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return MEGABYTES * len(block) / 1e6 / (time.perf_counter() - start)


def _rename_trouble(folder: Path) -> str | None:
    """What of writing under another name, flushing, and renaming over the old one does not work here."""
    new, old = folder / "new", folder / "old"
    new.write_text("new")
    old.write_text("old")
    (folder / "partial").mkdir()
    try:
        new.replace(old)
        (folder / "partial").rename(folder / "whole")
    except OSError as error:
        return f"a file or a folder cannot be renamed ({error.strerror or error})"
    if old.read_text() != "new" or new.exists():
        return "renaming a file over another leaves the old one"
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        return f"a folder cannot be flushed to disk ({error.strerror or error})"
    return None


def _file_system(folder: Path) -> str:
    """Its type, such as `ext4`; `unknown` where the system does not tell."""
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    real = folder.resolve()
    return next((mounts[path] for path in [real, *real.parents] if mounts.get(path)), "unknown")


def check_data() -> Iterator[Finding]:
    """The folder of data sets, and Hugging Face's cache."""
    root = os.environ.get("TWOSTAGE_DATA")
    if root and not os.access(root, os.R_OK | os.X_OK):
        yield Finding("data", "problem", f"$TWOSTAGE_DATA {root}: no such folder to be read", "correct it, or unset it")
    elif not root:
        yield Finding(
            "data",
            "warning",
            "$TWOSTAGE_DATA is not set: only paths, owner/name and `shapes` are found as data.source",
            "set it to a folder that holds data sets by name (mnist/train.parquet ...), if you have one",
        )
    else:
        sets = sorted(path.name for path in Path(root).iterdir() if path.is_dir() and not path.name.startswith("."))
        yield Finding("data", "ok", f"$TWOSTAGE_DATA {root}: {', '.join(sets) or 'empty'}")
    cache = Path(expand_home(os.environ.get("HF_HUB_CACHE") or str(hugging_face_home() / "hub")))
    kept = sorted(path.name for path in cache.glob("*--*--*"))
    shown = ", ".join(name.replace("--", " ", 1).replace("--", "/") for name in kept[:5])
    more = f" and {len(kept) - 5} more" if len(kept) > 5 else ""
    yield Finding("data", "ok", f"Hugging Face cache {cache}: {shown + more or 'empty'}")


def check_weights() -> Iterator[Finding]:
    """The weights of other networks, which losses and distances use."""
    import torch

    from stage1_tokenizer.perceptual import TRUNK, find_trunk

    trunk, folders = find_trunk(None)
    if trunk:
        yield Finding("weights", "ok", f"LPIPS: {trunk} ({trunk.stat().st_size / 1e6:,.0f} MB)")
    else:
        yield Finding(
            "weights",
            "warning",
            f"LPIPS: {TRUNK} is not in {', '.join(map(str, folders))}; loss.perceptual lpips downloads it (528 MB)",
            "without a network, put it there or give --weights-dir; or use a feature network (twostage train-features)",
        )
    checkpoints = Path(torch.hub.get_dir()) / "checkpoints"
    inception = next((checkpoints / name for name in INCEPTION if (checkpoints / name).is_file()), None)
    if inception:
        yield Finding("weights", "ok", f"Inception: {inception}; give evaluate --inception {inception}")
    else:
        yield Finding(
            "weights",
            "warning",
            f"Inception: none in {checkpoints}; published Frechet distances need it, nothing else does",
            f"give evaluate --inception FILE ({INCEPTION[0]} of torch-fidelity), or --features runs/NAME",
        )
