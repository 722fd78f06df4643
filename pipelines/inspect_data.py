"""Show what a data source holds, as text and as a contact sheet of the images that a model would see."""

import shlex
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image

from pipelines.recipes.fitting_config import describe_survey
from pipelines.recipes.recipe import recipe_for, training_size
from twostage.core.config.sections import parse_config
from twostage.core.data.dataset import DataConfig, ImageData, LabelColumnOption, ValueRangeOption, load_images
from twostage.core.data.records import AUTO
from twostage.core.data.spread import spread_over_classes
from twostage.core.data.survey import survey
from twostage.core.files import write_json
from twostage.core.images.fonts import class_labels
from twostage.core.images.sheets import contact_sheet, save_image
from twostage.core.machine.command import run_command
from twostage.core.wording import some_of

__all__ = ["inspect_data"]

NUM_SHOWN = 40
MAX_NAMED = 20


def inspect_data(config: DataConfig, out: Path) -> ImageData:
    """Print splits, classes, sizes, modes and every unreadable file, and save a contact sheet as ``out``."""
    data = load_images(config.model_copy(update={"on_bad_image": "skip"}))
    print(data.description)
    for name, split in data.splits.items():
        print(f"  {name}: {len(split):,} images")
        if split.labels is not None and data.class_names:
            counts = torch.bincount(split.labels, minlength=len(data.class_names)).tolist()
            named = [f"{c} {n:,}" for c, n in zip(data.class_names, counts, strict=True)]
            print(f"    classes: {some_of(named, MAX_NAMED)}")
        elif data.class_names:
            print("    no labels")
    print(f"  sizes (width x height): {_most_common(data.sizes)}")
    print(f"  modes: {_most_common(data.modes)}")
    for kind, used in data.values.items():
        low, high = config.value_range or used.type_range
        found = f"{kind}, {used.low:g} to {used.high:g} in {used.images:,} images"
        print(f"  values: {found}; {low:g} becomes black, {high:g} white")
    for line in data.notices:
        print(f"  {line}")
    for kind, names in {"unreadable": data.bad, "skipped": data.skipped}.items():
        for name in names[:MAX_NAMED]:
            print(f"  {kind}: {name}")
        if len(names) > MAX_NAMED:
            print(f"  {kind}: {len(names) - MAX_NAMED:,} more (use --json FILE to list all)")
    save_image(_sheet(data), out)
    height, width = config.size
    print(f"{out}: the images with data.image_size=[{height}, {width}] data.channels={config.channels}")
    return data


def _sheet(data: ImageData) -> Image.Image:
    train = data.splits["train"]
    rows = spread_over_classes(train.labels, len(train), NUM_SHOWN)
    labels, names = train.read_labels(rows), class_labels(data.class_names or [])
    captions = None if labels is None or not names else [names[i] for i in labels.tolist()]
    return contact_sheet(train.read(rows), min(8, len(rows)), captions)


def _document(data: ImageData) -> dict[str, Any]:
    """Everything as JSON: each file is in a split, or skipped with a reason."""
    used = {name: split.names(torch.arange(len(split))) for name, split in data.splits.items()}
    skipped = data.bad + data.skipped
    return {
        "description": data.description,
        "files": sum(map(len, used.values())) + len(skipped),
        "used": used,
        "skipped": skipped,
        "class_names": data.class_names,
        "sizes": dict(data.sizes),
        "modes": dict(data.modes),
        "values": {kind: vars(used) for kind, used in data.values.items()},
        "untrained_classes": data.untrained_classes,
        "notices": data.notices,
    }


def _as_setting(size: tuple[int, int]) -> str:
    height, width = size
    return str(height) if height == width else f"[{height},{width}]"


def _most_common(counter: Counter[str]) -> str:
    return some_of(f"{name} ({count:,})" for name, count in counter.most_common()) or "as requested"


def command(
    data: Annotated[
        str,
        typer.Argument(help="shapes, captioned_shapes, a folder, a parquet file, $TWOSTAGE_DATA/NAME, or owner/name."),
    ],
    image_size: Annotated[int | None, typer.Option(min=1, help="Size in pixels; by default the suggested one.")] = None,
    channels: Annotated[int | None, typer.Option(help="1 (grey), 3 or 4; by default as in the images.")] = None,
    label_column: LabelColumnOption = AUTO,
    value_range: ValueRangeOption = None,
    out: Annotated[Path, typer.Option(help="Where to save the contact sheet.")] = Path("inspect.png"),
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Also write a JSON file that lists every used and every skipped file."),
    ] = None,
) -> None:
    """Show what a data source holds: splits, classes, sizes, modes, unreadable files. Suggest a config for it, and save
    a contact sheet."""
    column = None if label_column == "null" else label_column
    usual = survey(data, column)
    size = training_size(usual)
    document = {
        "source": data,
        "image_size": image_size or list(size),
        "channels": channels or usual.channels,
        "label_column": column,
        "value_range": value_range,
    }
    found = inspect_data(parse_config(DataConfig, document, "the options"), out)
    recipe = recipe_for(data, size, usual.channels)
    print(f"suggested for {describe_survey(usual)}:")
    print(f"  data.image_size={_as_setting(size)} data.channels={usual.channels}, configs/tokenizer/{recipe.tokenizer}")
    given = [] if label_column == AUTO else [f"data.label_column={label_column}"]
    given += [f"data.value_range={list(value_range)}"] if value_range else []
    print(f"  to write such a config and train by it: {shlex.join(['twostage', 'train-tokenizer', data, *given])}")
    if json_file:
        write_json(json_file, _document(found))


if __name__ == "__main__":
    run_command(command)
