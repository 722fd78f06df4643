"""Archives as a folder of images: a zip or tar file, or several, such as the shards of a WebDataset."""

from collections import Counter
from pathlib import Path

from twostage.core.data.archives import ARCHIVE_SUFFIXES, Member, list_members
from twostage.core.data.folder_content import FolderContent, why_skipped
from twostage.core.data.split_files import split_files
from twostage.core.errors import InputError
from twostage.core.wording import printable

__all__ = ["find_archives", "open_archives", "refuse_compressed"]

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def find_archives(content: FolderContent) -> list[Path]:
    """The archives of a folder without other images, relative to it."""
    if content.images:
        return []
    return [path for path in sorted(content.others) if path.suffix.lower() in ARCHIVE_SUFFIXES]


def refuse_compressed(file: Path) -> None:
    """Refuse a compressed tar file, in which nothing can be found without unpacking everything before it.

    Raises:
        InputError: it is one.
    """
    if file.name.lower().endswith(_COMPRESSED):
        raise InputError(
            f"data.source {printable(file)}: a compressed tar file cannot be read in place. Unpack it with tar xf "
            f"{printable(file.name)}, and set data.source to the folder"
        )


def open_archives(root: Path, files: list[Path], content: FolderContent | None) -> FolderContent:
    """The files in archives, each below the split that the name of its archive spells, and the files beside them.

    Args:
        root: a folder, or an archive.
        files: the archives in the folder, relative to it; [] if ``root`` is an archive.
        content: everything in the folder; None if ``root`` is an archive.

    Raises:
        InputError: an archive is unreadable, or its split is ambiguous.
    """
    folder = root if content else root.parent
    by_split, ignored = split_files(root, files or [Path(root.name)])
    found = FolderContent(root, skipped=dict(content.skipped) if content else {})
    found.skipped |= dict.fromkeys(ignored, "an archive that is not a split")
    named = set(by_split) != {"train"} or bool(ignored)
    for split, paths in by_split.items():
        archives = {path: list_members(folder / path) for path in paths}
        counts = Counter(member.name for members in archives.values() for member in members)
        for path, members in archives.items():
            found.skipped.pop(path, None)
            # Shards that number their files from 0 again have the same names: the shard's name tells them apart.
            prefix = f"{path.stem}-" if any(counts[member.name] > 1 for member in members) else ""
            for member in members:
                place = Path(split, member.name) if named else Path(member.name)
                _add(found, place.with_name(prefix + place.name) if prefix else place, member)
    _skip_further_images(found)
    found.images.sort()
    return found


def _add(found: FolderContent, path: Path, member: Member) -> None:
    found.members[path] = member
    hidden = any(part.startswith(".") for part in path.parts)
    if reason := "hidden" if hidden else why_skipped(path):
        found.skipped[path] = reason
    else:
        found.images.append(path)


def _skip_further_images(found: FolderContent) -> None:
    """In a WebDataset, `0001.seg.png` belongs to the sample `0001`, whose image is `0001.jpg`."""
    in_tar = [path for path in found.images if found.members[path].archive.suffix.lower() == ".tar"]
    keys = {path.with_suffix("") for path in in_tar if "." not in path.stem}
    further = {path: None for path in in_tar if "." in path.stem and path.with_name(path.name.split(".")[0]) in keys}
    found.skipped |= dict.fromkeys(further, "another image of the same sample")
    found.images = [path for path in found.images if path not in further]
