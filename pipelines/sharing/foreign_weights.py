"""Weight files of other projects: `torch.save` and safetensors, whole or in shards, in any floating-point precision.

Only tensors are read. Nothing in a file is ever executed.
"""

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from twostage.core.errors import InputError
from twostage.core.files import read_json
from twostage.core.wording import one_line, some_of

__all__ = ["State", "Weights", "find_vq_model", "read_diffusers_weights", "read_weights"]

State = dict[str, Tensor]

STEM = "diffusion_pytorch_model"
FORMATS = ("safetensors", "bin")
SHARD = re.compile(r"-\d+-of-\d+(?=\.)")
PRECISIONS = ("fp32", "", "fp16", "bf16")
"""The variants in the file names of a diffusers model, the preferred one first."""
OLD_DIFFUSERS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""The attention layers: their names in the first releases of diffusers, and today."""
DOWNLOAD_AGAIN = "download it again"


@dataclass
class Weights:
    """The weights of another project's model."""

    state: State
    """The tensors by their original names; floating-point tensors are float32."""
    source: str
    """The file they come from, with a remark if they were converted or if other files were ignored."""


def read_weights(path: Path) -> Weights:
    """The weights in a file that `torch.save` or safetensors wrote; its content decides which of the two.

    Raises:
        InputError: the file is damaged, contains objects other than tensors, or has no tensors.
    """
    return _as_float32(_read_file(path), path.name)


def read_diffusers_weights(folder: Path) -> Weights:
    """The weights in the folder of a diffusers model.

    Full precision is preferred to other variants, safetensors to pickles, one file to shards.

    Raises:
        InputError: there are no weights, or a file is missing or damaged; the message names it.
    """
    files = sorted(path.name for path in folder.iterdir())
    candidates = sorted((rank, name) for name in files if (rank := _rank(name)) and (folder / name).is_file())
    if not candidates:
        if shards := [name for name in files if name.startswith(STEM) and SHARD.search(name)]:
            raise InputError(
                f"{folder}: the shards {some_of(shards)} have no index. Download {STEM}.safetensors.index.json too."
            )
        raise InputError(
            f"{folder}: no weights, only {some_of(files) or 'an empty folder'}. Expected {STEM}.safetensors, "
            f"{STEM}.bin, a variant such as {STEM}.fp16.safetensors, or shards with their index."
        )
    (_, chosen), *others = candidates
    state = _read_shards(folder / chosen) if chosen.endswith(".json") else _read_file(folder / chosen)
    weights = _as_float32(_with_current_names(state), chosen)
    if others:
        weights.source += f"; ignored: {some_of(name for _, name in others)}"
    return weights


def find_vq_model(folder: Path) -> Path:
    """The folder of a diffusers `VQModel`: ``folder`` itself, or the part of a pipeline that is one (`vqvae/`).

    Raises:
        InputError: the pipeline has no VQModel (the message names its autoencoder), has several, or lacks its files.
    """
    if (folder / "config.json").is_file():
        return folder
    file = folder / "model_index.json"
    if file.is_file():
        entries = read_json(file, DOWNLOAD_AGAIN).items()
        parts = {name: str(pair[1]) for name, pair in entries if isinstance(pair, list) and len(pair) == 2 and pair[1]}
    else:
        configs = sorted(folder.glob("*/config.json"))
        parts = {config.parent.name: str(read_json(config, DOWNLOAD_AGAIN).get("_class_name")) for config in configs}
    found = [name for name, kind in parts.items() if kind == "VQModel"]
    if len(found) > 1:
        raise InputError(f"{folder}: contains several VQModels, {', '.join(found)}. Give one of these folders.")
    if found:
        part = folder / found[0]
        if Path(found[0]).name != found[0] or not (part / "config.json").is_file():
            raise InputError(
                f"{file}: lists the VQModel {found[0]}, but {part}/config.json is missing. Download it too."
            )
        return part
    autoencoders = {name: kind for name, kind in parts.items() if "Autoencoder" in kind or "VAE" in kind}
    if parts and (autoencoders or file.is_file()):
        held = some_of(f"{name}/ ({kind})" for name, kind in (autoencoders or parts).items())
        raise InputError(
            f"{folder}: this pipeline has {held} but no VQModel. Only a VQModel has codes: give one, or a pipeline "
            "with one."
        )
    return folder


# --- one file -------------------------------------------------------------------------------------------------------


class _Inert:
    """Stands in for the classes of other programs whose objects a checkpoint may contain besides its weights."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _read_file(path: Path) -> State:
    return _read_safetensors(path) if _is_safetensors(path) else _read_checkpoint(path)


def _is_safetensors(path: Path) -> bool:
    """Recognize safetensors by name or by content: the length of a header, then a header in JSON."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def _read_safetensors(path: Path) -> State:
    try:
        state = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: damaged ({one_line(error)}). Download it again.") from None
    if not state:
        raise InputError(f"{path}: contains no weights. Download it again.")
    return state


def _read_checkpoint(path: Path) -> State:
    """The tensors in a file that `torch.save` wrote."""
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipfile.is_zipfile(path) else []
        with torch.serialization.safe_globals([(_Inert, name) for name in unknown]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the layers that read a damaged file raise errors of many kinds
        raise InputError(
            f"{path}: cannot be read as tensors alone ({type(error).__name__}). It is damaged, or loading it would "
            "run code. Download it again, or save only the model's state dict where it was trained."
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: contains a {type(content).__name__}, expected a dict with a state dict.")
    nested = [content[key] for key in ("state_dict", "ema", "model") if isinstance(content.get(key), dict)]
    state = {name: tensor for name, tensor in (*nested, content)[0].items() if isinstance(tensor, Tensor)}
    if not state:
        raise InputError(
            f"{path}: expected weights under state_dict, ema or model, got {some_of(content) or 'nothing'}."
        )
    return state


def _as_float32(state: State, source: str) -> Weights:
    before = {str(tensor.dtype).removeprefix("torch.") for tensor in state.values() if tensor.is_floating_point()}
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    converted = sorted(before - {"float32"})
    return Weights(state, f"{source} ({' and '.join(converted)}, converted to float32)" if converted else source)


# --- the folder of a diffusers model --------------------------------------------------------------------------------


def _rank(name: str) -> tuple[int, int, bool, str] | None:
    """The preference for a file of a diffusers model, the smallest first; None for other files.

    The parts of a name stand between dots: `diffusion_pytorch_model.safetensors.index.fp16.json`.
    """
    stem, *parts = name.split(".")
    formats = [part for part in parts if part in FORMATS]
    index = parts[-1:] == ["json"] and "index" in parts
    if stem != STEM or not formats or not (index or parts[-1] in FORMATS):
        return None
    variant = ".".join(part for part in parts if part not in (*FORMATS, "index", "json"))
    if SHARD.search(f"{variant}."):
        return None
    precision = PRECISIONS.index(variant) if variant in PRECISIONS else len(PRECISIONS)
    return precision, FORMATS.index(formats[0]), index, variant


def _read_shards(index: Path) -> State:
    shards = read_json(index, DOWNLOAD_AGAIN).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(file, str) for file in shards.values()):
        raise InputError(f"{index}: weight_map does not say which file has which weights. Download it again.")
    files = sorted(set(shards.values()))
    if outside := [file for file in files if Path(file).name != file]:
        raise InputError(f"{index}: lists the shard {outside[0]!r}, expected the name of a file in the same folder.")
    if missing := [file for file in files if not (index.parent / file).is_file()]:
        raise InputError(
            f"{index.parent}: {len(missing)} of {len(files)} shards in {index.name} are missing: {some_of(missing)}. "
            "Download them too."
        )
    state: State = {}
    for file in files:
        held = _read_file(index.parent / file)
        if lacking := [name for name, where in shards.items() if where == file and name not in held]:
            raise InputError(
                f"{index.parent / file}: lacks weights that {index.name} expects there: {some_of(lacking)}. "
                "Download both again."
            )
        state |= held
    return state


def _with_current_names(state: State) -> State:
    old = "|".join(OLD_DIFFUSERS)
    return {
        re.sub(rf"(attentions\.\d+)\.({old})\.", lambda found: f"{found[1]}.{OLD_DIFFUSERS[found[2]]}.", name): tensor
        for name, tensor in state.items()
    }
