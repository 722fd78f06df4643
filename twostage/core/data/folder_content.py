"""The files of a dataset: each file below a folder or in an archive is an image, or has a reason why not."""

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from twostage.core.data.archives import Member, read_member
from twostage.core.data.records import Records
from twostage.core.errors import InputError
from twostage.core.images.conversion import open_image
from twostage.core.wording import one_line, printable

__all__ = ["IMAGE_SUFFIXES", "FolderContent", "file_records", "list_folder", "why_skipped"]

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass
class FolderContent:
    """The files of a dataset: those below a folder, or those inside archives, as if they had been unpacked there."""

    root: Path
    """The folder, or the archive. The other paths are relative to it."""
    images: list[Path] = field(default_factory=list)
    skipped: dict[Path, str] = field(default_factory=dict)
    """Paths that are not images, each with the reason: other files, hidden files, broken links, links to a parent
    folder, unreadable folders."""
    empty: list[Path] = field(default_factory=list)
    """Folders without any image below them (only the topmost of each branch)."""
    members: dict[Path, Member] = field(default_factory=dict)
    """The files that lie in archives."""

    def name(self, path: Path) -> str:
        """The place of a file, for messages."""
        member = self.members.get(path)
        return printable(member.archive / member.name if member else self.root / path)

    @property
    def kind(self) -> str:
        """`folder`, `zip` or `tar`."""
        return next((member.archive.suffix[1:].lower() for member in self.members.values()), "folder")

    def read_text(self, path: Path, otherwise: str = "") -> str:
        """The text of a file.

        Args:
            otherwise: another remedy for the message.

        Raises:
            InputError: it is unreadable, or not UTF-8.
        """
        try:
            member = self.members.get(path)
            content = read_member(member) if member else (self.root / path).read_bytes()
            return content.decode("utf-8-sig")
        except (OSError, ValueError) as error:
            raise InputError(
                f"data.source {self.name(path)}: not readable as UTF-8 ({one_line(error)}). Save it as UTF-8"
                f"{otherwise and '. ' + otherwise}"
            ) from None

    def read_json(self, path: Path) -> Any:
        """The content of a JSON file.

        Raises:
            InputError: it is unreadable, or not JSON.
        """
        text = self.read_text(path)
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"data.source {self.name(path)}: not valid JSON ({one_line(error)}). Copy the file again, fix it, or "
                "remove it"
            ) from None

    @property
    def others(self) -> list[Path]:
        """The files that are not images, without hidden ones."""
        return [path for path, reason in self.skipped.items() if reason != "hidden"]

    def records(self, images: Sequence[Path]) -> Records:
        """These images, not yet decoded."""
        if not self.members:
            below = str(self.root / "_")[:-1]
            return _records_of_files([f"{below}{path}" for path in images], printable(self.root))
        members = [self.members[path] for path in images]
        archives = [(archive, archive.stat()) for archive in sorted({member.archive for member in members})]
        return Records(
            [self.name(path) for path in images],
            None,
            partial(_open_member, members),
            partial(_member_sizes, members),
            printable(self.root),
            version=" ".join(f"{archive} {stat.st_size} {stat.st_mtime_ns}" for archive, stat in archives),
        )


def file_records(files: Sequence[Path], origin: str) -> Records:
    """Images that have a file each."""
    return _records_of_files([str(file) for file in files], origin)


def _records_of_files(places: list[str], origin: str) -> Records:
    return Records(
        [printable(place) for place in places],
        None,
        partial(_open_file, places),
        partial(_file_sizes, places),
        origin,
        places,
    )


def _open_file(files: Sequence[str], row: int) -> Image.Image:
    return open_image(Path(files[row]))


def _file_sizes(files: Sequence[str]) -> np.ndarray:
    return np.array([_size(file) for file in files], np.int64)


def _size(file: str) -> int:
    try:
        return os.stat(file).st_size  # noqa: PTH116  # a Path takes three times as long
    except OSError:
        return 0


def _open_member(members: Sequence[Member], row: int) -> Image.Image:
    return open_image(io.BytesIO(read_member(members[row])))


def _member_sizes(members: Sequence[Member]) -> np.ndarray:
    return np.array([member.size for member in members], np.int64)


def why_skipped(path: Path) -> str | None:
    """The reason why a file is not an image; None if its name says that it is one."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return None
    return f"not an image: {path.suffix}" if path.suffix else "not an image"


def list_folder(root: Path) -> FolderContent:
    """List everything below ``root``, following links to folders."""
    content = FolderContent(root)
    _walk(content, Path(), (), hidden=False)
    return content


def _walk(content: FolderContent, folder: Path, above: tuple[tuple[int, int], ...], hidden: bool) -> bool:
    """Sort all files below ``folder`` into ``content``; return whether any is an image."""
    try:
        with os.scandir(content.root / folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        status = (content.root / folder).stat()
    except OSError as error:
        content.skipped[folder] = "hidden" if hidden else f"cannot be read: {error.strerror}"
        return False
    here = (status.st_dev, status.st_ino)
    if here in above:
        content.skipped[folder] = "hidden" if hidden else "a link to a parent folder"
        return False
    has_images, empty_before = False, len(content.empty)
    for entry in entries:
        path, is_hidden = folder / entry.name, hidden or entry.name.startswith(".")
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:  # a link to itself
            is_folder = is_file = False
        if is_folder:
            has_images |= _walk(content, path, (*above, here), is_hidden)
        elif is_hidden:
            content.skipped[path] = "hidden"
        elif not is_file:
            # Opening a pipe would block.
            content.skipped[path] = "a broken link" if entry.is_symlink() else "not a regular file"
        elif reason := why_skipped(path):
            content.skipped[path] = reason
        else:
            content.images.append(path)
            has_images = True
    if not has_images and not hidden:
        content.empty[empty_before:] = [folder]
    return has_images
