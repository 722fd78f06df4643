"""Takes over a published tokenizer: its weights, under our names, in a model folder like that of a trained one.

Three families share one architecture, that of `stage1_tokenizer/vqgan_backbone.py`: taming-transformers' `VQModel`,
diffusers' `VQModel` and LlamaGen's VQ.
"""

import re
from pathlib import Path
from typing import Annotated

import typer

from pipelines.sharing.foreign_tokenizers import ForeignTokenizer, read_tokenizer
from pipelines.sharing.foreign_weights import some_of
from stage1_tokenizer.autoencoder import Autoencoder, AutoencoderConfig
from stage1_tokenizer.vector_quantizer import VectorConfig
from stage1_tokenizer.vqgan_backbone import VQGANConfig
from twostage.core.config.sections import parse_config
from twostage.core.errors import InputError
from twostage.core.machine.command import run_command

__all__ = ["import_tokenizer"]

# What each family calls the parts of our names; {way} is `down` in the encoder and `up` in the decoder.
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
) -> Autoencoder:
    """Writes the tokenizer of another project into ``out``/model, and returns it in evaluation mode.

    Args:
        source: A `.ckpt` of taming-transformers or a `.pt` of LlamaGen (either may be `.safetensors`), or the folder of
            a diffusers `VQModel` or of a pipeline with one. Weights of full precision are preferred.
        out: A run folder; it must not hold a model.
        config: The YAML file of a taming-transformers checkpoint, which says nothing of its architecture itself.
        kind: `taming`, `diffusers` or `llamagen`; None: by the names of the weights.
        image_size: Height and width; None: what the tokenizer was trained with.

    Raises:
        InputError: not such a file or folder, a variant that computes something else, or weights that do not fit.
    """
    return _import(Path(source), Path(out), config, kind, image_size)[0]


def _import(
    source: Path, out: Path, config: str | Path | None, kind: str | None, image_size: int | None
) -> tuple[Autoencoder, ForeignTokenizer]:
    folder = out / "model"
    if (folder / "config.json").exists():
        raise InputError(f"{folder}: holds a model already; give --out another folder, or delete this one")
    found = read_tokenizer(source, config, kind)
    if image_size is not None:
        found.document["image_size"] = (image_size, image_size)
    model = Autoencoder(parse_config(AutoencoderConfig, found.document, str(source)))
    _fill(model, found, source)
    model.save_pretrained(folder)
    return model.eval(), found


def _name_there(ours: str, kind: str, levels: int) -> str:
    """``encoder.levels.0.blocks.1.norm1.weight`` -> ``encoder.down.0.block.1.norm1.weight``."""
    way = "down" if ours.startswith("encoder.") else "up"
    name = re.sub(r"^(?:en|de)coder\.((?:post_)?quant_conv)", r"\1", ours)
    for here, there in NAMES[kind].items():
        name = name.replace(here, there.format(way=way))
    if kind == "taming":  # counts the decoder's resolutions from the full one, which comes last
        name = re.sub(r"\.up\.(\d+)", lambda found: f".up.{levels - 1 - int(found[1])}", name)
    return name


def _fill(model: Autoencoder, found: ForeignTokenizer, where: Path) -> None:
    """Loads the weights; each must be there, in the model's shape, and there may be no other."""
    state, backbone = model.state_dict(), model.config.model.backbone
    assert isinstance(backbone, VQGANConfig)
    names = {
        _name_there(ours, found.kind, len(backbone.channel_mult)): ours
        for ours in state
        if ours.startswith(("encoder.", "decoder.")) or ours == "bottleneck.codebook"
    }
    if missing := [name for name in names if name not in found.state]:
        raise InputError(f"{where}: weights are missing that its configuration asks for: {some_of(missing)}")
    if unknown := [name for name in found.state if name not in names]:
        raise InputError(f"{where}: holds weights that its configuration has no place for: {some_of(unknown)}")
    for name, ours in names.items():
        shape, weights = state[ours].shape, found.state[name]
        if not weights.is_floating_point():
            raise InputError(f"{where}: {name} holds {weights.dtype} values; expected weights that are not quantised")
        if weights.shape == shape[:2] and shape[2:] == (1, 1):  # a fully connected layer is a 1x1 convolution
            weights = weights[:, :, None, None]
        if weights.shape != shape:
            raise InputError(
                f"{where}: {name} has the shape {tuple(weights.shape)}, its configuration asks for {tuple(shape)}"
            )
        state[ours] = weights
    model.load_state_dict(state)


def command(
    source: Annotated[
        str,
        typer.Argument(
            help="A .ckpt of taming-transformers or .pt of LlamaGen (or .safetensors), or the folder of a diffusers "
            "VQModel or of a pipeline with one."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The run folder to make: runs/NAME.")],
    config: Annotated[Path | None, typer.Option(help="The YAML file of a taming-transformers checkpoint.")] = None,
    kind: Annotated[str | None, typer.Option(help="taming, diffusers or llamagen; found out by default.")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Another one than it was trained with.")] = None,
) -> None:
    """Take over a published VQ tokenizer: taming-transformers, diffusers or LlamaGen."""
    model, found = _import(Path(source), out, config, kind, image_size)
    backbone, quantizer = model.config.model.backbone, model.config.model.bottleneck
    assert isinstance(backbone, VQGANConfig)
    assert isinstance(quantizer, VectorConfig)
    (height, width), parameters = model.config.image_size, sum(p.numel() for p in model.parameters())
    attention = [str(2**level) for level in range(len(backbone.channel_mult)) if backbone.attends(level)]
    print(f"{out / 'model'}: {parameters / 1e6:.1f} million parameters")
    print(f"  weights    {found.source}")
    print(
        f"  backbone   vqgan: widths {' '.join(map(str, backbone.widths))}, {backbone.num_res_blocks} residual blocks "
        f"each, attention at the factors {', '.join(attention) or '(none)'}"
    )
    codes = "cosine codes" if quantizer.l2_normalize else "codes"
    print(f"  codebook   {quantizer.codebook_size} {codes} of {model.config.model.latent_channels} dimensions")
    print(
        f"  grid       {model.grid[0]} x {model.grid[1]} codes an image of {height} x {width} x {model.config.channels}"
    )
    print(f"  hash       {model.content_hash()}")


if __name__ == "__main__":
    run_command(command)
