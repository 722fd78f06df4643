"""Captions, vectors and maps beside the codes: which settings apply, and whether every image has what it needs."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.saved.stored_paths import portable
from stage2_prior.codes import Augmentation, MapForm
from twostage.core.config.overrides import apply_overrides
from twostage.core.config.sections import Section, parse_config
from twostage.core.data.captions import sided_captions
from twostage.core.data.data_config import DataConfig
from twostage.core.data.image_data import ImageData
from twostage.core.errors import InputError
from twostage.core.wording import some_of

__all__ = ["CONDITION_KEYS", "check_captions", "condition_settings", "map_form", "mirrored_words", "with_settings"]

CONDITION_KEYS = ("caption_column", "on_missing_caption", "vector_column", "maps", "map_kind")
"""The `data` settings that change what lies beside the codes, but not the codes."""
_ROWS_AT_ONCE = 4096


class _Settings(Section):
    data: DataConfig


def with_settings(data: DataConfig, overrides: list[str]) -> DataConfig:
    """``data`` with `data.KEY=VALUE` settings for :data:`CONDITION_KEYS`.

    Raises:
        InputError: another key, or a wrong value.
    """
    allowed = [f"data.{key}" for key in CONDITION_KEYS]
    for override in overrides:
        if override.partition("=")[0].strip() not in allowed:
            raise InputError(
                f"override {override!r}: expected one of {', '.join(allowed)}; the other settings are the tokenizer's. "
                "Remove it"
            )
    document: dict[str, Any] = {"data": data.model_dump(mode="json")}
    document = apply_overrides(_Settings, document, overrides, lambda line: None)
    return parse_config(_Settings, document, "the settings").data


def condition_settings(data: DataConfig, final: Path) -> dict[str, str | None]:
    """The settings as the code cache ``final`` stores them."""
    settings = {key: getattr(data, key) for key in CONDITION_KEYS}
    if data.maps is not None and Path(data.maps).is_dir():
        settings["maps"] = portable(data.maps, final)
    if data.vector_file:
        settings["vector_column"] = portable(data.vector_file, final)
    return settings


def check_captions(data: ImageData, config: DataConfig) -> None:
    """Check that all images have a caption, if any has one, and all captions an image.

    Raises:
        InputError: some have none, and `data.on_missing_caption` is `error`.
    """
    if config.on_missing_caption != "error":
        return
    if data.unmatched_captions:
        count = len(data.unmatched_captions)
        raise InputError(
            f"data.source {config.source}: {count:,} caption{'s' * (count > 1)} without an image: "
            f"{some_of(data.unmatched_captions)}. Rename or remove them, or set data.on_missing_caption=skip to ignore "
            "them, or data.caption_column=null to encode without captions"
        )
    missing = []
    for split in data.splits.values():
        rows = [row for row, texts in enumerate(split.captions or []) if not texts]
        missing += split.names(torch.tensor(rows, dtype=torch.long))
    if missing:
        total = sum(map(len, data.splits.values()))
        raise InputError(
            f"data.source {config.source}: {len(missing):,} of {total:,} images have no caption: {some_of(missing)}. "
            "Add captions, or set data.on_missing_caption=skip to skip these images, data.on_missing_caption=empty for "
            "empty captions, or data.caption_column=null to encode without captions"
        )


def mirrored_words(data: ImageData, augmentation: Augmentation) -> list[str]:
    """A notice if training images are mirrored whose captions say left or right."""
    notice = sided_captions(data.splits["train"].captions or []) if augmentation.horizontal_flip else ""
    return [f"{notice}; to avoid that, encode without --horizontal-flip"] if notice else []


def map_form(data: ImageData, stored: dict[str, np.memmap | None]) -> MapForm | None:
    """What the maps are; ``stored`` are those of each split."""
    train, maps = data.splits["train"], stored["train"]
    if maps is None:
        return None
    if train.map_channels is not None:
        return MapForm(kind="image", channels=train.map_channels, classes=None)
    seen: set[int] = set()
    for start in range(0, len(maps), _ROWS_AT_ONCE):
        seen |= set(np.unique(maps[start : start + _ROWS_AT_ONCE]).tolist())
    return MapForm(kind="labels", channels=None, classes=sorted(seen))
