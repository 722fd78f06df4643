"""What a data source holds, as text, as JSON and as a contact sheet of the images that a model would see."""

import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images
from twostage.core.data.image_data import ImageData, ImageSplit
from twostage.core.data.spread import spread, spread_over_classes
from twostage.core.images.conversion import to_shown
from twostage.core.images.fonts import class_labels
from twostage.core.images.map_colours import coloured_classes
from twostage.core.images.sheets import contact_sheet, save_image
from twostage.core.wording import short_repr, some_of

__all__ = ["inspect_data", "inspection_document"]

NUM_SHOWN = 40
MAX_NAMED = 20
NUM_EXAMPLES = 3
_ROWS_AT_ONCE = 1024


def inspect_data(config: DataConfig, out: Path) -> ImageData:
    """Print what the source holds and every unreadable file, and save a contact sheet as ``out``."""
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
    for line in [*_captions(data), *_vectors_and_maps(data)]:
        print(f"  {line}")
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
    bits = data.splits["train"].bits
    form = f"data.image_size=[{height}, {width}] data.channels={config.channels}" + f", {bits} bits" * (bits != 8)
    print(f"{out}: the images with {form}")
    return data


def _captions(data: ImageData) -> list[str]:
    """How many images have captions, how long these are, some examples, and what is missing."""
    texts, missing, total = [], [], 0
    for split in data.splits.values():
        for row, captions in enumerate(split.captions or []):
            total += 1
            texts += captions
            missing += [] if captions else split.names(torch.tensor([row]))
    lines = []
    if texts:
        words = [re.findall(r"\w+", text.casefold()) for text in texts]
        lengths, different = [len(found) for found in words], {word for found in words for word in found}
        lines.append(
            f"captions: {total - len(missing):,} of {total:,} images have one; {statistics.median_low(lengths)} words "
            f"in the median, {max(lengths)} in the longest; {len(different):,} different words"
        )
        lines += [f"  {short_repr(texts[i])}" for i in spread(len(texts), NUM_EXAMPLES).tolist()]
    if missing:
        lines.append(f"images without a caption: {some_of(missing)}")
    if data.unmatched_captions:
        lines.append(f"captions that belong to no image: {some_of(data.unmatched_captions)}")
    return lines


def _vectors_and_maps(data: ImageData) -> list[str]:
    train, lines = data.splits["train"], []
    if train.vectors is not None:
        lines.append(f"vectors: {train.vectors.shape[1]} numbers for each image")
    if train.map_form is not None:
        total = sum(map(len, data.splits.values()))
        kind = f"with {train.map_channels} channel{'s' * (train.map_channels != 1)}"
        if train.map_channels is None:
            seen = sorted(set().union(*map(_classes_in_maps, data.splits.values())))
            kind = f"of {len(seen)} class{'es' * (len(seen) != 1)} ({some_of(seen, MAX_NAMED)})"
        lines.append(f"maps: {total:,} {kind}")
    return lines


def _classes_in_maps(split: ImageSplit) -> set[int]:
    found: set[int] = set()
    for rows in torch.arange(len(split)).split(_ROWS_AT_ONCE):
        maps = split.read_maps(rows)
        found |= set() if maps is None else set(maps.unique().tolist())
    return found


def _sheet(data: ImageData) -> Image.Image:
    train = data.splits["train"]
    shown = NUM_SHOWN if train.map_form is None else NUM_SHOWN // 2
    rows = spread_over_classes(train.labels, len(train), shown)
    labels, names = train.read_labels(rows), class_labels(data.class_names or [])
    below = None if labels is None or not names else [names[i] for i in labels.tolist()]
    if below is None and train.captions is not None:
        below = [next(iter(train.captions[row]), "") for row in rows.tolist()]
    images, maps = to_shown(train.read(rows), train.config.shown_channels), train.read_maps(rows)
    if maps is not None:
        images = torch.cat([_as_rgba(images), _as_rgba(coloured_classes(maps) if maps.dim() == 3 else maps)], dim=-1)
    return contact_sheet(images, min(8, len(rows)), below)


def _as_rgba(images: torch.Tensor) -> torch.Tensor:
    """Images with 1, 3 or 4 channels as (B, 4, H, W)."""
    colours = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]
    alpha = images[:, 3:] if images.shape[1] == 4 else torch.full_like(images[:, :1], 255)
    return torch.cat([colours, alpha], dim=1)


def inspection_document(data: ImageData) -> dict[str, Any]:
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
        "captions": {name: split.captions for name, split in data.splits.items() if split.captions},
        "captions_without_image": data.unmatched_captions,
        "bits": data.splits["train"].bits,
        "values": {kind: vars(used) for kind, used in data.values.items()},
        "untrained_classes": data.untrained_classes,
        "notices": data.notices,
    }


def _most_common(counter: Counter[str]) -> str:
    return some_of(f"{name} ({count:,})" for name, count in counter.most_common()) or "as requested"
