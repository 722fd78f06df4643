"""Tokenizers of other projects: their configuration, translated into ours, and their weights under their own names."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, ConfigDict, Field

from pipelines.sharing.foreign_weights import State, Weights, find_vq_model, read_diffusers_weights, read_weights
from twostage.core.config.sections import Count, Flag, Section, load_config, parse_config
from twostage.core.errors import InputError
from twostage.core.files import read_json
from twostage.core.wording import some_of

__all__ = ["KINDS", "ForeignTokenizer", "read_tokenizer"]

KINDS = ("taming", "diffusers", "llamagen")

TRAINED_ON_LPIPS = {"trained_against": [{"type": "lpips"}]}


@dataclass
class ForeignTokenizer:
    """A tokenizer as its own project stores it."""

    kind: str
    """One of ``KINDS``."""
    state: State
    """The weights by their original names, without those that only training uses."""
    document: dict[str, Any]
    """Its configuration as that of an :class:`AutoencoderConfig`, not yet validated."""
    source: str
    """The file that the weights come from, and how they were stored."""


def read_tokenizer(source: Path, config: str | Path | None = None, kind: str | None = None) -> ForeignTokenizer:
    """Read a `.ckpt` of taming-transformers with its ``config``, a `.pt` of LlamaGen, either of them as safetensors, or
    the folder of a diffusers `VQModel` or of a pipeline with one. Without ``kind``, the weights' names decide.

    Raises:
        InputError: no such file or folder, or a variant that computes something else.
    """
    if kind is not None and kind not in KINDS:
        raise InputError(f"--kind {kind}: expected one of {', '.join(KINDS)}.")
    if not source.exists():
        raise InputError(
            f"{source}: no such file or folder. Expected a .ckpt, .pt or .safetensors file, or the folder of a VQModel."
        )
    folder = source.is_dir()
    if kind is not None and folder != (kind == "diffusers"):
        wanted = "a folder with config.json" if kind == "diffusers" else "a checkpoint file"
        raise InputError(f"{source}: is a {'folder' if folder else 'file'}, but for --kind {kind} expected {wanted}.")
    weights = None if folder else read_weights(source)
    if weights and (kind or _recognise(source, weights.state)) == "taming":
        return _taming(source, weights, config)
    if config is not None:
        raise InputError(f"--config {config}: only applies to a taming-transformers checkpoint. Omit it.")
    return _llamagen(source, weights) if weights else _diffusers(find_vq_model(source))


def _recognise(path: Path, state: State) -> str:
    if any(name.startswith("encoder.down_blocks.") for name in state):
        raise InputError(f"{path}: diffusers weights need the config.json next to them. Give the folder of both.")
    for kind, part in {"taming": "encoder.down.", "llamagen": "encoder.conv_blocks."}.items():
        if any(name.startswith(part) for name in state):
            return kind
    raise InputError(
        f"{path}: not a tokenizer of a known kind. Expected weights encoder.down... (taming-transformers) or "
        f"encoder.conv_blocks... (LlamaGen), got {some_of(state)}"
    )


# --- taming-transformers --------------------------------------------------------------------------------------------


class _Foreign(Section):
    """A group in another project's configuration. Keys that do not change what the weights compute are ignored."""

    model_config = ConfigDict(extra="ignore")


def _only(*values: object) -> AfterValidator:
    """A check for keys where any other value would compute something else with the same weights."""

    def check(value: object) -> object:
        if value not in values:
            raise ValueError(f"got {value!r}, only {' or '.join(map(repr, values))} can be imported")
        return value

    return AfterValidator(check)


def _vector_quantized(target: str) -> str:
    if target.rpartition(".")[2] not in ("VQModel", "VQModelInterface", "VQNoDiscModel"):
        raise ValueError(f"got {target!r}, only a VQModel can be imported")
    return target


class _TamingBackbone(_Foreign):
    in_channels: Count
    out_ch: Count
    resolution: Count
    ch: Count
    ch_mult: list[Count] = Field(default=[1, 2, 4, 8], min_length=1)
    num_res_blocks: Count
    attn_resolutions: list[Count]
    z_channels: Count
    double_z: Annotated[Any, _only(False)]
    resamp_with_conv: Annotated[Any, _only(True)] = True
    attn_type: Annotated[Any, _only("vanilla")] = "vanilla"


class _TamingParams(_Foreign):
    embed_dim: Count
    n_embed: Count
    ddconfig: _TamingBackbone
    remap: Annotated[Any, _only(None)] = None
    lossconfig: Any = None


class _TamingModel(_Foreign):
    target: Annotated[str, AfterValidator(_vector_quantized)] = "taming.models.vqgan.VQModel"
    params: _TamingParams


class _TamingConfig(_Foreign):
    model: _TamingModel


def _taming(path: Path, weights: Weights, config: str | Path | None) -> ForeignTokenizer:
    if config is None:
        raise InputError(
            f"{path}: a taming-transformers checkpoint does not contain its configuration. Give the YAML file with its "
            "model.params.ddconfig: --config FILE."
        )
    params = load_config(_TamingConfig, config).model.params
    parts, last = params.ddconfig, len(params.ddconfig.ch_mult) - 1
    _same_channels(f"config {config}: model.params.ddconfig", parts.in_channels, parts.out_ch)
    # The encoder of taming halves the resolution, rounding down; its decoder doubles what is left.
    coarsest = parts.resolution >> last
    encoder = [2**i for i in range(last + 1) if parts.resolution >> i in parts.attn_resolutions]
    decoder = [2**i for i in range(last + 1) if coarsest << (last - i) in parts.attn_resolutions]
    backbone = {
        "channels": parts.ch,
        "channel_mult": parts.ch_mult,
        "num_res_blocks": parts.num_res_blocks,
        "attention_factors": encoder,
        "decoder_attention_factors": None if decoder == encoder else decoder,
        "inner_channels": parts.z_channels,
    }
    size = (parts.resolution, parts.resolution)
    state = {name: tensor for name, tensor in weights.state.items() if not name.startswith("loss.")}
    document = _document(size, parts.in_channels, backbone, params.n_embed, params.embed_dim)
    if isinstance(params.lossconfig, dict) and "LPIPS" in str(params.lossconfig.get("target")):
        document |= TRAINED_ON_LPIPS
    return ForeignTokenizer("taming", state, document, weights.source)


# --- LlamaGen -------------------------------------------------------------------------------------------------------


def _llamagen(path: Path, weights: Weights) -> ForeignTokenizer:
    """Read the configuration from the shapes. Image size, normalised codes and LPIPS are LlamaGen's constants."""
    state = weights.state

    def sizes(name: str) -> torch.Size:
        if name not in state or state[name].dim() < 2:
            raise InputError(f"{path}: the weights {name} are missing. Expected LlamaGen's VQ-8 or VQ-16.")
        return state[name].shape

    levels = {int(found[1]) for name in state if (found := re.match(r"encoder\.conv_blocks\.(\d+)\.", name))}
    blocks = [name for name in state if re.fullmatch(r"encoder\.conv_blocks\.0\.res\.\d+\.conv1\.weight", name)]
    stem, channels = sizes("encoder.conv_in.weight")[:2]
    dim, inner = sizes("quant_conv.weight")[:2]
    widths = [sizes(f"encoder.conv_blocks.{i}.res.0.conv1.weight")[0] for i in range(max(1, len(levels)))]
    backbone = {**_multiples(stem, widths), "num_res_blocks": len(blocks), "inner_channels": inner}
    codes = sizes("quantize.embedding.weight")[0]
    state = {name: tensor for name, tensor in state.items() if name != "quantize.codebook_used"}
    document = _document((256, 256), channels, backbone, codes, dim, l2_normalize=True)
    return ForeignTokenizer("llamagen", state, document | TRAINED_ON_LPIPS, weights.source)


# --- diffusers ------------------------------------------------------------------------------------------------------


class _DiffusersConfig(_Foreign):
    class_name: Annotated[Any, _only("VQModel")] = Field(alias="_class_name")
    in_channels: Count = 3
    out_channels: Count = 3
    down_block_types: list[Annotated[str, _only("DownEncoderBlock2D", "AttnDownEncoderBlock2D")]]
    up_block_types: list[Annotated[str, _only("UpDecoderBlock2D", "AttnUpDecoderBlock2D")]]
    block_out_channels: list[Count] = Field(min_length=1)
    layers_per_block: Count = 1
    act_fn: Annotated[Any, _only("silu", "swish")] = "silu"
    latent_channels: Count = 3
    sample_size: Count | tuple[Count, Count] = 32
    num_vq_embeddings: Count = 256
    norm_num_groups: Count = 32
    vq_embed_dim: Count | None = None
    norm_type: Annotated[Any, _only("group")] = "group"
    mid_block_add_attention: Flag = True


def _diffusers(folder: Path) -> ForeignTokenizer:
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(f"{file}: no such file. Expected the folder of a diffusers VQModel.")
    config = parse_config(_DiffusersConfig, read_json(file, "download it again"), str(file))
    _same_channels(str(file), config.in_channels, config.out_channels)
    widths, down, up = config.block_out_channels, config.down_block_types, config.up_block_types[::-1]
    if not len(widths) == len(down) == len(up):
        raise InputError(
            f"{file}: block_out_channels, down_block_types and up_block_types have {len(widths)}, {len(down)} and "
            f"{len(up)} items, expected the same number."
        )
    encoder = [2**i for i, name in enumerate(down) if name.startswith("Attn")]
    decoder = [2**i for i, name in enumerate(up) if name.startswith("Attn")]
    backbone = {
        **_multiples(widths[0], widths),
        "num_res_blocks": config.layers_per_block,
        "attention_factors": encoder,
        "decoder_attention_factors": None if decoder == encoder else decoder,
        "middle_attention": config.mid_block_add_attention,
        "inner_channels": config.latent_channels,
        "norm_groups": config.norm_num_groups,
    }
    size = config.sample_size if isinstance(config.sample_size, tuple) else (config.sample_size, config.sample_size)
    dim = config.vq_embed_dim or config.latent_channels
    described = _document(size, config.in_channels, backbone, config.num_vq_embeddings, dim)
    weights = read_diffusers_weights(folder)
    return ForeignTokenizer("diffusers", weights.state, described, weights.source)


# --- all of them ----------------------------------------------------------------------------------------------------


def _document(
    size: tuple[int, int],
    channels: int,
    backbone: dict[str, Any],
    codebook_size: int,
    dim: int,
    l2_normalize: bool = False,
) -> dict[str, Any]:
    quantizer = {"codebook_size": codebook_size, "codebook": "learned", "l2_normalize": l2_normalize}
    model = {"backbone": {"type": "vqgan", **backbone}, "bottleneck": {"type": "vector", **quantizer}}
    return {
        "image_size": size,
        "channels": channels,
        "model": {"latent_channels": dim, **model},
        "loss": {"reconstruction": "l1"},
    }


def _multiples(stem: int, widths: list[int]) -> dict[str, Any]:
    unit = math.gcd(stem, *widths)
    return {"channels": unit, "input_mult": stem // unit, "channel_mult": [width // unit for width in widths]}


def _same_channels(where: str, inputs: int, outputs: int) -> None:
    if inputs != outputs:
        raise InputError(f"{where}: {inputs} input channels and {outputs} output channels, expected the same number.")
