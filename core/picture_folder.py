"""A folder of pictures: every file below it is a picture of a split, or is named with the reason why it is none."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from core.errors import InputError
from core.images import printable

__all__ = ["SPLIT_NAMES", "PictureFolder", "read_folder"]

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


@dataclass
class PictureFolder:
    """How the pictures of a folder are laid out."""

    splits: dict[str, list[Path]]
    """The files of each split, class after class."""
    labels: dict[str, list[int]] | None
    """The class of each; None for pictures without classes."""
    class_names: list[str] | None
    """As the folders are called, sorted."""
    skipped: dict[Path, str]
    """What is no picture, with the reason: other files, hidden ones, links that lead nowhere or back to a folder
    above, folders that cannot be read."""


def read_folder(root: Path) -> PictureFolder:
    """Walks through ``root`` once, links to other folders included, and understands its layout.

    Raises:
        InputError: no pictures, or a layout that can be understood in two ways.
    """
    pictures, skipped = [], {}
    for path, reason in _walk(root, ()):
        if reason is None:
            pictures.append(path.relative_to(root))
        else:
            skipped[path] = reason
    if not pictures:
        known = " ".join(sorted(IMAGE_SUFFIXES))
        raise InputError(f"data.source {root}: no pictures in this folder (looked for {known}, .parquet and .arrow)")
    folders = _split_folders(root, pictures)
    # By split: each picture's path below the split's folder.
    within = {
        split: sorted(path.relative_to(folder) for path in pictures if path.is_relative_to(folder))
        for split, folder in folders.items()
    }
    class_names = _class_names(root, folders, within)
    labels = None
    if class_names is not None:
        number = {name: i for i, name in enumerate(class_names)}
        within = {split: sorted(paths, key=lambda path: number[path.parts[0]]) for split, paths in within.items()}
        labels = {split: [number[path.parts[0]] for path in paths] for split, paths in within.items()}
    splits = {split: [root / folders[split] / path for path in paths] for split, paths in within.items()}
    return PictureFolder(splits, labels, class_names, skipped)


def _walk(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[Path, str | None]]:
    """Every file below ``folder``, and why it is left out or None; ``above`` are the folders that it is in."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        status = folder.stat()
    except OSError as error:
        yield folder, f"cannot be read: {error.strerror}"
        return
    here = (status.st_dev, status.st_ino)
    if here in above:
        yield folder, "a link to a folder above it"
        return
    for entry in entries:
        path = folder / entry.name
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:  # a link to itself
            is_folder = is_file = False
        if is_folder:
            for below, reason in _walk(path, (*above, here)):
                yield below, "hidden" if entry.name.startswith(".") else reason
        elif entry.name.startswith("."):
            yield path, "hidden"
        elif not is_file:
            yield path, "a link to nothing" if entry.is_symlink() else "no file"  # opening a pipe would wait
        elif path.suffix.lower() not in IMAGE_SUFFIXES:
            yield path, f"no picture: {path.suffix}" if path.suffix else "no picture"
        else:
            yield path, None


def _split_folders(root: Path, pictures: list[Path]) -> dict[str, Path]:
    """The folder below ``root`` that each split is in; ``root`` itself, as Path(), where it holds no splits."""
    folders = sorted({path.parts[0] for path in pictures if len(path.parts) > 1})
    named = {name: SPLIT_NAMES[name.lower()] for name in folders if name.lower() in SPLIT_NAMES}
    beside = [printable(name) for name in folders if name not in named]
    flat = any(len(path.parts) == 1 for path in pictures)
    if flat or (beside and "train" not in named.values()):
        return {"train": Path()}
    if beside:
        raise InputError(
            f"data.source {root}: holds the split `train` and also the folders {', '.join(beside[:5])}; expected "
            "either only train, val and test or one folder a class"
        )
    splits = {split: Path(name) for name, split in named.items()}
    if len(splits) < len(named):
        raise InputError(
            f"data.source {root}: several of its folders {', '.join(named)} are the same split; name them train, val "
            "and test, each once"
        )
    if "train" not in splits:
        raise InputError(f"data.source {root}: has the splits {list(splits)}, expected one named train")
    return splits


def _class_names(root: Path, folders: dict[str, Path], within: dict[str, list[Path]]) -> list[str] | None:
    """The class folders of `train`, which every split has to share; None where its pictures have no folders."""
    of_split = {split: {path.parts[0] for path in paths if len(path.parts) > 1} for split, paths in within.items()}
    is_flat = {split: any(len(path.parts) == 1 for path in paths) for split, paths in within.items()}
    classes = sorted(of_split["train"])
    if is_flat["train"] and classes:
        shown = ", ".join(map(printable, classes[:5]))
        raise InputError(
            f"data.source {root / folders['train']}: holds pictures and also folders of pictures ({shown}); expected "
            "either pictures only (no classes) or one folder a class"
        )
    for split, folder in folders.items():
        unknown = [printable(name) for name in sorted(of_split[split] - set(classes))]
        if unknown or is_flat[split] != is_flat["train"]:
            what = f"has the folders {unknown}" if unknown else "holds pictures outside class folders"
            known = f"the classes {classes}; name them alike" if classes else "no classes; give both the same layout"
            raise InputError(f"data.source {root / folder}: {what}, but `train` has {known}")
    return classes or None
