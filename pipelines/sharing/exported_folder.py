"""The folder that `twostage export` writes: a pipeline with its model card, and programs that run without twostage."""

import json
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.saved.model_card import CardFields, is_as_written
from pipelines.saved.pipeline_folder import DOCUMENT, StoredWeights, is_pipeline_folder, write_rounded_tokenizer
from pipelines.sharing.exported_programs import FORMATS, Format, export_programs
from stage1_tokenizer.autoencoder import Autoencoder
from twostage.core.errors import InputError

__all__ = ["export_pipeline", "export_tokenizer"]

CARD, NEW_CARD = "README.md", "README.new.md"


def export_pipeline(
    pipeline: TwoStagePipeline,
    out: Path,
    formats: Sequence[Format],
    fields: CardFields,
    records: dict[str, bytes],
    weights: StoredWeights = "float32",
) -> list[str]:
    """Write a pipeline folder with a model card, and the tokenizer's programs in ``formats``, into ``out``.

    If ``out`` contains the same pipeline already, it is replaced, but a README.md that somebody changed is kept. After
    a failure, ``out`` is as it was before.

    Args:
        weights: their precision in the folder; programs and card are made with these weights.

    Returns:
        A sentence about each program, and about a README.md that was kept.

    Raises:
        InputError: ``out`` contains something else, or a program does not compute what it should.
    """
    is_empty = out.is_dir() and not any(out.iterdir())
    if out.exists() and not is_pipeline_folder(out) and not is_empty:
        raise InputError(f"--out {out}: exists but is not a pipeline. Nothing was changed. Choose another --out.")
    with _beside(out) as partial:
        pipeline.save_pretrained(partial, weights)
        pipeline = TwoStagePipeline.from_pretrained(partial)  # as others will load it
        if is_pipeline_folder(out) and _weights(out) != _weights(partial):
            raise InputError(
                f"--out {out}: contains another pipeline, or this one with other --weights. Nothing was changed. "
                "Choose another --out."
            )
        sentences = export_programs(pipeline.tokenizer, partial, formats)
        pipeline.write_card(partial, records, fields, weights)
        card = out / CARD
        if card.is_file() and not is_as_written(card.read_text(encoding="utf-8")):
            (partial / CARD).replace(partial / NEW_CARD)
            sentences.append(f"{CARD} was changed by hand and is kept; the new one is {NEW_CARD}")
    return sentences


def export_tokenizer(
    model: Autoencoder, out: Path, formats: Sequence[Format], weights: StoredWeights = "float32"
) -> list[str]:
    """Write the programs of a tokenizer that cannot generate images by itself; returns a sentence about each.

    Args:
        weights: with bfloat16, the tokenizer is rounded first, and its model folder is written as well.

    Raises:
        InputError: nothing to write, ``out`` contains something else, or a program does not compute what it should.
    """
    if not formats and weights == "float32":
        raise InputError(
            f"a tokenizer with the bottleneck {model.config.model.bottleneck.type!r} cannot generate images by itself, "
            "so it is not a pipeline. Give the run of a prior, or export only its encoder and decoder with --onnx or "
            "--torch-export. For a rounded tokenizer to train a prior on, give --weights bfloat16."
        )
    if out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - set(FORMATS)):
        raise InputError(f"--out {out}: contains other files. Nothing was changed. Choose another --out.")
    with _beside(out) as partial:
        sentences = []
        if weights == "bfloat16":
            write_rounded_tokenizer(partial, model)
            encode = shlex.join(["twostage", "encode", str(out)])
            sentences = [f"tokenizer {model.content_hash()[:12]} with rounded weights; next: {encode} --data SOURCE"]
        return sentences + export_programs(model, partial, formats)


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A new folder beside ``out``, moved there after the block; removed after an error."""
    partial = out.absolute().with_name(f".{out.absolute().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a call that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        if not out.exists():
            partial.replace(out)
            return
        files = [path for path in partial.rglob("*") if path.is_file()]
        for file in sorted(files, key=lambda path: path.name == DOCUMENT):  # last: it marks the folder as complete
            target = out / file.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _weights(folder: Path) -> dict[str, str] | None:
    """The sha256 of the weights; the same config may be written in another way by another version."""
    try:
        hashes = json.loads((folder / DOCUMENT).read_text(encoding="utf-8"))["sha256"]
        return {name: value for name, value in hashes.items() if name.endswith(".safetensors")}
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return None
