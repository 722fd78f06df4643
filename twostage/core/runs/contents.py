"""The file, folder or dataset behind a path in a configuration. Its content counts, not the spelling of the path."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twostage.core.config.sections import Section
from twostage.core.files import file_sha256
from twostage.core.runs.model_folder import find_model_folder

__all__ = ["Contents", "Record", "same_place", "weights_at"]


class Record(Section):
    """The location and content of a path, as a folder stores them."""

    place: str | None
    """Absolute path; None: not on this disk, such as a Hugging Face dataset."""
    facts: dict[str, Any]


@dataclass
class Contents:
    """The content behind a path of a configuration."""

    what: str
    """One word, such as `images`."""
    place: Path | None
    """Absolute path; None: not on this disk, such as a Hugging Face dataset."""
    facts: dict[str, Any]
    """Plain JSON that identifies the content, independent of its location."""
    only_to_begin: bool = False
    """Whether a run needs it only until its first checkpoint."""

    @property
    def record(self) -> Record:
        """The part to store."""
        return Record(place=None if self.place is None else str(self.place), facts=self.facts)


def same_place(first: str, second: str) -> bool:
    """Whether two paths are the same file or folder, or the same text."""
    one, other = Path(first), Path(second)
    return first == second or (_exists(one) and _exists(other) and one.samefile(other))


def _exists(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110 (Path's own raises if a parent folder is not readable)


def weights_at(path: str, only_to_begin: bool = False) -> Contents:
    """The trained model at a path of a configuration.

    Raises:
        InputError: there is no trained model.
    """
    folder = find_model_folder(path)
    facts = {"weights_sha256": file_sha256(folder / "model.safetensors")}
    return Contents("weights", Path(path).absolute(), facts, only_to_begin)
