"""A trained model on disk: `config.json` + `model.safetensors`. Nothing executable is ever loaded."""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from twostage.core.errors import InputError
from twostage.core.files import read_json, replacing

__all__ = [
    "FORMAT_VERSION",
    "check_format",
    "file_sha256",
    "fill",
    "filled",
    "find_model_folder",
    "hash_tensors",
    "load_model_folder",
    "load_saved_tensors",
    "save_model_folder",
    "write_json",
]

FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def check_format(version: Any, known: int, where: str | Path) -> None:
    """Refuses what a newer version of twostage has written.

    Raises:
        InputError: ``version`` is no number from 1 to ``known``.
    """
    if type(version) is not int or not 1 <= version <= known:
        raise InputError(
            f"{where}: written in format {version}, this version of twostage reads up to {known}; update twostage"
        )


def write_json(path: Path, content: Any) -> None:
    """Writes JSON so that a reader finds the old file or the new one, never half of one."""
    with replacing(path, durable=True) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_tensors(labelled: Iterable[tuple[str, Tensor]], start: str = "") -> str:
    """The sha256 of the text ``start``, then of each label and its tensor's bytes, in this order; in hexadecimal."""
    digest = hashlib.sha256(start.encode())
    for label, tensor in labelled:
        digest.update(label.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_model_folder(folder: Path, kind: str, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Writes ``folder``; ``kind`` is what it holds (`tokenizer`, `prior`), so that one is not taken for the other."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS, durable=True) as partial:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, partial)
        write_json(folder / "config.json", {"format_version": FORMAT_VERSION, "kind": kind, **config})


def find_model_folder(path: str | Path) -> Path:
    """``path`` itself where it is a model folder, or its `model/` where it is a run folder."""
    path = Path(path)
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            return folder
    if not path.exists():
        raise InputError(f"{path}: no such folder; expected a run folder (runs/NAME) or a model folder")
    why = " (its training has not reached a first checkpoint)" if (path / "config.yaml").is_file() else ""
    raise InputError(f"{path}: no trained model there{why}; expected {path / 'model' / 'config.json'}")


def load_model_folder(path: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the weights of a model folder, or of a run folder's `model/`."""
    folder = find_model_folder(path)
    config = read_json(folder / "config.json", "copy the model again")
    check_format(config.pop("format_version", None), FORMAT_VERSION, folder)
    found = config.pop("kind", None)
    if found != kind:
        raise InputError(f"{folder}: holds a {found}, expected a {kind}")
    try:
        return config, load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise InputError(f"{folder}: incomplete model folder: {WEIGHTS} is missing") from None
    except (ValueError, OSError, SafetensorError) as error:
        raise InputError(f"{folder}: damaged model folder: {WEIGHTS} cannot be read ({error})") from None


def load_saved_tensors(path: Path) -> Any:
    """What `torch.save` has written, where it is made of tensors and plain containers alone; on the CPU.

    Raises:
        UnpicklingError, RuntimeError, EOFError, ValueError: it is something else, which is not run.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch wonders about files that are none of its own
        return torch.load(path, map_location="cpu", weights_only=True)


def filled(build: Callable[[], ModuleT], state: dict[str, Tensor], where: str | Path) -> ModuleT:
    """What ``build`` returns, with the weights ``state``, in evaluation mode. It is made only if they fit it: a
    config.json cannot ask for more memory than its weights take.

    Raises:
        InputError: other names or shapes.
    """
    try:
        with torch.device("meta"):
            skeleton = build().state_dict()
    except (RuntimeError, OverflowError, TypeError) as error:
        raise InputError(f"{where}: config.json describes no model ({' '.join(str(error).split())[:200]})") from None
    wrong = [name for name in skeleton.keys() | state.keys()
             if name not in skeleton or name not in state or skeleton[name].shape != state[name].shape]  # fmt: skip
    if wrong:
        shown = ", ".join(sorted(wrong)[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise InputError(f"{where}: the weights do not fit config.json: {shown}; copy the model again")
    model = build()
    fill(model, state, where)
    return model.eval()


def fill(module: nn.Module, state: dict[str, Tensor], where: str | Path) -> None:
    """Loads ``state`` into ``module``; names and shapes must be the same."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{where}: the weights do not fit config.json: {' '.join(str(error).split())}") from None
