"""Imports a published VQ tokenizer into a run folder.

twostage import FILE_OR_FOLDER --out runs/NAME [--config FILE]
"""

from pathlib import Path
from typing import Annotated

import typer

from twostage.core.machine.command import run_command

__all__ = ["command"]


def command(
    source: Annotated[
        str,
        typer.Argument(
            help="A .ckpt file from taming-transformers, a .pt file from LlamaGen, a .safetensors file from either, "
            "or the folder of a diffusers VQModel or of a pipeline that contains one."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The run folder to create: runs/NAME.")],
    config: Annotated[Path | None, typer.Option(help="The YAML file of a taming-transformers checkpoint.")] = None,
    kind: Annotated[str | None, typer.Option(help="taming, diffusers or llamagen; detected by default.")] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Image size, if not the one it was trained with.")
    ] = None,
) -> None:
    """Import a pretrained VQ tokenizer from taming-transformers, diffusers or LlamaGen."""
    from pipelines.sharing.imported_tokenizer import import_tokenizer
    from stage1_tokenizer.backbones.vqgan_backbone import VQGANConfig
    from stage1_tokenizer.bottlenecks.vector_quantizer import VectorConfig

    model, weights = import_tokenizer(source, out, config, kind, image_size)
    backbone, quantizer = model.config.model.backbone, model.config.model.bottleneck
    assert isinstance(backbone, VQGANConfig)
    assert isinstance(quantizer, VectorConfig)
    (height, width), (rows, columns) = model.config.image_size, model.grid
    attention = [str(2**level) for level in range(len(backbone.channel_mult)) if backbone.attends(level)]
    print(f"{out / 'model'}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters")
    print(f"  weights    {weights}")
    print(
        f"  backbone   vqgan: widths {' '.join(map(str, backbone.widths))}, residual blocks per level: "
        f"{backbone.num_res_blocks}, attention at the factors {', '.join(attention) or '(none)'}"
    )
    codes = "cosine codes" if quantizer.l2_normalize else "codes"
    print(f"  codebook   {quantizer.codebook_size} {codes} of {model.config.model.latent_channels} dimensions")
    print(f"  grid       {rows} x {columns} codes for each {height} x {width} x {model.config.channels} image")
    print(f"  hash       {model.content_hash()}")


if __name__ == "__main__":
    run_command(command)
