"""Maps: an image beside each image, of the same size, such as a segmentation or a drawing of edges."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from twostage.core.data.decoded_cache import DecodedCache, decode_all
from twostage.core.data.folder_content import IMAGE_SUFFIXES, list_folder
from twostage.core.data.records import Records
from twostage.core.errors import InputError
from twostage.core.images.arrays import OpenedImage
from twostage.core.images.conversion import upright_size
from twostage.core.images.pixel_values import is_grey
from twostage.core.wording import printable, some_of

__all__ = ["MapKind", "decode_maps", "map_files", "with_maps"]

MapKind = Literal["labels", "image"]
"""Whether the values of maps are classes or colours."""


def with_maps(images: Records, maps: Records) -> Records:
    """``images`` with ``maps`` of the same rows; a map of another size than its image cannot be opened."""
    open_map, version = partial(_open_map, images, maps), f"maps {maps.version} {images.state()}"
    return replace(images, maps=replace(maps, open=open_map, version=version))


def _open_map(images: Records, maps: Records, row: int) -> OpenedImage:
    with images.open(row) as image:
        expected = upright_size(image)
    opened = maps.open(row)
    if (found := upright_size(opened)) != expected:
        opened.close()
        (width, height), (map_width, map_height) = expected, found
        raise ValueError(f"{map_width} x {map_height} pixels, but its image has {width} x {height}")
    return opened


def map_files(folder: Path, images: dict[str, list[Path]]) -> dict[str, list[Path]]:
    """The file in ``folder`` with the same relative name as each image, with any suffix of images.

    Args:
        folder: `data.maps`.
        images: the images of each split, relative to `data.source`.

    Raises:
        InputError: no such folder, or an image without a map, or with two.
    """
    if not folder.is_dir():
        raise InputError(f"data.maps {folder}: expected a folder of maps, found none there. Fix the path")
    by_stem: dict[Path, list[Path]] = {}
    for path in list_folder(folder).images:
        by_stem.setdefault(path.with_suffix(""), []).append(path)
    found: dict[str, list[Path]] = {}
    missing = []
    for split, paths in images.items():
        for path in paths:
            maps = by_stem.get(path.with_suffix(""), [])
            maps = [path] if path in maps else maps
            if len(maps) > 1:
                raise InputError(
                    f"data.maps {folder}: has {some_of(map(printable, maps))} for the image {printable(path)}, "
                    "expected one map. Remove the others"
                )
            missing += [] if maps else [path]
            found.setdefault(split, []).extend(folder / one for one in maps)
    if missing:
        total = sum(map(len, images.values()))
        raise InputError(
            f"data.maps {folder}: {len(missing):,} of {total:,} images have no map, such as {printable(missing[0])}; "
            f"expected a file with the same relative name ({' '.join(sorted(IMAGE_SUFFIXES))}). Add the maps, or "
            "remove data.maps"
        )
    return found


def decode_maps(
    splits: dict[str, Records], kind: MapKind, size: tuple[int, int], in_memory: bool, cache: DecodedCache
) -> tuple[dict[str, np.ndarray | None], int | None]:
    """Decode or check all maps.

    Args:
        splits: the maps of each split.
        size: (H, W).
        in_memory: whether to keep them.
        cache: see :func:`twostage.core.data.decoded_cache.decode_all`.

    Returns:
        The maps of each split, (n, H, W) uint8 classes or (n, C, H, W) uint8 images, or None unless ``in_memory``; and
        C, None for classes. C is 1 if all maps are grey, else 3.

    Raises:
        InputError: maps are missing, unreadable, of another size than their images, or not classes.
    """
    classes, bad, modes, found = kind == "labels", [], set(), {}
    form = (1 if classes else 3, *size)
    for name, maps in splits.items():
        found[name], findings = decode_all(maps, form, None, in_memory, cache, classes)
        bad += [f"{maps.names[row]} ({reason})" for row, reason in findings.bad.items()]
        modes |= set(findings.modes)
    if bad:
        total = sum(map(len, splits.values()))
        raise InputError(
            f"data.maps: {len(bad):,} of {total:,} maps cannot be used: {some_of(bad)}. Fix them, or remove data.maps"
        )
    channels = None if classes else 1 if all(map(is_grey, modes)) else 3
    for name, maps in found.items():
        if maps is not None and channels != 3:
            found[name] = maps[:, 0] if classes else np.ascontiguousarray(maps[:, :1])
    return found, channels
