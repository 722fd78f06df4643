"""A trained model on disk: `config.json` + `model.safetensors`. Nothing executable is ever loaded."""

import hashlib
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from twostage.core.config.registry import check_plugins
from twostage.core.errors import InputError
from twostage.core.files import read_json, replacing, write_json
from twostage.core.machine.unallocated import unallocated
from twostage.core.wording import one_line, some_of

__all__ = [
    "FORMAT_VERSION",
    "check_format",
    "check_rebuilds",
    "fill",
    "filled",
    "find_model_folder",
    "hash_tensors",
    "load_model_folder",
    "load_saved_tensors",
    "save_model_folder",
]

FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def check_format(version: Any, known: int, where: str | Path) -> None:
    """Check that this version of twostage can read a file or folder.

    Raises:
        InputError: ``version`` is not a number from 1 to ``known``.
    """
    if type(version) is not int or not 1 <= version <= known:
        raise InputError(
            f"{where}: written in format {version}, but this version of twostage reads at most {known}. Update twostage"
        )


def hash_tensors(labelled: Iterable[tuple[str, Tensor]], start: str = "") -> str:
    """The sha256 of the text ``start`` and, in order, each label and its tensor's bytes, as hexadecimal text."""
    digest = hashlib.sha256(start.encode())
    for label, tensor in labelled:
        digest.update(label.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_model_folder(
    folder: Path, kind: str, config: dict[str, Any], state: dict[str, Tensor], plugins: list[str] | None = None
) -> None:
    """Write a model folder.

    Args:
        kind: `tokenizer` or `prior`; prevents loading it as another kind of model.
        plugins: the modules that loading needs; stored only if there are any.
    """
    config = config | ({"plugins": plugins} if plugins else {})
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS, durable=True) as partial:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, partial)
        write_json(folder / "config.json", {"format_version": FORMAT_VERSION, "kind": kind, **config})


def find_model_folder(path: str | Path) -> Path:
    """``path`` itself if it is a model folder, or its `model/` if it is a run folder.

    Raises:
        InputError: there is no trained model.
    """
    path = Path(path)
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            return folder
    if not path.exists():
        raise InputError(f"{path}: no such folder; expected a run folder (runs/NAME) or a model folder")
    why = " (training has not reached its first checkpoint)" if (path / "config.yaml").is_file() else ""
    raise InputError(f"{path}: no trained model{why}; expected {path / 'model' / 'config.json'}")


def load_model_folder(path: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the weights of a model folder, or of a run folder's `model/`.

    Raises:
        InputError: there is no model of this ``kind``, it is incomplete or damaged, or needs a plugin.
    """
    folder = find_model_folder(path)
    config = read_json(folder / "config.json", "copy the model again")
    check_format(config.pop("format_version", None), FORMAT_VERSION, folder)
    found = config.pop("kind", None)
    if found != kind:
        raise InputError(f"{folder}: is a {found}, expected a {kind}")
    plugins = config.pop("plugins", [])
    if not isinstance(plugins, list) or not all(isinstance(name, str) for name in plugins):
        raise InputError(f"{folder}: damaged: expected `plugins` to be names, got {plugins!r}. Copy the model again")
    check_plugins(plugins, folder)
    try:
        return config, load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise InputError(f"{folder}: incomplete, expected {WEIGHTS}. Copy the model again") from None
    except (ValueError, OSError, SafetensorError) as error:
        raise InputError(f"{folder}: damaged: {WEIGHTS} cannot be read ({error}). Copy the model again") from None


def load_saved_tensors(path: Path) -> Any:
    """A file from `torch.save` that only has tensors and plain containers; on the CPU.

    Raises:
        UnpicklingError, RuntimeError, EOFError, ValueError: it has something else, which is not executed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about files that it did not write
        return torch.load(path, map_location="cpu", weights_only=True)


def check_rebuilds(model: nn.Module, build: Callable[[], nn.Module], where: str | Path) -> None:
    """Check before saving that the config of a model rebuilds its parts, so that it can be loaded again.

    Raises:
        InputError: a part was replaced by one of another class or shape.
    """
    rebuilt = unallocated(build)
    # FSDP derives classes of its own.
    own, expected = (
        {name: type(part).__name__.removeprefix("FSDP") for name, part in each.named_modules()}
        for each in (model, rebuilt)
    )
    own |= {name: str(tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    expected |= {name: str(tuple(tensor.shape)) for name, tensor in rebuilt.state_dict().items()}
    differing = [name for name in dict.fromkeys([*own, *expected]) if own.get(name) != expected.get(name)]
    if differing:
        name = differing[0]
        raise InputError(
            f"{where}: could not be loaded again: {name} is {own.get(name, 'missing')}, but the model's config makes "
            f"it {expected.get(name, 'absent')}. Set it by the config instead: register a config class for your part "
            "(docs/extending.md), and give that to the model's config"
        )


def filled(build: Callable[[], ModuleT], state: dict[str, Tensor], where: str | Path) -> ModuleT:
    """The model that ``build`` returns, with the weights ``state``, in evaluation mode.

    It is only built if the weights fit: a config.json cannot make it allocate more memory than its weights need.

    Raises:
        InputError: names or shapes differ.
    """
    try:
        skeleton = unallocated(build).state_dict()
    except (RuntimeError, OverflowError, TypeError) as error:
        raise InputError(
            f"{where}: config.json does not describe a model ({one_line(error)}). Copy the model again"
        ) from None
    wrong = [name for name in skeleton.keys() | state.keys()
             if name not in skeleton or name not in state or skeleton[name].shape != state[name].shape]  # fmt: skip
    if wrong:
        raise InputError(f"{where}: the weights do not fit config.json: {some_of(sorted(wrong))}. Copy the model again")
    model = build()
    fill(model, state, where)
    return model.eval()


def fill(module: nn.Module, state: dict[str, Tensor], where: str | Path) -> None:
    """Load ``state`` into ``module``.

    Raises:
        InputError: names or shapes differ.
    """
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        text = one_line(error, max_length=1000)
        raise InputError(f"{where}: the weights do not fit config.json: {text}. Copy the model again") from None
