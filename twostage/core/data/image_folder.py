"""A folder of pictures: every file below it is a picture of a split, or is named with the reason why it is none."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from twostage.core.data.splits import HELD_OUT, exact_split, reads_as_held_out, spelled_splits
from twostage.core.errors import InputError
from twostage.core.images.conversion import printable

__all__ = ["IMAGE_SUFFIXES", "FolderContent", "ImageFolder", "list_folder", "understand_folder"]

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
MAX_NAMED = 5


@dataclass
class FolderContent:
    """What lies below a folder; paths are relative to it."""

    pictures: list[Path] = field(default_factory=list)
    skipped: dict[Path, str] = field(default_factory=dict)
    """What is no picture, with the reason: other files, hidden ones, links that lead nowhere or back to a folder
    above, folders that cannot be read."""
    empty: list[Path] = field(default_factory=list)
    """The folders without any picture below them (the highest one of each branch)."""


@dataclass
class ImageFolder:
    """How the pictures of a folder are laid out."""

    splits: dict[str, list[Path]]
    """The files of each split, class after class."""
    labels: dict[str, list[int] | None] | None
    """The class of each; None for a held-out split without class folders, or where there are no classes at all."""
    class_names: list[str] | None
    """As the folders are called, sorted."""
    layout: str
    """Where the splits and the classes were found, in words."""
    notices: list[str]
    """Names that could be understood in another way."""


def list_folder(root: Path) -> FolderContent:
    """Walks through ``root`` once, links to other folders included."""
    content = FolderContent()
    _walk(root, root, (), content, hidden=False)
    content.skipped = {path.relative_to(root): reason for path, reason in content.skipped.items()}
    return content


def _walk(root: Path, folder: Path, above: tuple[tuple[int, int], ...], content: FolderContent, hidden: bool) -> bool:
    """Sorts all files below ``folder`` into ``content``; returns whether there are pictures among them."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        status = folder.stat()
    except OSError as error:
        content.skipped[folder] = "hidden" if hidden else f"cannot be read: {error.strerror}"
        return False
    here = (status.st_dev, status.st_ino)
    if here in above:
        content.skipped[folder] = "hidden" if hidden else "a link to a folder above it"
        return False
    pictured, empty_before = False, len(content.empty)
    for entry in entries:
        path, is_hidden = folder / entry.name, hidden or entry.name.startswith(".")
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:  # a link to itself
            is_folder = is_file = False
        if is_folder:
            pictured |= _walk(root, path, (*above, here), content, is_hidden)
        elif is_hidden:
            content.skipped[path] = "hidden"
        elif not is_file:
            # Opening a pipe would wait.
            content.skipped[path] = "a link to nothing" if entry.is_symlink() else "no file"
        elif path.suffix.lower() not in IMAGE_SUFFIXES:
            content.skipped[path] = f"no picture: {path.suffix}" if path.suffix else "no picture"
        else:
            content.pictures.append(path.relative_to(root))
            pictured = True
    if not pictured and not hidden:
        content.empty[empty_before:] = [folder.relative_to(root)]
    return pictured


# --- splits and classes ---------------------------------------------------------------------------------------------


def understand_folder(root: Path, content: FolderContent) -> ImageFolder:
    """Finds the splits and the classes of pictures by the names of their folders.

    Raises:
        InputError: no pictures, or a layout that can be understood in two ways.
    """
    pictures = content.pictures
    if not pictures:
        known = " ".join(sorted(IMAGE_SUFFIXES))
        raise InputError(f"data.source {root}: no pictures in this folder (looked for {known}, .parquet and .arrow)")
    depth, notices = _split_depth(root, pictures), []
    split_of = {path: "train" for path in pictures}
    if depth is not None:
        split_of = {path: _split_at(path, depth) for path in pictures}
    elif _split_by_file_names(pictures):
        split_of = {path: spelled_splits(path.stem).pop() for path in pictures}
    else:
        notices = _possible_splits(pictures)
    if depth is not None and set(split_of.values()) == {"train"}:
        notices = _possible_splits([Path(*path.parts[depth + 1 :]) for path in pictures])
    _check_splits(root, split_of, depth)
    class_of = _class_folders(pictures, depth)
    class_names = _class_names(root, split_of, class_of, depth)
    number = {name: i for i, name in enumerate(class_names or [])}
    splits: dict[str, list[Path]] = {}
    for path in sorted(pictures, key=lambda path: (number.get(class_of[path] or "", 0), path)):
        splits.setdefault(split_of[path], []).append(path)
    splits = {split: splits[split] for split in sorted(splits)}
    labels = None
    if class_names is not None:
        labels = {}
        for split, paths in splits.items():
            found = [number[name] for path in paths if (name := class_of[path]) is not None]
            labels[split] = found or None
            if not found:
                notices.append(f"`{split}` has no class folders and is used without classes")
    if empty := [printable(path) for path in content.empty if path.parts]:
        notices.append(f"folders without any picture: {_some(empty)}")
    layout = _describe_splits(splits, depth) + (
        "pictures without classes" if class_names is None else f"one folder a class ({len(class_names)} classes)"
    )
    return ImageFolder(
        {split: [root / path for path in paths] for split, paths in splits.items()},
        labels,
        class_names,
        layout,
        notices,
    )


def _folders_at(pictures: list[Path], depth: int) -> set[str]:
    return {path.parts[depth] for path in pictures if len(path.parts) > depth + 1}


def _meaning(name: str) -> str | None:
    """The one split that a folder's name is or spells."""
    spelled = {exact} if (exact := exact_split(name)) else spelled_splits(name)
    return next(iter(spelled)) if len(spelled) == 1 else None


def _split_at(path: Path, depth: int) -> str:
    split = _meaning(path.parts[depth])
    assert split is not None
    return split


def _split_depth(root: Path, pictures: list[Path]) -> int | None:
    """How many folders stand above those that are splits (0 for `train/cat/1.png`, 1 for `cat/train/1.png`); None
    where no folder is a split.

    Folders at a depth are splits if each picture is below one. One that is not called by a split's very name, such as
    `train_station`, counts only where both training and held-out pictures are spelled like that. Below folders that
    all are `train`, only training and held-out ones beside each other are splits.

    Raises:
        InputError: some folders beside each other are splits, others are not.
    """
    only_train = None  # the depth of folders that all say `train`
    for depth in range(max(len(path.parts) for path in pictures) - 1):
        folders = _folders_at(pictures, depth)
        meanings = {name: _meaning(name) for name in sorted(folders)}
        splits, exact = set(meanings.values()), {name for name in folders if exact_split(name)}
        both = "train" in splits and bool(splits & HELD_OUT)
        complete = None not in splits and all(len(path.parts) > depth + 1 for path in pictures)
        if complete and (both or (only_train is None and exact == folders and splits != {"train"})):
            return depth
        if only_train is not None:  # below `train` names are those of classes, unless all of them are splits
            continue
        if complete and exact == folders:
            only_train = depth
            continue
        if both or any(exact_split(name) in HELD_OUT for name in exact) or (exact and depth == 0):
            named = [printable(name) for name in meanings if (name in exact if exact else meanings[name])]
            others = [printable(name) for name in meanings if name not in exact and (exact or not meanings[name])]
            beside = f"the folders {_some(others)}" if others else "pictures that are in none of these"
            raise InputError(
                f"data.source {root}: holds the split{'s' * (len(named) > 1)} {_some(named)} and also {beside}; "
                "expected either only train, val and test or one folder a class. Put the training images into train/ "
                "(in which a class may be called test), or rename the folders"
            )
    return only_train


def _split_by_file_names(pictures: list[Path]) -> bool:
    """Whether every file's name spells its split, as in `train_001.png` and `test_001.png`."""
    found: set[str] = set()
    for path in pictures:
        if len(splits := spelled_splits(path.stem)) != 1:
            return False
        found |= splits
    return "train" in found and bool(found & HELD_OUT)


def _possible_splits(pictures: list[Path]) -> list[str]:
    """Warns of names that read as held out where others do not, so that all are trained on."""
    notices = []
    folders = sorted({part for path in pictures for part in path.parts[:-1]})
    folders = [part for part in folders if spelled_splits(part) & HELD_OUT or reads_as_held_out(part)]
    if folders:
        notices.append(
            f"the folders {_some([printable(name) for name in folders])} are used for training like the others, though "
            "their names read like held-out splits; if they are, put the others into train/ and these into test/"
        )
    files = [path for path in pictures if spelled_splits(path.stem) & HELD_OUT]
    if files and len(files) < len(pictures):
        notices.append(
            f"{len(files):,} of {len(pictures):,} pictures have names that read as held out, such as "
            f"{printable(files[0])}, and are used like the others; if they are held out, put them into test/ and the "
            "others into train/"
        )
    return notices


def _check_splits(root: Path, split_of: dict[Path, str], depth: int | None) -> None:
    """Refuses splits without `train`, and two folders that are the same one."""
    if depth is not None:
        beside: dict[tuple[str, ...], list[str]] = {}  # the folders by the one that they lie in
        for parts in sorted({path.parts[: depth + 1] for path in split_of}):
            beside.setdefault(parts[:-1], []).append(parts[-1])
        for names in beside.values():
            if len({_meaning(name) for name in names}) < len(names):
                raise InputError(
                    f"data.source {root}: several of its folders {', '.join(map(printable, names))} are the same "
                    "split; name them train, val and test, each once"
                )
    if "train" not in (splits := sorted(set(split_of.values()))):
        raise InputError(f"data.source {root}: has the splits {splits}, expected one named train")


def _class_folders(pictures: list[Path], depth: int | None) -> dict[Path, str | None]:
    """The folder that each picture's class is called by: the first one below its split, or else above it, that they do
    not have in common; without such a one the first below; None for a picture without."""
    below = 0 if depth is None else depth + 1
    deepest = min(len(path.parts) for path in pictures) - 1  # levels that every picture has a folder at
    class_of = {path: path.parts[below] if len(path.parts) > below + 1 else None for path in pictures}
    if deepest > below or not any(class_of.values()):
        for level in (*range(below, deepest), *range(depth or 0)):
            if len({path.parts[level] for path in pictures}) > 1:
                return {path: path.parts[level] for path in pictures}
    return class_of


def _class_names(
    root: Path, split_of: dict[Path, str], class_of: dict[Path, str | None], depth: int | None
) -> list[str] | None:
    """The class folders of `train`, which every split has to share; None where its pictures have no folders."""
    of_split: dict[str, set[str]] = {split: set() for split in split_of.values()}
    is_flat, where = dict.fromkeys(of_split, False), dict.fromkeys(of_split, root)
    for path, split in split_of.items():
        name = class_of[path]
        if name is None:
            is_flat[split] = True
        else:
            of_split[split].add(name)
        if depth == 0:
            where[split] = root / path.parts[0]
    classes = sorted(of_split["train"])
    if is_flat["train"] and classes:
        raise InputError(
            f"data.source {where['train']}: holds pictures and also folders of pictures "
            f"({_some([printable(name) for name in classes])}); expected either pictures only (no classes) or one "
            "folder a class"
        )
    for split, names in sorted(of_split.items()):
        unknown = [printable(name) for name in sorted(names - set(classes))]
        if split != "train" and classes and not names:  # all without a class
            continue
        if unknown or is_flat[split] != is_flat["train"]:
            what = f"has the folders {unknown}" if unknown else "holds pictures outside class folders"
            known = f"the classes {classes}; name them alike" if classes else "no classes; give both the same layout"
            place = where[split] if where[split] != root else f"{root} (`{split}`)"
            raise InputError(f"data.source {place}: {what}, but `train` has {known}")
    return classes or None


def _describe_splits(splits: dict[str, list[Path]], depth: int | None) -> str:
    if len(splits) == 1:
        return ""
    if depth is None:
        return f"the splits {', '.join(splits)} by the names of the files, each "
    folders = {split: sorted({path.parts[depth] for path in paths}) for split, paths in splits.items()}
    named = [split if folders[split] == [split] else f"{split} ({printable(folders[split][0])})" for split in splits]
    return f"the splits {', '.join(named)}, each "


def _some(names: list[str]) -> str:
    return ", ".join(names[:MAX_NAMED]) + (f" and {len(names) - MAX_NAMED:,} more" if len(names) > MAX_NAMED else "")
