"""The options of commands that sample from a prior: :class:`SamplingConfig`, field by field."""

from typing import Annotated, Any, Literal

import typer

from core.config import parse_config
from stage2_prior.sampling import SamplingConfig, Weights
from stage2_prior.shares import MaskSchedule

__all__ = [
    "ChoiceTemperature",
    "GuidanceScale",
    "GuidanceSchedule",
    "MaskedShares",
    "NumSteps",
    "RoundedWeights",
    "Temperature",
    "TopK",
    "TopP",
    "sampling_config",
]

PANEL = "Sampling"

Temperature = Annotated[float, typer.Option(help="Below 1 is safer, above 1 more varied.", rich_help_panel=PANEL)]
TopK = Annotated[int | None, typer.Option(help="Draw from the k most likely codes only.", rich_help_panel=PANEL)]
TopP = Annotated[
    float | None, typer.Option(help="Draw from the likeliest codes with this share only.", rich_help_panel=PANEL)
]
GuidanceScale = Annotated[float, typer.Option(help="Above 1 presses for the class.", rich_help_panel=PANEL)]
GuidanceSchedule = Annotated[
    Literal["constant", "linear", "cosine"],
    typer.Option(help="How guidance grows from an image's first codes to its last.", rich_help_panel=PANEL),
]
NumSteps = Annotated[
    int | None, typer.Option(help="Parallel steps of a masked transformer; 8 by default.", rich_help_panel=PANEL)
]
MaskedShares = Annotated[
    MaskSchedule | None,
    typer.Option(help="What share stays masked after each step; as trained by default.", rich_help_panel=PANEL),
]
ChoiceTemperature = Annotated[
    float | None,
    typer.Option(
        help="How much chance decides which codes of a masked transformer's step stay; 4.5 by default.",
        rich_help_panel=PANEL,
    ),
]
RoundedWeights = Annotated[
    Weights,
    typer.Option(help="Of a transformer on a CPU: coarser weights are faster.", rich_help_panel=PANEL),
]


def sampling_config(**options: Any) -> SamplingConfig:
    """The settings that the options give.

    Raises:
        InputError: one that cannot be (all of them are listed).
    """
    return parse_config(SamplingConfig, options, "the sampling options")
