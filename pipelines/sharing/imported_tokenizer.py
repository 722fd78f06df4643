"""Imports a published tokenizer: its weights, under our names, in a model folder like that of a trained one.

Three families share the architecture of `stage1_tokenizer/backbones/vqgan_backbone.py`: taming-transformers' `VQModel`,
diffusers' `VQModel` and LlamaGen's VQ.
"""

import re
from pathlib import Path

from pipelines.sharing.foreign_tokenizers import ForeignTokenizer, read_tokenizer
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.autoencoder_config import AutoencoderConfig
from stage1_tokenizer.backbones.vqgan_backbone import VQGANConfig
from twostage.core.config.sections import parse_config
from twostage.core.errors import InputError
from twostage.core.wording import some_of

__all__ = ["import_tokenizer"]

# Our names of layers, and those of each family. {way} is `down` in the encoder and `up` in the decoder.
_TAMING_LAYERS = {
    "attentions": "attn",
    "resample": "{way}sample.conv",
    "shortcut": "nin_shortcut",
    "query": "q",
    "key": "k",
    "value": "v",
    ".out.": ".proj_out.",
    "bottleneck.codebook": "quantize.embedding.weight",
}
NAMES = {
    "taming": {
        "levels": "{way}",
        "blocks": "block",
        "middle.block1": "mid.block_1",
        "middle.attention": "mid.attn_1",
        "middle.block2": "mid.block_2",
        **_TAMING_LAYERS,
    },
    "llamagen": {
        "blocks": "res",
        "levels": "conv_blocks",
        "middle.block1": "mid.0",
        "middle.attention": "mid.1",
        "middle.block2": "mid.2",
        **_TAMING_LAYERS,
    },
    "diffusers": {
        "blocks": "resnets",
        "levels": "{way}_blocks",
        "middle.block1": "mid_block.resnets.0",
        "middle.attention": "mid_block.attentions.0",
        "middle.block2": "mid_block.resnets.1",
        "resample": "{way}samplers.0.conv",
        "shortcut": "conv_shortcut",
        ".norm.": ".group_norm.",
        "query": "to_q",
        "key": "to_k",
        "value": "to_v",
        ".out.": ".to_out.0.",
        "norm_out": "conv_norm_out",
        "bottleneck.codebook": "quantize.embedding.weight",
    },
}


def import_tokenizer(
    source: str | Path,
    out: str | Path,
    config: str | Path | None = None,
    kind: str | None = None,
    image_size: int | None = None,
) -> tuple[Autoencoder, str]:
    """Write another project's tokenizer into ``out``/model.

    Args:
        source: A `.ckpt` of taming-transformers or a `.pt` of LlamaGen (or `.safetensors`), or the folder of a
            diffusers `VQModel` or of a pipeline with one. Of several weights files, full precision is preferred.
        out: A run folder that contains no model yet.
        config: The YAML file of a taming-transformers checkpoint.
        kind: `taming`, `diffusers` or `llamagen`. None: the names of the weights decide.
        image_size: Height and width. None: the size that the tokenizer was trained with.

    Returns:
        The tokenizer in evaluation mode, and the file that its weights come from, with how they were stored.

    Raises:
        InputError: no such file or folder, a variant that computes something else, or weights that do not fit.
    """
    folder, source = Path(out) / "model", Path(source)
    if (folder / "config.json").exists():
        raise InputError(f"{folder}: already contains a model. Choose another --out, or delete this folder.")
    found = read_tokenizer(source, config, kind)
    if image_size is not None:
        found.document["image_size"] = (image_size, image_size)
    model = Autoencoder(parse_config(AutoencoderConfig, found.document, str(source)))
    _load(model, found, source)
    model.save_pretrained(folder)
    return model.eval(), found.source


def _load(model: Autoencoder, found: ForeignTokenizer, where: Path) -> None:
    """Load the weights. Each must exist in the model's shape, and no other may exist."""
    state, backbone = model.state_dict(), model.config.model.backbone
    assert isinstance(backbone, VQGANConfig)
    names = {
        _original_name(ours, found.kind, len(backbone.channel_mult)): ours
        for ours in state
        if ours.startswith(("encoder.", "decoder.")) or ours == "bottleneck.codebook"
    }
    if missing := [name for name in names if name not in found.state]:
        raise InputError(f"{where}: lacks weights of its configuration: expected {some_of(missing)}")
    if unknown := [name for name in found.state if name not in names]:
        raise InputError(f"{where}: expected only its own weights; these do not belong to it: {some_of(unknown)}")
    for name, ours in names.items():
        shape, weights = state[ours].shape, found.state[name]
        if not weights.is_floating_point():
            raise InputError(f"{where}: {name} is {weights.dtype}, expected weights that are not quantized.")
        if weights.shape == shape[:2] and shape[2:] == (1, 1):  # a fully connected layer is a 1x1 convolution
            weights = weights[:, :, None, None]
        if weights.shape != shape:
            raise InputError(
                f"{where}: {name} has the shape {tuple(weights.shape)}, expected {tuple(shape)} from its configuration"
            )
        state[ours] = weights
    model.load_state_dict(state)


def _original_name(ours: str, kind: str, levels: int) -> str:
    """``encoder.levels.0.blocks.1.norm1.weight`` -> ``encoder.down.0.block.1.norm1.weight``."""
    way = "down" if ours.startswith("encoder.") else "up"
    name = re.sub(r"^(?:en|de)coder\.((?:post_)?quant_conv)", r"\1", ours)
    for here, there in NAMES[kind].items():
        name = name.replace(here, there.format(way=way))
    if kind == "taming":  # numbers the decoder's levels from the full resolution, which comes last
        name = re.sub(r"\.up\.(\d+)", lambda found: f".up.{levels - 1 - int(found[1])}", name)
    return name
