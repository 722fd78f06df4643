"""The disk for runs, and the folders that hold data and weights."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from pipelines.checks.environment_checks import hugging_face_home
from pipelines.checks.findings import Finding, ok, problem, warning
from twostage.core.files import expand_home, flush
from twostage.core.wording import some_of

__all__ = ["check_data", "check_run_folder", "check_weight_files"]

TEST_FILE = 64  # MB written to measure the speed
MIN_SPEED = 20.0  # MB a second: a checkpoint of 500 MB takes half a minute
MIN_FREE = 5.0  # GB
NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "afs"}
IN_MEMORY = {"tmpfs", "ramfs"}
INCEPTION = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")


def check_run_folder(run_dir: Path) -> Iterator[Finding]:
    """Free space, speed and reliability of the folder for runs, or of the folder in which it would be created.

    Writes a file of 64 MB there and removes it.
    """
    elsewhere = "Choose another folder (run.dir=)."
    try:
        there = run_dir.absolute()
        while not there.exists():
            there = there.parent
    except OSError as error:
        yield problem("run folder", f"{run_dir}: {error.strerror}", elsewhere)
        return
    if not there.is_dir():
        yield problem("run folder", f"{run_dir}: {there} is a file", elsewhere)
        return
    where = f"{run_dir}" if there == run_dir.absolute() else f"{run_dir} (does not exist; will be created in {there})"
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=".twostage-doctor-") as scratch:
            speed, unsafe = _write_speed(Path(scratch)), _rename_failure(Path(scratch))
    except OSError as error:
        message = f"{where} is not writable: {error.strerror or error}"
        yield problem("run folder", message, "Choose another folder (run.dir=), or change its owner or permissions.")
        return
    free, kind = shutil.disk_usage(there).free / 1e9, _file_system(there)
    message = f"{where}: {free:,.1f} GB free, writes {speed:,.0f} MB/s with fsync, file system {kind}"
    doubts = [
        ("little space", "Free some space: a run keeps two checkpoints (train.keep_checkpoints).", free < MIN_FREE),
        ("slow", "Choose a faster disk, or increase train.checkpoint_every.", speed < MIN_SPEED),
        ("in memory, so it is lost when the machine stops", "Choose a folder on a disk.", kind in IN_MEMORY),
        (
            "on a network, so an interruption stops the training",
            "Use a local folder and copy it afterwards.",
            kind in NETWORK or kind.startswith("fuse."),
        ),
    ]
    found = [(doubt, advice) for doubt, advice, applies in doubts if applies]
    if unsafe:
        message = f"{where}: {unsafe}, which checkpoints rely on"
        yield problem("run folder", message, "Choose a folder on a local disk.")
    elif found:
        shown, advice = "; ".join(doubt for doubt, _ in found), " ".join(advice for _, advice in found)
        yield warning("run folder", f"{message}; {shown}", advice)
    else:
        yield ok("run folder", f"{message}, renames are atomic")


def _write_speed(folder: Path) -> float:
    """MB a second."""
    block = os.urandom(1 << 20)
    start = time.perf_counter()
    with (folder / "speed").open("wb") as file:
        for _ in range(TEST_FILE):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return TEST_FILE * len(block) / 1e6 / (time.perf_counter() - start)


def _rename_failure(folder: Path) -> str | None:
    """The first failure of renaming a file over another, renaming a folder and flushing a folder; None if all work."""
    new, old = folder / "new", folder / "old"
    new.write_text("new")
    old.write_text("old")
    (folder / "partial").mkdir()
    try:
        new.replace(old)
        (folder / "partial").rename(folder / "complete")
    except OSError as error:
        return f"a file or folder cannot be renamed ({error.strerror or error})"
    if old.read_text() != "new" or new.exists():
        return "renaming a file over another does not replace it"
    try:
        flush(folder)
    except OSError as error:
        return f"a folder cannot be flushed to disk ({error.strerror or error})"
    return None


def _file_system(folder: Path) -> str:
    """The type of the file system, such as `ext4`, or `unknown`."""
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    real = folder.resolve()
    return next((mounts[path] for path in [real, *real.parents] if mounts.get(path)), "unknown")


def check_data() -> Iterator[Finding]:
    """The folder of datasets, and Hugging Face's cache."""
    root = os.environ.get("TWOSTAGE_DATA")
    if not root:
        message = "$TWOSTAGE_DATA is not set: data.source can only be a path, owner/name or shapes"
        yield warning("data", message, "Set it if you have a folder of datasets (mnist/train.parquet ...).")
    elif not os.access(root, os.R_OK | os.X_OK):
        yield problem("data", f"$TWOSTAGE_DATA {root}: no such folder, or not readable", "Correct it, or unset it.")
    else:
        sets = sorted(path.name for path in Path(root).iterdir() if path.is_dir() and not path.name.startswith("."))
        yield ok("data", f"$TWOSTAGE_DATA {root}: {', '.join(sets) or 'empty'}")
    cache = Path(expand_home(os.environ.get("HF_HUB_CACHE") or str(hugging_face_home() / "hub")))
    kept = (path.name.replace("--", " ", 1).replace("--", "/") for path in sorted(cache.glob("*--*--*")))
    yield ok("data", f"Hugging Face cache {cache}: {some_of(kept) or 'empty'}")


def check_weight_files() -> Iterator[Finding]:
    """The pretrained weights that losses and distances use."""
    import torch

    from stage1_tokenizer.losses.perceptual import TRUNK, find_trunk

    trunk, folders = find_trunk(None)
    if trunk:
        yield ok("weights", f"LPIPS: {trunk} ({trunk.stat().st_size / 1e6:,.0f} MB)")
    else:
        yield warning(
            "weights",
            f"LPIPS: {TRUNK} is not in {', '.join(map(str, folders))}; loss.perceptual of type lpips downloads 528 MB",
            "Without a network, put it there, give --weights-dir, or use loss.perceptual of type imagenet or features.",
        )
    checkpoints = Path(torch.hub.get_dir()) / "checkpoints"
    inception = next((checkpoints / name for name in INCEPTION if (checkpoints / name).is_file()), None)
    if inception:
        yield ok("weights", f"Inception: {inception}; use it with evaluate --inception {inception}")
    else:
        yield warning(
            "weights",
            f"Inception: none in {checkpoints}; only Frechet distances comparable to published ones need it",
            f"Give evaluate --inception FILE ({INCEPTION[0]} of torch-fidelity), or --features imagenet.",
        )
