"""Writes what a network or a tokenizer makes of each image of a dataset: features, latents or codes.

twostage embed SOURCE --features imagenet|runs/NAME [--out embeddings/SOURCE.npz]
twostage embed SOURCE --latents runs/NAME --out latents.parquet
twostage embed SOURCE --codes runs/NAME --out codes.npz
"""

from pathlib import Path
from typing import Annotated

import typer

from twostage.core.errors import InputError
from twostage.core.machine.command import run_command
from twostage.core.options import LabelColumnOption, ValueRangeOption

__all__ = ["command"]


def command(
    source: Annotated[
        str, typer.Argument(help="A folder, table, archive or array, $TWOSTAGE_DATA/NAME, or owner/name.")
    ],
    features: Annotated[
        str | None, typer.Option(help="A vector of features: imagenet, or runs/NAME of train-features.")
    ] = None,
    latents: Annotated[
        str | None, typer.Option(help="The latents of runs/NAME, an autoencoder; of a VAE, the means.")
    ] = None,
    codes: Annotated[str | None, typer.Option(help="The codes of runs/NAME, a tokenizer.")] = None,
    out: Annotated[Path | None, typer.Option(help="A .npz or .parquet file; embeddings/SOURCE.npz by default.")] = None,
    label_column: LabelColumnOption = "auto",
    value_range: ValueRangeOption = None,
) -> None:
    """Write what a network makes of each image: features, latents or codes, with names and labels. A prior can be
    conditioned on features."""
    from pipelines.evaluation.embeddings import codes_of, embed, features_of, latents_of
    from pipelines.evaluation.judges import open_judge
    from stage1_tokenizer.autoencoder import Autoencoder
    from twostage.core.data.vectors import VECTOR_FILE
    from twostage.core.machine.processes import share_cores

    given = {"--features": features, "--latents": latents, "--codes": codes}
    if sum(value is not None for value in given.values()) != 1:
        shown = " ".join(f"{option} {value}" for option, value in given.items() if value) or "none"
        raise InputError(f"{', '.join(given)}: expected exactly one of them, got {shown}")
    share_cores()
    out = out or Path("embeddings") / f"{Path(source).name}{VECTOR_FILE}"
    if features:
        network = open_judge(None, features, channels=1)  # its images are read with its own channels
        assert network is not None
        embedder = features_of(network)
    elif latents:
        embedder = latents_of(Autoencoder.from_pretrained(latents))
    else:
        embedder = codes_of(Autoencoder.from_pretrained(codes or ""))
    settings = {"value_range": value_range} if value_range else {}
    column = None if label_column == "null" else label_column
    count, shape = embed(source, embedder, out, label_column=column, **settings)
    use = f"; to use them: twostage encode runs/NAME data.vector_column={out}"
    numbers = "x".join(map(str, shape))
    print(
        f"{out}: {count:,} {embedder.name} of {numbers} numbers{use if features and out.suffix == VECTOR_FILE else ''}"
    )


if __name__ == "__main__":
    run_command(command)
