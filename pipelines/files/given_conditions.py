"""Prompts, label maps and vectors from files."""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.files.given_images import open_given_image
from twostage.core.errors import InputError
from twostage.core.images.conversion import classes_to_uint8, image_to_pixels, upright_size
from twostage.core.wording import one_line, short_repr

__all__ = ["read_map_file", "read_vector_file", "with_lines"]

OPTIONS = {
    "prompt": "--prompt",
    "negative_prompt": "--negative-prompt",
    "class": "--class-name",
    "map": "--map",
    "vector": "--vector",
}
"""What a line may hold, and the option for the same."""


def with_lines(
    options: Mapping[str, list[Any] | None], file: Path | None, map_channels: int | None = None
) -> dict[str, list[Any]]:
    """The values of the options, by the keys of `OPTIONS`, and those in the lines of ``file``.

    A line is a prompt or a JSON object. Each list of the lines' values has one entry per line, so image i shows what
    line i says. Prompts of a file that has nothing else follow those of the options.

    Args:
        map_channels: see :func:`read_map_file`.

    Raises:
        InputError: a file without a line, or one that is not text; a line that is wrong or has other keys than the
            first; the same in an option and in the file.
    """
    given = {key: values for key, values in options.items() if values}
    if file is None:
        return given
    lines = _read_lines(file, map_channels)
    if list(lines) == ["prompt"]:
        return given | {"prompt": [*given.get("prompt", []), *lines["prompt"]]}
    if both := [OPTIONS[key] for key in lines if key in given]:
        raise InputError(f"{both[0]}: --prompts {file} gives the same for each image. Remove one of them")
    return given | lines


def _read_lines(file: Path, map_channels: int | None) -> dict[str, list[Any]]:
    try:
        numbered = enumerate(file.read_text(encoding="utf-8-sig").split("\n"), 1)
    except UnicodeDecodeError:
        raise InputError(
            f"--prompts {file}: not a text in UTF-8. Save it as UTF-8, with a prompt in each line"
        ) from None
    lines: dict[str, dict[str, Any]] = {}
    for number, text in numbered:
        if text.strip():
            where = f"--prompts {file}, line {number}"
            lines[where] = _read_line(text.strip(), where, file.parent, map_channels)
    if not lines:
        raise InputError(f"--prompts {file}: has no prompt. Write one in each line")
    first = next(iter(lines.values()))
    for where, line in lines.items():
        if line.keys() != first.keys():
            raise InputError(
                f"{where}: has {' and '.join(line)}, but the first line has {' and '.join(first)}. Give every line the "
                "same keys; a line without braces is a prompt"
            )
    return {key: [line[key] for line in lines.values()] for key in OPTIONS if key in first}


def _read_line(text: str, where: str, folder: Path, map_channels: int | None) -> dict[str, Any]:
    """What a line says, by the keys of `OPTIONS`; its files are relative to ``folder``."""
    if not text.startswith("{"):
        return {"prompt": text}
    try:
        line: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where}: not a JSON object ({one_line(error)}). Write one such as "
            '{"prompt": "a star", "map": "map.png"}, or a prompt that does not begin with a brace'
        ) from None
    if not line:
        raise InputError(f"{where}: an empty object. Give it at least one of: {', '.join(OPTIONS)}")
    for key in line:
        if key not in OPTIONS:
            near = difflib.get_close_matches(key, OPTIONS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(OPTIONS)}"
            raise InputError(f"{where}: unknown key {key!r}; {hint}")
    return {key: _read_value(key, value, f"{where}: {key}", folder, map_channels) for key, value in line.items()}


def _read_value(key: str, value: Any, name: str, folder: Path, map_channels: int | None) -> Any:
    if key == "vector" and isinstance(value, list):
        if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in value):
            raise InputError(f"{name}: expected a list of numbers, got {short_repr(value)}")
        return value
    if not isinstance(value, str):
        wanted = "a .npy file or a list of numbers" if key == "vector" else "text in quotes"
        raise InputError(f"{name}: expected {wanted}, got {short_repr(value)}")
    if key == "map":
        return read_map_file(folder / value, f"{name} {value}", map_channels)
    if key == "vector":
        vectors = read_vector_file(folder / value, f"{name} {value}")
        if len(vectors) != 1:
            raise InputError(f"{name} {value}: expected one vector, got {len(vectors)}. Save each in its own file")
        return vectors[0]
    return value


def read_map_file(path: Path, name: str, channels: int | None = None) -> np.ndarray:
    """The labels (H, W) uint8 of a map: an image's palette indices or grey values; or its colours (channels, H, W).

    Args:
        name: what messages call it.
        channels: those of a map that is an image; None: a map of labels.

    Raises:
        InputError: see :func:`open_given_image`; labels in colour.
    """
    try:
        image = open_given_image(path)
    except InputError as error:
        raise InputError(str(error).replace(str(path), name, 1)) from None
    width, height = upright_size(image)
    if channels is not None:
        return image_to_pixels(image, (height, width), channels)
    try:
        return classes_to_uint8(image, (height, width))[0]
    except ValueError as error:
        raise InputError(
            f"{name}: not a label map ({one_line(error)}). Give a PNG whose palette or grey values are labels"
        ) from None


def read_vector_file(path: Path, name: str) -> list[np.ndarray]:
    """The vectors in a .npy file: (V,) or (n, V).

    Args:
        name: what messages call it.

    Raises:
        InputError: another file or shape.
    """
    try:
        vectors = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else one_line(error)
        raise InputError(f"{name}: not a readable .npy file ({why}). Save it with numpy.save") from None
    if not isinstance(vectors, np.ndarray) or vectors.ndim not in (1, 2):
        raise InputError(f"{name}: expected one vector, or one in each row. Save a one- or two-dimensional array")
    return list(np.atleast_2d(vectors))
