"""Prompts, label maps and vectors from files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from twostage.core.errors import InputError
from twostage.core.images.conversion import classes_to_uint8, upright_size
from twostage.core.wording import one_line

__all__ = ["all_prompts", "read_map_file", "read_vector_file"]


def all_prompts(given: Sequence[str], file: Path | None) -> list[str] | None:
    """The prompts that are given one by one, and those in the lines of a file; None if there are none of either.

    Raises:
        InputError: a file without a prompt, or one that is not text.
    """
    if file is None:
        return list(given) or None
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise InputError(
            f"--prompts {file}: not a text in UTF-8. Save it as UTF-8, with a prompt in each line"
        ) from None
    if not (found := [line for line in lines if line]):
        raise InputError(f"--prompts {file}: has no prompt. Write one in each line")
    return [*given, *found]


def read_map_file(path: Path) -> np.ndarray:
    """The labels (H, W) uint8 of a map: an image's palette indices or grey values.

    Raises:
        InputError: not an image, or one in colour.
    """
    try:
        with Image.open(path) as image:
            width, height = upright_size(image)
            return classes_to_uint8(image, (height, width))[0]
    except (OSError, ValueError) as error:
        raise InputError(
            f"--map {path}: not a label map ({one_line(error)}). Give a PNG whose palette or grey values are labels"
        ) from None


def read_vector_file(path: Path) -> list[np.ndarray]:
    """The vectors in a .npy file: (V,) or (n, V).

    Raises:
        InputError: another file or shape.
    """
    try:
        vectors = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--vector {path}: not a readable .npy file ({one_line(error)}). Save it with numpy.save"
        ) from None
    if not isinstance(vectors, np.ndarray) or vectors.ndim not in (1, 2):
        raise InputError(
            f"--vector {path}: expected one vector, or one in each row. Save a one- or two-dimensional array"
        )
    return list(np.atleast_2d(vectors))
