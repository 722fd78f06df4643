"""From `data.source` to the images of each split.

A dataset that fits ``in_memory_gb`` is decoded once into one array, uint8 or, if its files have more than 8 bits,
uint16. A larger one is checked once and then decoded on demand, in threads.
"""

from dataclasses import replace

import numpy as np
import torch

from twostage.core.data.captions import has_captions
from twostage.core.data.data_config import DataConfig
from twostage.core.data.decoded_cache import DecodedCache, decode_all
from twostage.core.data.decoding import Findings, probable_bits
from twostage.core.data.drawn_sources import DRAWN_SOURCES, draw_split, drawn_splits
from twostage.core.data.image_data import ImageData, ImageSplit, check_readable
from twostage.core.data.maps import decode_maps
from twostage.core.data.records import Source
from twostage.core.data.shapes import CLASS_NAMES
from twostage.core.data.sources import find_source
from twostage.core.data.vectors import add_vectors
from twostage.core.errors import InputError
from twostage.core.images.conversion import MODES, quiet_decoders
from twostage.core.images.pixel_values import HALVED, UsedValues, is_grey
from twostage.core.machine.memory import check_bytes
from twostage.core.wording import some_of

__all__ = ["load_images", "load_larger"]


def load_larger(data: ImageData, size: tuple[int, int]) -> ImageSplit:
    """The training images of ``data`` in the same order at another size (H, W), for cutting windows out of them.

    They come from their files again, because enlarged images would lack the detail of large ones. They are kept in
    memory if they fit into ``in_memory_gb`` beside those of ``data``. The notices of ``data`` get a sentence if the
    cache does not keep them.

    Raises:
        InputError: an image is no longer readable, or they do not fit in memory.
    """
    train = data.splits["train"]
    config = train.config.model_copy(update={"image_size": size})
    labels = None if train.labels is None else train.labels.numpy()
    if train.records is None:
        _check_memory(config, len(train))
        return _draw_images(config, "train", len(train))
    larger = ImageSplit(labels, None, train.records, config, map_channels=train.map_channels)
    plain_bytes = sum(split.pixels.nbytes for split in data.splits.values() if split.pixels is not None)
    in_memory = plain_bytes + len(train) * _bytes_each(config) <= config.in_memory_gb * 1e9
    _check_memory(config, len(train) if in_memory else 1)
    if in_memory:
        form, cache = (config.channels, *size), config.decoded_cache
        pixels, found = decode_all(train.records, form, config.value_range, in_memory, cache, bits=larger.bits)
        check_readable(train.records, found)
        larger.pixels = None if pixels is None else torch.from_numpy(pixels)
        data.notices += cache.notices
    return larger


def load_images(config: DataConfig) -> ImageData:
    """Open the source, decode or check every image, and make sure that a split is held out.

    Raises:
        InputError: the source is missing or ambiguous, images do not fit in memory, their value range is unknown, or an
            image (the message names it) is unreadable and ``on_bad_image`` is not `skip`.
    """
    data = _load_drawn(config) if config.source in DRAWN_SOURCES else _load_stored(config)
    if config.train_on == "maps":
        if data.splits["train"].map_form is None:
            raise InputError(
                f"data.train_on 'maps': data.source {config.source} has no maps. Set data.maps=COLUMN or "
                "data.maps=FOLDER"
            )
        data.splits["train"].read(torch.arange(1))  # refuses other channels
    return data


def _load_stored(config: DataConfig) -> ImageData:
    quiet_decoders()
    cache = config.decoded_cache
    source = find_source(config.source, config.columns)
    if config.vector_file:
        source.splits = add_vectors(source.splits, config.vector_file)
    _apply_caption_policy(source, config)
    _limit_and_hold_out(source, config)
    splits, bad, total = _decode(source, config, cache)
    _report_bad(bad, source, config)
    for name, split in splits.items():
        if not len(split):
            raise InputError(f"data.source {config.source}: expected readable images in `{name}`, got {some_of(bad)}")
    _add_maps(splits, config, splits["train"].in_memory, cache)
    notices = [*source.notices, *_value_notices(total.values, config), *_mode_notices(total, splits["train"])]
    notices += cache.notices
    if total.animated:
        notices.append(f"{total.animated} images have several frames; only the first is used")
    data = ImageData(
        source.description,
        splits,
        source.class_names,
        notices,
        source.skipped,
        source.unmatched_captions,
        bad,
        total.modes,
        total.sizes,
        total.values,
    )
    if untrained := data.untrained_classes:
        data.notices.append(
            f"{len(untrained)} of {len(source.class_names or [])} classes have no training images, so no model learns "
            f"them: {some_of(untrained)}"
        )
    return data


def _decode(
    source: Source, config: DataConfig, cache: DecodedCache
) -> tuple[dict[str, ImageSplit], list[str], Findings]:
    """The readable images of each split, the others with the reason, and what was found.

    Whether the images need 16 bits is known when all are decoded, so a wrong guess costs time.
    """
    if config.bits is None:
        guess = probable_bits(source.splits.values(), config.channels, config.value_range)
        decoded = _decode(source, config.model_copy(update={"bits": guess}), cache)
        if (needed := decoded[2].bits) == guess:
            return decoded
        return _decode(source, config.model_copy(update={"bits": needed}), cache)
    count = sum(map(len, source.splits.values()))
    in_memory = count * _bytes_each(config) <= config.in_memory_gb * 1e9
    _check_memory(config, count if in_memory else 1)
    splits, bad, total, form = {}, [], Findings(), (config.channels, *config.size)
    for name, records in source.splits.items():
        pixels, found = decode_all(records, form, config.value_range, in_memory, cache, bits=config.bits)
        bad += [f"{records.names[row]} ({reason})" for row, reason in found.bad.items()]
        total.add(found)
        if found.bad:
            good = np.array([row for row in range(len(records)) if row not in found.bad], dtype=np.int64)
            records, pixels = records.take(good), None if pixels is None else pixels[good]
        splits[name] = ImageSplit(
            records.labels, pixels, records, config, captions=records.captions, vectors=records.vectors
        )
    return splits, bad, total


def _add_maps(splits: dict[str, ImageSplit], config: DataConfig, in_memory: bool, cache: DecodedCache) -> None:
    records = {name: split.records.maps for name, split in splits.items() if split.records and split.records.maps}
    if records:
        maps, channels = decode_maps(records, config.map_kind, config.size, in_memory, cache)
        for name, found in maps.items():
            splits[name].maps = None if found is None else torch.from_numpy(found)
            splits[name].map_channels = channels


def _bytes_each(config: DataConfig) -> int:
    map_channels = 0 if config.maps is None else 1 if config.map_kind == "labels" else 3
    return (config.channels * (config.bits or 8) // 8 + map_channels) * config.size[0] * config.size[1]


def _check_memory(config: DataConfig, count: int) -> None:
    settings = [f"data.image_size {config.image_size}", f"data.num_images {config.num_images}"]
    if config.source not in DRAWN_SOURCES:
        settings.append(f"data.in_memory_gb {config.in_memory_gb:g}")
    check_bytes(count * _bytes_each(config), f"{count:,} images", settings, torch.device("cpu"))


def _load_drawn(config: DataConfig) -> ImageData:
    """The splits of one of `DRAWN_SOURCES`.

    Raises:
        InputError: a setting does not apply to it.
    """
    for name in ("label_column", "caption_column", "vector_column", "maps", "value_range"):
        if (given := getattr(config, name)) != DataConfig.model_fields[name].default:
            raise InputError(
                f"data.{name} {given!r}: does not apply to data.source={config.source}. Remove data.{name}"
            )
    if config.source == "captioned_shapes" and config.channels == 1:
        raise InputError(
            "data.channels 1: expected 3 or 4 for data.source=captioned_shapes, whose captions name colours. Set "
            "data.channels=3, or data.source=shapes"
        )
    if config.channels not in MODES or config.bits == 16:
        key, given, expected = ("bits", 16, "8") if config.bits == 16 else ("channels", config.channels, "1, 3 or 4")
        raise InputError(
            f"data.{key} {given}: expected {expected} for data.source={config.source}, whose images twostage draws. "
            f"Remove data.{key}"
        )
    config = config.model_copy(update={"bits": 8})
    counts = drawn_splits(config.source, config.num_images)
    _check_memory(config, sum(counts.values()))
    splits = {name: _draw_images(config, name, count) for name, count in counts.items()}
    found = f"{counts['train']} images for training, {counts['test']} held out"
    if "unseen" in counts:
        found += f", {counts['unseen']} held out with unseen combinations of colour and shape"
    return ImageData(f"{config.source}: {len(CLASS_NAMES)} classes, {found}", splits, list(CLASS_NAMES))


def _draw_images(config: DataConfig, split: str, count: int) -> ImageSplit:
    drawn = draw_split(config.source, split, count, config.size, config.channels)
    return ImageSplit(drawn.labels, drawn.pixels, None, config, captions=drawn.captions, maps=drawn.maps)


def _apply_caption_policy(source: Source, config: DataConfig) -> None:
    """Skip images without a caption, or give them an empty one, if `data.on_missing_caption` asks for it.

    Nothing is done if no image has a caption: then the source has none.
    """
    if config.on_missing_caption == "error" or not any(has_captions(r.captions) for r in source.splits.values()):
        return
    missing = []
    for name, records in source.splits.items():
        captions = records.captions or [()] * len(records)
        if config.on_missing_caption == "empty":
            source.splits[name] = replace(records, captions=[texts or ("",) for texts in captions])
            continue
        missing += [records.names[row] for row, texts in enumerate(captions) if not texts]
        source.splits[name] = records.take(np.array([row for row, texts in enumerate(captions) if texts], np.int64))
        if not len(source.splits[name]):
            raise InputError(
                f"data.source {config.source}: no image of `{name}` has a caption, expected some. Add captions, or set "
                "data.on_missing_caption=empty"
            )
    if missing:
        source.notices.append(f"{len(missing):,} images without a caption are skipped: {some_of(missing)}")
        source.skipped += [f"{name} (no caption)" for name in missing]


def _limit_and_hold_out(source: Source, config: DataConfig) -> None:
    if "train" not in source.splits:
        raise InputError(f"data.source {config.source}: has the splits {list(source.splits)}, expected one named train")
    train = source.splits["train"]
    held_out = {name: source.splits[name] for name in ("val", "test") if source.splits.get(name)}
    if not any(train.labels is None or records.labels is not None for records in held_out.values()):
        if len(train) < 2:
            raise InputError(
                f"data.source {config.source}: has {len(train)} image{'s' * (len(train) != 1)}, expected at least 2: "
                "one to train on and one to hold out. Add images"
            )
        count = min(max(1, round(len(train) * config.validation_share)), len(train) - 1)
        order = np.random.default_rng(0).permutation(len(train))
        notice = f"{count} of {len(order)} training images are held out as `val`"
        if "val" in held_out:
            notice += f", replacing {len(held_out['val']):,} without labels"
        why = "no `val` or `test` split" + (" with labels" if held_out else "")
        source.notices.append(f"{why}: {notice}")
        held_out["val"] = train.take(np.sort(order[:count]))
        train = train.take(np.sort(order[count:]))
    if config.num_images is not None and config.num_images < len(train):
        train = train.take(np.sort(np.random.default_rng(1).permutation(len(train))[: config.num_images]))
    source.splits = {"train": train, **held_out}


def _report_bad(bad: list[str], source: Source, config: DataConfig) -> None:
    if bad and config.on_bad_image == "error":
        raise InputError(
            f"data.source {config.source}: {len(bad)} unreadable image{'s' * (len(bad) != 1)}: {some_of(bad)}. "
            "Fix or remove them, or set data.on_bad_image=skip"
        )
    if bad:
        source.notices.append(f"{len(bad)} unreadable images are skipped: {some_of(bad)}")


def _value_notices(values: dict[str, UsedValues], config: DataConfig) -> list[str]:
    """Warnings about unusual value ranges.

    Raises:
        InputError: `data.value_range` must be set: floats outside 0 to 1, or integers that would all be one shade.
    """
    notices = []
    for kind, used in values.items():
        low, high = config.value_range or used.type_range
        found = f"{used.images:,} images have {kind} values from {used.low:g} to {used.high:g}"
        own_range = f"data.value_range=[{used.low:g}, {used.high:g}]"
        remedy = f"Set {own_range}, or the full range that they are meant for"
        if config.value_range is None and used.outside(None):
            raise InputError(f"data.source {config.source}: {found}, expected floats from 0 to 1. {remedy}")
        if used.one_shade(config.value_range):
            raise InputError(
                f"data.source {config.source}: {found}, which is a single shade in the range {low:g} to {high:g}. "
                f"{remedy}"
            )
        if used.low == used.high and len(values) == 1 and used.images > 1:
            notices.append(f"all {used.images:,} images only have the value {used.low:g}: they all look the same")
        elif used.low_contrast(config.value_range):
            notices.append(
                f"{found}, a small part of the range {low:g} to {high:g}: they will look dark, bright or flat. If they "
                f"are meant for another range, set {own_range}"
            )
        elif used.outside(config.value_range):
            notices.append(f"{found}; those outside data.value_range=[{low:g}, {high:g}] are clipped")
        if used.not_finite:
            notices.append(f"{used.not_finite:,} images have NaN or infinite values: NaN becomes black")
    return notices


def _mode_notices(found: Findings, split: ImageSplit) -> list[str]:
    """What the modes of the files, and the number of their bits, mean for the images."""
    total, channels, notices = sum(found.modes.values()), split.config.channels, []
    grey = sum(count for mode, count in found.modes.items() if is_grey(mode))
    if channels > 1 and grey:
        notices.append(f"{grey} of {total} images are grey and are copied to all colours (data.channels={channels})")
    if channels == 1 and grey < total:
        notices.append(f"{total - grey} of {total} images have colour and are converted to grey (data.channels=1)")
    if halved := sum(count for mode, count in found.modes.items() if mode.endswith(HALVED)):
        notices.append(
            f"{halved} of {total} images have colours of 16 bits, of which Pillow only reads 8; to keep 16, save them "
            "as .npy, or as TIFF files with a page for each channel"
        )
    if split.bits == 8 and found.bits == 16:
        notices.append("the files have more than 8 bits, which are rounded to 8 (data.bits=8)")
    return notices
