"""The options of commands that sample from a prior: :class:`SamplingConfig`, field by field."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from stage2_prior.sampling import SamplingConfig, Weights
from stage2_prior.shares import MaskSchedule
from twostage.core.config.sections import parse_config

__all__ = ["OPTIONS", "with_sampling_options"]


def _option(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel="Sampling")


OPTIONS: dict[str, Any] = {
    "temperature": Annotated[float, _option("Below 1 is safer, above 1 more varied.")],
    "top_k": Annotated[int | None, _option("Draw from the k most likely codes only.")],
    "top_p": Annotated[float | None, _option("Draw from the likeliest codes with this share only.")],
    "guidance_scale": Annotated[float, _option("Above 1 presses for the class.")],
    "guidance_schedule": Annotated[
        Literal["constant", "linear", "cosine"],
        _option("How guidance grows from an image's first codes to its last."),
    ],
    "num_steps": Annotated[int | None, _option("Parallel steps of a masked transformer; 8 by default.")],
    "mask_schedule": Annotated[
        MaskSchedule | None, _option("What share stays masked after each step; as trained by default.")
    ],
    "choice_temperature": Annotated[
        float | None,
        _option("How much chance decides which codes of a masked transformer's step stay; 4.5 by default."),
    ],
    "weights": Annotated[Weights, _option("Of a transformer on a CPU: coarser weights are faster.")],
}
"""By field of :class:`SamplingConfig`."""


def with_sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """``command``, whose parameter ``sampling`` is given by an option for each field of it.

    Raises:
        InputError: when it is called, settings that cannot be (all of them are listed).
    """
    # Keywords all of them: what has no default may then stand behind what has one.
    keyword, fields = inspect.Parameter.KEYWORD_ONLY, SamplingConfig.model_fields
    options = [
        inspect.Parameter(name, keyword, default=fields[name].default, annotation=annotation)
        for name, annotation in OPTIONS.items()
    ]
    signature = inspect.signature(command)
    parameters = [
        taken
        for name, parameter in signature.parameters.items()
        for taken in (options if name == "sampling" else [parameter.replace(kind=keyword)])
    ]

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        chosen = {field: given.pop(field) for field in OPTIONS}
        command(**given, sampling=parse_config(SamplingConfig, chosen, "the sampling options"))

    with_options.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return with_options
