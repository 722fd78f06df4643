"""Reads the weights of other projects from the files that they are shared in: `torch.save` and safetensors, whole or in
shards, in any floating-point precision.

Only tensors are read from a file; nothing in it is ever executed.
"""

import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from twostage.core.errors import InputError
from twostage.core.files import read_json

__all__ = ["State", "Weights", "find_vq_model", "read_diffusers_weights", "read_weights", "some_of"]

State = dict[str, Tensor]

STEM = "diffusion_pytorch_model"
FORMATS = ("safetensors", "bin")
SHARD = re.compile(r"-\d+-of-\d+(?=\.)")
PRECISIONS = ("fp32", "", "fp16", "bf16")
"""Of the files of a diffusers model, by the variant in their name: the first that is there is taken."""
# How the first releases of diffusers called an attention's layers.
OLD_DIFFUSERS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass
class Weights:
    """The weights of a model of another project."""

    state: State
    """Under their own names, floating-point ones in float32."""
    source: str
    """The file that they come from and what else there is to know about that, in words."""


def some_of(names: Iterable[str]) -> str:
    """At most five of the names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def read_weights(path: Path) -> Weights:
    """The weights in a file that `torch.save` or safetensors wrote; which of them, its content says.

    Raises:
        InputError: it is damaged, holds other things than tensors, or none.
    """
    return _described(_read_file(path), path.name)


def read_diffusers_weights(folder: Path) -> Weights:
    """The weights in the folder of a diffusers model: of full precision where they are there, else of another variant;
    safetensors rather than a pickle; one file rather than shards.

    Raises:
        InputError: there are none, or a file is missing or damaged (it is named).
    """
    candidates = sorted((rank, path.name) for path in folder.iterdir() if (rank := _rank(path.name)) and path.is_file())
    if not candidates:
        shards = sorted(
            path.name for path in folder.iterdir() if path.name.startswith(STEM) and SHARD.search(path.name)
        )
        if shards:
            raise InputError(
                f"{folder}: holds {some_of(shards)}, but not the index that says what is in which shard "
                f"({STEM}.safetensors.index.json); download it too"
            )
        held = some_of(sorted(path.name for path in folder.iterdir())) or "nothing"
        wanted = (
            f"{STEM}.safetensors or {STEM}.bin, a variant such as {STEM}.fp16.safetensors, or shards with their index"
        )
        raise InputError(f"{folder}: no weights there; expected {wanted}; it holds {held}")
    (_, chosen), *others = candidates
    state = _read_shards(folder / chosen) if chosen.endswith(".json") else _read_file(folder / chosen)
    weights = _described(_with_new_names(state), chosen)
    if others:
        weights.source += f"; not taken: {some_of(name for _, name in others)}"
    return weights


def find_vq_model(folder: Path) -> Path:
    """The folder of a diffusers `VQModel`: ``folder`` itself, or the part of a pipeline folder that is one (`vqvae/`).

    Raises:
        InputError: a pipeline without one (its autoencoder is named), with several, or without that part's files.
    """
    if (folder / "config.json").is_file():
        return folder
    file = folder / "model_index.json"
    if file.is_file():
        entries = read_json(file, "download it again").items()
        parts = {name: str(pair[1]) for name, pair in entries if isinstance(pair, list) and len(pair) == 2 and pair[1]}
    else:
        parts = {}
        for config in sorted(folder.glob("*/config.json")):
            parts[config.parent.name] = str(read_json(config, "download it again").get("_class_name"))
    found = [name for name, kind in parts.items() if kind == "VQModel"]
    if len(found) > 1:
        raise InputError(f"{folder}: holds several VQModels, {', '.join(found)}; give one of these folders")
    if found:
        part = folder / found[0]
        if Path(found[0]).name != found[0] or not (part / "config.json").is_file():
            raise InputError(f"{file}: names the VQModel {found[0]}, but {part} has no config.json; download it too")
        return part
    autoencoders = [f"{name}/ is an {kind}" for name, kind in parts.items() if "Autoencoder" in kind or "VAE" in kind]
    if parts and (autoencoders or file.is_file()):
        held = ", ".join(autoencoders) or f"it holds {some_of(f'{name} ({kind})' for name, kind in parts.items())}"
        raise InputError(
            f"{folder}: a pipeline without a VQModel: {held}; only a VQModel has codes, so give a model or a pipeline "
            "with one"
        )
    return folder


# --- one file -------------------------------------------------------------------------------------------------------


class _Inert:
    """Stands in for the classes of training programs, of which a checkpoint may hold objects beside its weights."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _read_file(path: Path) -> State:
    return _read_safetensors(path) if _is_safetensors(path) else _read_checkpoint(path)


def _is_safetensors(path: Path) -> bool:
    """By its name or by its content: the length of a header, then a header in JSON."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def _read_safetensors(path: Path) -> State:
    try:
        state = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{path}: damaged, it cannot be read ({' '.join(str(error).split())}); download it again"
        ) from None
    if not state:
        raise InputError(f"{path}: holds no weights; download it again")
    return state


def _read_checkpoint(path: Path) -> State:
    """The tensors of a file that `torch.save` wrote."""
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipfile.is_zipfile(path) else []
        with torch.serialization.safe_globals([(_Inert, name) for name in unknown]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in any of the layers that read it
        raise InputError(
            f"{path}: cannot be read as tensors alone ({type(error).__name__}); expected what torch.save writes, whole "
            "and without objects that would run code: save its state dict by itself where it was trained"
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, expected a dict with a state dict")
    nested = [content[key] for key in ("state_dict", "ema", "model") if isinstance(content.get(key), dict)]
    state = {name: tensor for name, tensor in (*nested, content)[0].items() if isinstance(tensor, Tensor)}
    if not state:
        raise InputError(f"{path}: no weights under state_dict, ema or model; it holds {some_of(map(str, content))}")
    return state


def _described(state: State, source: str) -> Weights:
    """In float32, with what they were before."""
    before = {str(tensor.dtype).removeprefix("torch.") for tensor in state.values() if tensor.is_floating_point()}
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    converted = sorted(before - {"float32"})
    return Weights(state, f"{source} ({' and '.join(converted)}, converted to float32)" if converted else source)


# --- the folder of a diffusers model --------------------------------------------------------------------------------


def _rank(name: str) -> tuple[int, int, bool, str] | None:
    """Which file of a diffusers model is taken first: by precision, format, whether it is the index of shards; None for
    other files. Its parts stand between dots: `diffusion_pytorch_model.safetensors.index.fp16.json`."""
    stem, *parts = name.split(".")
    if stem != STEM or len(parts) < 1:
        return None
    index = parts[-1] == "json" and "index" in parts
    formats = [part for part in parts if part in FORMATS]
    if not formats or not (index or parts[-1] in FORMATS):
        return None
    variant = ".".join(part for part in parts if part not in (*FORMATS, "index", "json"))
    if SHARD.search(f"{variant}."):
        return None
    precision = PRECISIONS.index(variant) if variant in PRECISIONS else len(PRECISIONS)
    return precision, FORMATS.index(formats[0]), index, variant


def _read_shards(index: Path) -> State:
    """The weights of all the files that an index names."""
    shards = read_json(index, "download it again").get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(file, str) for file in shards.values()):
        raise InputError(f"{index}: damaged: weight_map does not say which file holds which weights; download it again")
    files = sorted(set(shards.values()))
    for file in files:
        if Path(file).name != file:
            raise InputError(f"{index}: names the shard {file!r}, expected the name of a file beside it")
    if missing := [file for file in files if not (index.parent / file).is_file()]:
        raise InputError(
            f"{index.parent}: {len(missing)} of {len(files)} shards are missing: {some_of(missing)} (named by "
            f"{index.name}); download them too"
        )
    state: State = {}
    for file in files:
        held = _read_file(index.parent / file)
        if lacking := [name for name, where in shards.items() if where == file and name not in held]:
            raise InputError(
                f"{index.parent / file}: lacks weights that {index.name} says it holds: {some_of(lacking)}; download "
                "both again"
            )
        state |= held
    return state


def _with_new_names(state: State) -> State:
    old = "|".join(OLD_DIFFUSERS)
    return {
        re.sub(rf"(attentions\.\d+)\.({old})\.", lambda found: f"{found[1]}.{OLD_DIFFUSERS[found[2]]}.", name): tensor
        for name, tensor in state.items()
    }
