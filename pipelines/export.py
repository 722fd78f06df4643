"""Writes a trained model as a folder to share: weights, model card, and programs that run without this project.

twostage export runs/PRIOR --out DIR [--onnx] [--torch-export] [--license mit] [--push owner/name]
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.saved.model_card import CardFields, gather_records, is_as_written
from pipelines.saved.pipeline_folder import DOCUMENT, is_pipeline_folder, push_folder
from pipelines.saved.saved_model import SavedModel
from pipelines.sharing.exported_programs import Format, check_libraries, export_programs
from stage1_tokenizer.autoencoder import Autoencoder
from twostage.core.errors import InputError
from twostage.core.machine.command import run_command
from twostage.core.machine.processes import share_cores

__all__ = ["export_pipeline", "export_tokenizer"]

CARD, OTHER_CARD = "README.md", "README.new.md"
FORMATS: tuple[Format, ...] = ("onnx", "torch_export")


def export_pipeline(
    pipeline: TwoStagePipeline, out: Path, formats: Sequence[Format], fields: CardFields, records: dict[str, bytes]
) -> list[str]:
    """Writes a pipeline folder with a model card, and the tokenizer's programs in ``formats``, into ``out``.

    ``out`` may hold the same pipeline already: it is written anew, but a README.md that somebody changed is kept. All
    is made beside ``out`` first, so that a failure leaves it as it was.

    Returns:
        What there is to say about what was written, a sentence each.

    Raises:
        InputError: ``out`` holds something else, or a program is not what it should be.
    """
    if out.exists() and not is_pipeline_folder(out) and not _is_empty(out):
        raise InputError(f"--out {out}: exists and holds no pipeline; give another --out. Nothing was changed")
    partial = _new_partial(out)
    try:
        pipeline.save_pretrained(partial)
        if is_pipeline_folder(out) and _hashes(out) != _hashes(partial):
            raise InputError(f"--out {out}: holds another pipeline; give another --out. Nothing was changed")
        sentences = export_programs(pipeline.tokenizer, partial, formats) if formats else []
        pipeline.write_card(partial, records, fields)
        card = out / CARD
        if card.is_file() and not is_as_written(card.read_text(encoding="utf-8")):
            (partial / CARD).replace(partial / OTHER_CARD)
            sentences.append(f"{CARD} was changed by hand and is kept; a new one is {OTHER_CARD}")
        _move(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sentences


def export_tokenizer(model: Autoencoder, out: Path, formats: Sequence[Format]) -> list[str]:
    """Writes the programs of a model that makes no images by itself; returns a sentence about each.

    Raises:
        InputError: no formats, ``out`` holds something else, or a program is not what it should be.
    """
    if not formats:
        raise InputError(
            f"a tokenizer with the bottleneck {model.config.model.bottleneck.type!r} has no images of its own to make, "
            "so there is no pipeline to export; give the run of a prior over its codes, or --onnx or --torch-export "
            "for its encoder and decoder"
        )
    if out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - set(FORMATS)):
        raise InputError(f"--out {out}: exists and holds other things; give another --out. Nothing was changed")
    partial = _new_partial(out)
    try:
        sentences = export_programs(model, partial, formats)
        _move(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sentences


def _is_empty(out: Path) -> bool:
    return out.is_dir() and not any(out.iterdir())


def _new_partial(out: Path) -> Path:
    partial = out.absolute().with_name(f".{out.absolute().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a call that was killed
    partial.mkdir(parents=True)
    return partial


def _hashes(folder: Path) -> dict[str, str] | None:
    try:
        return json.loads((folder / DOCUMENT).read_text(encoding="utf-8")).get("sha256")
    except (OSError, ValueError, AttributeError):
        return None


def _move(partial: Path, out: Path) -> None:
    """Puts what was made in its place; in a folder that is there, file by file."""
    if not out.exists():
        partial.replace(out)
        return
    files = [path for path in partial.rglob("*") if path.is_file()]
    for file in sorted(files, key=lambda path: path.name == DOCUMENT):  # last what says that all is there
        target = out / file.relative_to(partial)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)


def command(
    model: Annotated[
        str,
        typer.Argument(help="runs/NAME of a prior, of a VAE or of a tokenizer; a pipeline folder, or a hub id."),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    onnx: Annotated[bool, typer.Option("--onnx", help="Also encoder and decoder as ONNX.")] = False,
    torch_export: Annotated[
        bool, typer.Option("--torch-export", help="Also encoder and decoder by torch.export.")
    ] = False,
    license: Annotated[str | None, typer.Option(help="Of the weights, by its id on the hub, such as mit.")] = None,
    data_license: Annotated[str | None, typer.Option(help="Of the pictures it was trained on, in words.")] = None,
    push: Annotated[str | None, typer.Option(help="owner/name on the Hugging Face hub, to upload to.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make it a private one.")] = False,
    tokenizer: Annotated[str | None, typer.Option(help="runs/TOKENIZER, where it has moved.")] = None,
) -> None:
    """Write a model as a folder to share, and as ONNX and torch.export programs."""
    share_cores()
    formats: list[Format] = [form for form, asked in zip(FORMATS, (onnx, torch_export), strict=True) if asked]
    if onnx:
        check_libraries()
    if private and not push:
        raise InputError("--private: is of --push owner/name; give both, or leave it out")
    fields = CardFields(license, data_license, where=push or out.absolute().name)
    saved = SavedModel.find(model)
    alone = Autoencoder.from_pretrained(model) if saved.kind == "tokenizer" else None
    if alone and not alone.variational:
        if push:
            raise InputError(f"--push {push}: {model} is a tokenizer, which is no pipeline to share; leave it out")
        sentences = export_tokenizer(alone, out, formats)
        print(f"{out}: the encoder and the decoder; this model has no images of its own to make")
    else:
        pipeline = TwoStagePipeline.from_saved(saved, tokenizer)
        sentences = export_pipeline(pipeline, out, formats, fields, gather_records(saved, tokenizer))
        print(f"{out}: the pipeline, its model card in {CARD}")
    for sentence in sentences:
        print(f"  {sentence}")
    if push:
        print(push_folder(out, push, private))


if __name__ == "__main__":
    run_command(command)
