"""Captions, vectors and maps beside the codes: which settings apply, and whether every image has what it needs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.saved.stored_paths import portable
from stage1_tokenizer.autoencoder import Autoencoder
from stage2_prior.codes import Augmentation
from twostage.core.conditions.map_form import MapCodes, MapForm
from twostage.core.config.overrides import apply_overrides
from twostage.core.config.sections import Section, parse_config
from twostage.core.data.captions import sided_captions
from twostage.core.data.data_config import DataConfig
from twostage.core.data.image_data import ImageData
from twostage.core.errors import InputError
from twostage.core.images.conversion import to_float
from twostage.core.images.map_colours import maps_as_images
from twostage.core.wording import some_of

__all__ = [
    "CONDITION_KEYS",
    "MapCoder",
    "check_captions",
    "condition_settings",
    "map_form",
    "mirrored_words",
    "open_with_codes",
    "with_settings",
]

CONDITION_KEYS = ("caption_column", "on_missing_caption", "vector_column", "maps", "map_kind", "map_names")
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


def condition_settings(data: DataConfig, final: Path) -> dict[str, str | list[str] | None]:
    """The settings as the code cache ``final`` stores them."""
    settings = {key: getattr(data, key) for key in CONDITION_KEYS}
    names = settings.pop("map_names")  # written only if there are any, because earlier versions do not know them
    settings |= {"map_names": list(names)} if names else {}
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


def map_form(data: ImageData, stored: dict[str, np.memmap | None], codes: MapCodes | None = None) -> MapForm | None:
    """What the maps are; ``stored`` are those of each split, or their ``codes``."""
    train, maps = data.splits["train"], stored["train"]
    if maps is None:
        return None
    if train.map_channels is not None:
        return MapForm(kind="image", channels=train.map_channels, classes=None, codes=codes)
    seen: set[int] = set()
    for start in range(0, len(train) if codes else len(maps), _ROWS_AT_ONCE):
        rows = torch.arange(start, min(start + _ROWS_AT_ONCE, len(train)))
        part = train.read_maps(rows) if codes else torch.from_numpy(maps[start : start + _ROWS_AT_ONCE].copy())
        seen |= set() if part is None else set(part.unique().tolist())
    return MapForm(kind="labels", channels=None, classes=sorted(seen), names=data.map_names, codes=codes)


@dataclass(frozen=True)
class MapCoder:
    """Turns the maps beside images into codes, by a tokenizer of their own."""

    model: Autoencoder
    about: MapCodes

    @classmethod
    def open(cls, tokenizer: str | Path, final: Path, size: tuple[int, int], device: torch.device) -> "MapCoder":
        """The tokenizer of maps with ``size`` (H, W), for the code cache ``final``.

        Raises:
            InputError: no tokenizer there, one without a grid of codes, or one for another size.
        """
        model = open_with_codes(tokenizer).to(device)
        if model.config.image_size != size:
            (height, width), (found_height, found_width) = size, model.config.image_size
            raise InputError(
                f"--map-tokenizer {tokenizer}: takes maps of {found_height}x{found_width} pixels, but the images have "
                f"{height}x{width}. Train it with data.image_size=[{height}, {width}]"
            )
        if model.bottleneck.scales:
            raise InputError(
                f"--map-tokenizer {tokenizer}: writes codes of several scales, expected one grid. Train one with "
                "another model.bottleneck, such as vector"
            )
        assert model.codebook_size
        hash, path = model.content_hash(), portable(tokenizer, final)
        return cls(model, MapCodes(hash=hash, path=path, grid=model.code_grid, codebook_size=model.codebook_size))

    def encode(self, maps: Tensor) -> Tensor:
        """Maps (B, H, W) or (B, C, H, W) uint8 -> codes (B, h, w) int64 on the CPU."""
        images = to_float(maps_as_images(maps, self.model.config.channels).to(self.model.device))
        return self.model.encode_indices(images).cpu()


def open_with_codes(tokenizer: str | Path) -> Autoencoder:
    """A tokenizer with codes.

    Raises:
        InputError: no tokenizer there, or one without codes.
    """
    model = Autoencoder.from_pretrained(tokenizer)
    if model.codebook_size is None:
        raise InputError(
            f"{tokenizer}: the bottleneck {model.config.model.bottleneck.type!r} has no codes. Train a tokenizer with "
            "vector, finite_scalar, lookup_free, residual or multi_scale."
        )
    return model
