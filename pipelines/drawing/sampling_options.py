"""The command-line options of `SamplingConfig`: one for each field, with the field's description as its help.
To add a setting, edit :mod:`stage2_prior.sampling`."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Union, get_origin

import typer

from stage2_prior.sampling_config import SamplingConfig
from twostage.core.config.schema import alternatives
from twostage.core.config.sections import parse_config

__all__ = ["with_sampling_options"]

KEYWORD = inspect.Parameter.KEYWORD_ONLY
"""All parameters become keywords, so that one without a default may follow one with a default."""


def with_sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """``command``, with its parameter ``sampling`` replaced by the options of `SamplingConfig`.

    Raises:
        InputError: when called with impossible settings (all of them are listed).
    """
    signature = inspect.signature(command)
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if name == "sampling":
            parameters += [_option(field) for field in SamplingConfig.model_fields]
        else:
            parameters.append(parameter.replace(kind=KEYWORD))

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        chosen = {field: given.pop(field) for field in SamplingConfig.model_fields}
        command(**given, sampling=parse_config(SamplingConfig, chosen, "the sampling options"))

    with_options.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return with_options


def _option(name: str) -> inspect.Parameter:
    """The parameter from which typer makes the option of a field; its range is checked by `SamplingConfig`."""
    field = SamplingConfig.model_fields[name]
    kinds, default = alternatives(field.annotation), field.default
    if any(get_origin(kind) is dict for kind in kinds):  # a number, or a number for each of several names
        kinds, default = [str], f"{default:g}"
    kind = Union[tuple(kinds)]  # noqa: UP007 - of types that are only known here
    annotation = Annotated[kind, typer.Option(help=field.description, rich_help_panel="Sampling")]
    return inspect.Parameter(name, KEYWORD, default=default, annotation=annotation)
