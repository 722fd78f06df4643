"""Command-line options that several commands share. It loads no torch, so that `--help` is instant."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "DryRunOption",
    "JsonOption",
    "LabelColumnOption",
    "OverridesArgument",
    "ShownChannelsOption",
    "TimeLimitOption",
    "ValueRangeOption",
    "WeightsDirOption",
]

OverridesArgument = Annotated[
    list[str] | None, typer.Argument(help="Settings as key=value, for example train.lr=1e-4.")
]
WeightsDirOption = Annotated[
    Path | None, typer.Option(help="The folder that holds vgg16-397923af.pth for LPIPS; by default torch's cache.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Measure FLOPs, memory and time of a few steps, and write nothing.")
]
TimeLimitOption = Annotated[
    float | None,
    typer.Option(
        "--time-limit",
        min=0,
        metavar="MINUTES",
        help="Save and exit with status 75 after this many minutes. Run the same command again to resume.",
    ),
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write what --dry-run measures to this file.")]
LabelColumnOption = Annotated[
    str,
    typer.Option(help="The table column that holds the classes. auto finds it by its name; null ignores the classes."),
]
ShownChannelsOption = Annotated[
    str | None, typer.Option(help="The channels on the sheet: one as grey, or 3,1,0 for red, green and blue.")
]
ValueRangeOption = Annotated[
    tuple[float, float] | None,
    typer.Option(metavar="BLACK WHITE", help="The values in the files that become black and white, such as 0 4095."),
]
