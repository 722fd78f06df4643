"""Checkpoints that exist completely or not at all.

`checkpoints/step_00001000/` holds safetensors and JSON, and a manifest with the size and hash of every file. It is
written under another name, flushed to disk, then renamed. A folder without a manifest is ignored; a folder whose files
differ from its manifest is damaged.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from twostage.core.errors import InputError
from twostage.core.files import file_sha256, flush, read_json, write_error
from twostage.core.machine.sharding import share_like
from twostage.core.runs.model_folder import check_format

__all__ = ["Checkpoints", "optimizer_tensors", "restore_optimizer"]

FORMAT_VERSION = 2
"""Version 1 had no unfinished means, no facts about the data, and no number of processes."""
MANIFEST = "manifest.json"


class Checkpoints:
    """The checkpoints of one run: ``save``, ``latest``, ``load``."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def save(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Writes one file per name in ``tensors``, and `state.json`; then removes all but the newest ``keep``.

        Raises:
            InputError: it cannot be written, for example to a full disk; earlier checkpoints are kept.
        """
        final = self.folder / f"step_{step:08d}"
        partial = self.folder / f".{final.name}.partial"
        try:
            self._write(partial, step, tensors, state)
            if final.exists():  # damaged, or the run would have resumed from it
                shutil.rmtree(final)
            partial.rename(final)
            flush(self.folder)
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            if (number := write_error(error)) is None:
                raise
            kept = [folder.name for folder in self._steps() if _damage(folder) is None]
            raise InputError(
                f"{final}: the checkpoint could not be written ({os.strerror(number)}); "
                + (f"{kept[-1]}, the last good one, is kept" if kept else "there is no earlier one")
                + ". Free some space or fix the permissions, then run the same command again to resume"
            ) from None
        # Later checkpoints are damaged, so they do not count among the newest.
        kept = [folder for folder in self._steps() if folder.name <= final.name][-self.keep :]
        for folder in self.folder.glob("step_*"):
            if folder not in kept:
                shutil.rmtree(folder)

    def _write(self, partial: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        for name, group in tensors.items():
            save_file({k: t.detach().cpu().contiguous() for k, t in group.items()}, partial / f"{name}.safetensors")
        (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=2), encoding="utf-8")
        files = {path.name: _fingerprint(path) for path in sorted(partial.iterdir())}
        for path in partial.iterdir():
            flush(path)
        (partial / MANIFEST).write_text(json.dumps({"format_version": FORMAT_VERSION, "files": files}, indent=2))
        flush(partial / MANIFEST)
        flush(partial)

    def latest(self) -> tuple[Path | None, list[str]]:
        """The newest intact checkpoint, and what is wrong with newer ones.

        Raises:
            InputError: all checkpoints are damaged.
        """
        damaged = []
        for folder in reversed(self._steps()):
            damage = _damage(folder)
            if damage is None:
                return folder, damaged
            damaged.append(f"{folder}: damaged ({damage})")
        if damaged:
            raise InputError(
                f"{self.folder}: no checkpoint to resume from: {'; '.join(damaged)}. Nothing was changed. Restore a "
                "copy of one, or remove the run's folder to start over"
            )
        return None, []

    @staticmethod
    def load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """The tensors of each file, and the state.

        Raises:
            InputError: a file cannot be read, although the manifest has its hash.
        """
        remedy = "restore a copy of this checkpoint, or remove the run's folder to start over"
        tensors = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                tensors[path.stem] = load_file(path)
            except SafetensorError as error:
                raise InputError(f"{folder}: {path.name} cannot be read ({error}); {remedy}") from None
        return tensors, read_json(folder / "state.json", remedy)

    def _steps(self) -> list[Path]:
        return sorted(folder for folder in self.folder.glob("step_*") if (folder / MANIFEST).is_file())


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name (`decoder.weight/exp_avg`), independent of their order."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {f"{names[p]}/{key}": value for p, state in optimizer.state.items() for key, value in state.items()}


def restore_optimizer(model: nn.Module, optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of :func:`optimizer_tensors`."""
    parameters = dict(model.named_parameters())
    fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for path, value in tensors.items():
        name, _, key = path.rpartition("/")
        parameter = parameters[name]
        if key == "step":  # counted on the CPU, or beside the parameter by a fused optimizer
            optimizer.state[parameter][key] = value.to(parameter.device if fused else "cpu")
        else:
            value = share_like(value.to(parameter.device), parameter)
            if value.shape == parameter.shape and value.stride() != parameter.stride():  # channels last, on a GPU
                value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            optimizer.state[parameter][key] = value


def _damage(folder: Path) -> str | None:
    """Describe the damage of a checkpoint; None if it is intact.

    Raises:
        InputError: a newer version wrote it.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, files = manifest["format_version"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"{MANIFEST} cannot be read"
    check_format(version, FORMAT_VERSION, folder)
    present = {path.name for path in folder.iterdir()} - {MANIFEST}
    if missing := files.keys() - present:
        return f"{min(missing)} is missing"
    if unlisted := present - files.keys() or {"state.json"} - present:
        return f"{min(unlisted)} is not in {MANIFEST}"
    changed = [name for name, fingerprint in files.items() if _fingerprint(folder / name) != fingerprint]
    return f"{changed[0]} has changed since it was written" if changed else None


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
