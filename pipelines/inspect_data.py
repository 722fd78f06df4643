"""Show what a data source holds, as text and as a contact sheet of the images that a model would see."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from twostage.core.files import write_json
from twostage.core.machine.command import run_command
from twostage.core.options import LabelColumnOption, ShownChannelsOption, ValueRangeOption

if TYPE_CHECKING:
    from twostage.core.data.survey import Survey

__all__ = ["command"]


def command(
    data: Annotated[
        str,
        typer.Argument(help="shapes, captioned_shapes, a folder, table, archive or array, a NAME, or owner/name."),
    ],
    image_size: Annotated[int | None, typer.Option(min=1, help="Size in pixels; by default the suggested one.")] = None,
    channels: Annotated[int | None, typer.Option(help="1 (grey), 3 (RGB) ...; by default as in the images.")] = None,
    shown_channels: ShownChannelsOption = None,
    label_column: LabelColumnOption = "auto",
    value_range: ValueRangeOption = None,
    caption_column: Annotated[
        str, typer.Option(help="The column with the captions. auto finds it by its name; null ignores captions.")
    ] = "auto",
    vector_column: Annotated[str | None, typer.Option(help="The column with a vector for each image.")] = None,
    maps: Annotated[
        str | None, typer.Option(help="A map for each image: another image column, or a folder with the same names.")
    ] = None,
    map_kind: Annotated[
        Literal["labels", "image"],
        typer.Option(help="labels: the grey values or palette indices of maps are classes; image: colours."),
    ] = "labels",
    out: Annotated[Path, typer.Option(help="Where to save the contact sheet.")] = Path("inspect.png"),
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Also write a JSON file that lists every used and every skipped file."),
    ] = None,
) -> None:
    """Show what a data source holds: splits, classes, sizes, modes, unreadable files. Suggest a config for it, and save
    a contact sheet."""
    from pipelines.recipes.data_inspection import inspect_data, inspection_document
    from pipelines.recipes.recipe import training_size
    from twostage.core.config.sections import parse_config
    from twostage.core.data.data_config import DataConfig
    from twostage.core.data.survey import survey

    column, captions = (None if name == "null" else name for name in (label_column, caption_column))
    usual = survey(data, column)
    size = training_size(usual)
    document = {
        "source": data,
        "image_size": image_size or list(size),
        "channels": channels or usual.channels,
        "shown_channels": _as_list(shown_channels),
        "label_column": column,
        "value_range": value_range,
        "caption_column": captions,
        "vector_column": vector_column,
        "maps": maps,
        "map_kind": map_kind,
    }
    found = inspect_data(parse_config(DataConfig, document, "the options"), out)
    shown = f"[{shown_channels}]" if shown_channels else None
    beside = {"label_column": (label_column, "auto"), "caption_column": (caption_column, "auto")}
    beside |= {"vector_column": (vector_column, None), "maps": (maps, None), "map_kind": (map_kind, "labels")}
    beside |= {"shown_channels": (shown, None), "value_range": (value_range and list(value_range), None)}
    print(_suggestion(usual, size, data, beside))
    if json_file:
        write_json(json_file, inspection_document(found))


def _suggestion(found: "Survey", size: tuple[int, int], data: str, beside: dict[str, tuple[Any, Any]]) -> str:
    """The config that suits a source.

    Args:
        beside: the given value and the default of each setting.
    """
    from pipelines.recipes.fitting_config import describe_survey
    from pipelines.recipes.recipe import recipe_for

    recipe = recipe_for(data, size, found.channels)
    given = [f"data.{key}={value}" for key, (value, default) in beside.items() if value != default]
    return (
        f"suggested for {describe_survey(found)}:\n"
        f"  data.image_size={_as_setting(size)} data.channels={found.channels}, configs/tokenizer/{recipe.tokenizer}\n"
        f"  to write such a config and train by it: {shlex.join(['twostage', 'train-tokenizer', data, *given])}"
    )


def _as_list(numbers: str | None) -> list[int | str] | None:
    """`3,1,0` as a list, with the texts that are no numbers as they are, for the message."""
    return None if numbers is None else [int(part) if part.strip().isdecimal() else part for part in numbers.split(",")]


def _as_setting(size: tuple[int, int]) -> str:
    height, width = size
    return str(height) if height == width else f"[{height},{width}]"


if __name__ == "__main__":
    run_command(command)
