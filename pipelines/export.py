"""Exports a trained model: weights and model card to share, and programs that run without twostage.

twostage export runs/PRIOR --out DIR [--onnx] [--torch-export] [--license mit] [--push owner/name]
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from twostage.core.errors import InputError
from twostage.core.machine.command import run_command

__all__ = ["command"]


def command(
    model: Annotated[
        str,
        typer.Argument(help="runs/NAME of a prior, a VAE or a tokenizer; a pipeline folder, or a hub id."),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    onnx: Annotated[bool, typer.Option("--onnx", help="Also write encoder and decoder as ONNX.")] = False,
    torch_export: Annotated[
        bool, typer.Option("--torch-export", help="Also write encoder and decoder as torch.export programs.")
    ] = False,
    weights: Annotated[
        Literal["float32", "bfloat16"],
        typer.Option(
            help="Precision of the weights on disk. bfloat16 halves the size of prior and decoder; the codes stay "
            "exactly the same. For a tokenizer, it writes a rounded one, to train a prior on its codes."
        ),
    ] = "float32",
    license: Annotated[str | None, typer.Option(help="License of the weights: its id on the hub, such as mit.")] = None,
    data_license: Annotated[str | None, typer.Option(help="License of the training images, in words.")] = None,
    push: Annotated[str | None, typer.Option(help="Upload to owner/name on the Hugging Face hub.")] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: make the repository private.")] = False,
    tokenizer: Annotated[str | None, typer.Option(help="runs/TOKENIZER, if it has moved.")] = None,
) -> None:
    """Export a model as a folder to share, and as ONNX and torch.export programs."""
    from pipelines.drawing.two_stage import TwoStagePipeline
    from pipelines.saved.model_card import CardFields, gather_records
    from pipelines.saved.pipeline_folder import push_folder
    from pipelines.saved.saved_model import SavedModel
    from pipelines.sharing.exported_folder import export_pipeline, export_tokenizer
    from pipelines.sharing.exported_programs import FORMATS, Format
    from stage1_tokenizer.autoencoder import Autoencoder
    from twostage.core.machine.processes import share_cores

    share_cores()
    formats: list[Format] = [form for form, asked in zip(FORMATS, (onnx, torch_export), strict=True) if asked]
    if private and not push:
        raise InputError("--private: only applies to --push owner/name. Add --push, or omit --private.")
    fields = CardFields(license, data_license, where=push or out.absolute().name)
    saved = SavedModel.find(model)
    alone = Autoencoder.from_pretrained(model) if saved.kind == "tokenizer" else None
    if alone and not alone.variational:
        if push:
            raise InputError(f"--push {push}: {model} is a tokenizer, not a pipeline. Omit --push.")
        sentences = export_tokenizer(alone, out, formats, weights)
        what = "a rounded tokenizer" if weights == "bfloat16" else "encoder and decoder"
        print(f"{out}: {what}; this model cannot generate images by itself")
    else:
        pipeline = TwoStagePipeline.from_saved(saved, tokenizer)
        records = gather_records(saved, tokenizer)
        sentences = export_pipeline(pipeline, out, formats, fields, records, weights)
        print(f"{out}: pipeline, with its model card README.md")
    for sentence in sentences:
        print(f"  {sentence}")
    if push:
        print(push_folder(out, push, private))


if __name__ == "__main__":
    run_command(command)
