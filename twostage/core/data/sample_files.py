"""Files that belong to one image each: `0001.cls` and `0001.json` beside `0001.jpg`, as in a WebDataset."""

from pathlib import Path
from typing import Any

from twostage.core.data.folder_content import FolderContent
from twostage.core.data.metadata_files import Metadata
from twostage.core.wording import printable

__all__ = ["CLASS_COLUMN", "read_samples"]

CLASS_COLUMN = "cls"
"""The column with the content of the `.cls` files."""
_SUFFIXES = {".cls", ".json"}


def read_samples(content: FolderContent, metadata: Metadata) -> None:
    """Add the values in the files beside the images to ``metadata``; the keys of a JSON object are columns.

    Raises:
        InputError: a file is unreadable, or disagrees with the other metadata.
    """
    read, root = set(metadata.files), printable(content.root)
    files = [file for file in content.others if file.suffix.lower() in _SUFFIXES and file not in read]
    images: dict[Path, list[Path]] = {}
    for image in content.images if files else ():
        images.setdefault(image.with_suffix(""), []).append(image)
    for file in files:
        if not (described := images.get(file.with_suffix(""))):
            continue
        values = _values(content, file)
        if values is None:
            continue
        metadata.files.append(file)
        for image in described:
            metadata.add(root, image, values)


def _values(content: FolderContent, file: Path) -> dict[str, Any] | None:
    """What a file says about its image; None for a JSON file without columns."""
    if file.suffix.lower() == ".cls":
        return {CLASS_COLUMN: content.read_text(file).strip() or None}
    document = content.read_json(file)
    return document if isinstance(document, dict) else None
