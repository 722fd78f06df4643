"""Writes a vector for each image of a dataset: the features of a network.

twostage embed SOURCE --features imagenet|runs/NAME [--out embeddings/SOURCE.npz]
"""

from pathlib import Path
from typing import Annotated

import typer

from twostage.core.machine.command import run_command
from twostage.core.options import LabelColumnOption, ValueRangeOption

__all__ = ["command"]


def command(
    source: Annotated[str, typer.Argument(help="A folder, a parquet file, $TWOSTAGE_DATA/NAME, or owner/name.")],
    features: Annotated[str, typer.Option(help="imagenet, or runs/NAME of a feature network (train-features).")],
    out: Annotated[Path | None, typer.Option(help="The .npz file; embeddings/SOURCE.npz by default.")] = None,
    label_column: LabelColumnOption = "auto",
    value_range: ValueRangeOption = None,
) -> None:
    """Write a vector for each image of a dataset: the features of a network. A prior can be conditioned on them."""
    from pipelines.evaluation.embeddings import embed
    from pipelines.evaluation.judges import open_judge
    from twostage.core.data.vectors import VECTOR_FILE
    from twostage.core.machine.processes import share_cores

    share_cores()
    out = out or Path("embeddings") / f"{Path(source).name}{VECTOR_FILE}"
    network = open_judge(None, features, channels=1)  # its images are read with its own channels
    assert network is not None
    column = None if label_column == "null" else label_column
    count, length = embed(source, network, out, label_column=column, value_range=value_range)
    print(
        f"{out}: {count:,} vectors of {length} numbers; to use them: twostage encode runs/NAME data.vector_column={out}"
    )


if __name__ == "__main__":
    run_command(command)
