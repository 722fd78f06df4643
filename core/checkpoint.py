"""Checkpoints that are there wholly or not at all.

`checkpoints/step_00001000/` holds safetensors and JSON, and a manifest with every file's size and hash. It is written
under another name, flushed to disk, then renamed; a folder without a matching manifest is ignored.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from core.model_folder import file_sha256
from core.sharding import share_like

__all__ = ["Checkpoints", "optimizer_tensors", "restore_optimizer"]


class Checkpoints:
    """The checkpoints of one run: ``save``, ``latest``, ``load``."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def save(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Writes one file a name of ``tensors`` and `state.json`, then removes all but the newest ``keep``."""
        final = self.folder / f"step_{step:08d}"
        partial = self.folder / f".{final.name}.partial"
        for leftover in [partial, final]:
            if leftover.exists():
                shutil.rmtree(leftover)
        partial.mkdir(parents=True)
        for name, group in tensors.items():
            save_file({k: t.detach().cpu().contiguous() for k, t in group.items()}, partial / f"{name}.safetensors")
        (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=2), encoding="utf-8")
        files = {path.name: _fingerprint(path) for path in sorted(partial.iterdir())}
        for path in partial.iterdir():
            _flush(path)
        (partial / "manifest.json").write_text(json.dumps({"format_version": 1, "files": files}, indent=2))
        _flush(partial / "manifest.json")
        _flush(partial)
        partial.rename(final)
        _flush(self.folder)
        # Later ones are damaged (or the run would have gone on from them), so they do not count among the newest.
        kept = [folder for folder in self._steps() if folder.name <= final.name][-self.keep :]
        for folder in self._steps():
            if folder not in kept:
                shutil.rmtree(folder)

    def latest(self) -> Path | None:
        """The newest complete checkpoint whose files have the sizes and hashes that its manifest says."""
        return next((folder for folder in reversed(self._steps()) if _is_whole(folder)), None)

    @staticmethod
    def load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """The tensors of each file, and the state."""
        tensors = {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
        return tensors, json.loads((folder / "state.json").read_text(encoding="utf-8"))

    def _steps(self) -> list[Path]:
        return sorted(self.folder.glob("step_*"))


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name (`decoder.weight/exp_avg`), so that no order has to match."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {f"{names[p]}/{key}": value for p, state in optimizer.state.items() for key, value in state.items()}


def restore_optimizer(model: nn.Module, optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of :func:`optimizer_tensors`."""
    parameters = dict(model.named_parameters())
    for path, value in tensors.items():
        name, _, key = path.rpartition("/")
        parameter = parameters[name]
        scalar = key == "step"  # kept where the optimizer made it: on the CPU, or beside a fused parameter
        device = optimizer_step_device(optimizer, parameter) if scalar else parameter.device
        optimizer.state[parameter][key] = value.to(device) if scalar else share_like(value.to(device), parameter)


def optimizer_step_device(optimizer: Optimizer, parameter: Tensor) -> torch.device:
    """Where the optimizer counts a parameter's steps."""
    fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return parameter.device if fused else torch.device("cpu")


def _is_whole(folder: Path) -> bool:
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        return all(_fingerprint(folder / name) == fingerprint for name, fingerprint in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
