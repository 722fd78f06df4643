"""The splits and classes of a folder of images, from the names of its folders and files."""

import functools
from dataclasses import dataclass
from pathlib import Path

from twostage.core.data.folder_content import IMAGE_SUFFIXES, FolderContent
from twostage.core.data.splits import HELD_OUT, SPLIT_COLUMN, exact_split, reads_as_held_out, spelled_splits
from twostage.core.errors import InputError
from twostage.core.wording import printable, some_of

__all__ = ["ImageFolder", "understand_folder"]


@dataclass
class ImageFolder:
    """The splits and classes of a folder of images."""

    splits: dict[str, list[Path]]
    """The images of each split, sorted by class; paths are relative to the folder."""
    labels: dict[str, list[int] | None] | None
    """The class of each file; None for a held-out split without class folders, or if nothing has classes."""
    class_names: list[str] | None
    """The names of the class folders, sorted."""
    layout: str
    """Where the splits were found, as the beginning of a sentence; "" without splits."""
    notices: list[str]
    """Warnings about names that could be read in another way."""


def understand_folder(content: FolderContent, given: dict[Path, str] | None = None) -> ImageFolder:
    """Find the splits and classes of images from the names of their folders.

    Args:
        given: the split of each image, from a column of the files beside them; None: the names say it.

    Raises:
        InputError: there are no images, or the layout can be read in two ways.
    """
    root, images = content.root, content.images
    if not images:
        known = " ".join(sorted(IMAGE_SUFFIXES))
        raise InputError(
            f"data.source {root}: expected images in it ({known}), or tables, archives or arrays of images (.parquet "
            ".arrow .tar .zip .npy .npz), got none"
        )
    depth, notices = _split_depth(root, images, strict=given is None), []
    split_of = dict.fromkeys(images, "train")
    if depth is not None:
        split_of = {path: _split_at(path, depth) for path in images}
    elif _split_by_file_names(images):
        split_of = {path: spelled_splits(path.stem).pop() for path in images}
    elif given is None:
        notices = _possible_splits(images)
    if given is not None:
        split_of = _given_splits(root, split_of, given)
    elif depth is not None and set(split_of.values()) == {"train"}:
        notices = _possible_splits([Path(*path.parts[depth + 1 :]) for path in images])
    _check_splits(root, split_of, depth)
    class_of = _class_folders(images, depth)
    class_names = _class_names(root, split_of, class_of, depth)
    number = {name: i for i, name in enumerate(class_names or [])}
    splits: dict[str, list[Path]] = {}
    for path in sorted(images, key=lambda path: (number.get(class_of[path] or "", 0), path.parts)):
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
        notices.append(f"folders without images: {some_of(empty)}")
    where = _describe_splits(splits, depth) if given is None else _listed(splits, f"the column {SPLIT_COLUMN!r}")
    return ImageFolder(splits, labels, class_names, where, notices)


def _given_splits(root: Path, by_name: dict[Path, str], given: dict[Path, str]) -> dict[Path, str]:
    """The splits that a column gives.

    Raises:
        InputError: folders or file names spell other splits.
    """
    if len(set(by_name.values())) > 1:  # everything in train/ is often divided by a column
        for path, split in by_name.items():
            if given[path] != split:
                raise InputError(
                    f"data.source {root}: {printable(path)} is in `{split}` by its name and in `{given[path]}` by the "
                    f"column {SPLIT_COLUMN!r}, expected the same. Fix the column, or rename it"
                )
    return given


def _folders_at(images: list[Path], depth: int) -> set[str]:
    return {path.parts[depth] for path in images if len(path.parts) > depth + 1}


@functools.cache  # asked for each image
def _meaning(name: str) -> str | None:
    """The split that a folder's name spells; None if it spells none or several."""
    spelled = {exact} if (exact := exact_split(name)) else spelled_splits(name)
    return next(iter(spelled)) if len(spelled) == 1 else None


def _split_at(path: Path, depth: int) -> str:
    split = _meaning(path.parts[depth])
    assert split is not None
    return split


def _split_depth(root: Path, images: list[Path], strict: bool) -> int | None:
    """The number of folders above the split folders (0 for `train/cat/1.png`, 1 for `cat/train/1.png`); None without
    split folders.

    The folders at a depth are splits if every image is below one of them. A folder that only contains a split's word,
    such as `train_station`, counts only if both training and held-out images have such folders. Below folders that are
    all `train`, the next folders are splits only if there are training and held-out folders side by side.

    Raises:
        InputError: only some of the folders at one depth are splits, and ``strict`` is true; else these are classes.
    """
    only_train = None  # the depth at which all folders are `train`
    for depth in range(max(len(path.parts) for path in images) - 1):
        folders = _folders_at(images, depth)
        meanings = {name: _meaning(name) for name in sorted(folders)}
        splits, exact = set(meanings.values()), {name for name in folders if exact_split(name)}
        both = "train" in splits and bool(splits & HELD_OUT)
        complete = None not in splits and all(len(path.parts) > depth + 1 for path in images)
        if complete and (both or (only_train is None and exact == folders and splits != {"train"})):
            return depth
        if only_train is not None:  # names below `train` are classes, unless all of them are splits
            continue
        if complete and exact == folders:
            only_train = depth
            continue
        if both or any(exact_split(name) in HELD_OUT for name in exact) or (exact and depth == 0):
            if not strict:
                return None
            named = [printable(name) for name in meanings if (name in exact if exact else meanings[name])]
            others = [printable(name) for name in meanings if name not in exact and (exact or not meanings[name])]
            beside = f"the folders {some_of(others)}" if others else "images outside these folders"
            raise InputError(
                f"data.source {root}: has the split{'s' * (len(named) > 1)} {some_of(named)} next to {beside}; "
                "expected either only train, val and test, or one folder per class. Put the training images into "
                "train/ (a class inside it may be called test), or rename the folders"
            )
    return only_train


def _split_by_file_names(images: list[Path]) -> bool:
    """Whether every file's name spells one split, as in `train_001.png` and `test_001.png`."""
    found: set[str] = set()
    for path in images:
        if len(splits := spelled_splits(path.stem)) != 1:
            return False
        found |= splits
    return "train" in found and bool(found & HELD_OUT)


def _possible_splits(images: list[Path]) -> list[str]:
    """Warnings about training images whose names look like held-out ones."""
    notices = []
    folders = sorted({part for path in images for part in path.parts[:-1]})
    folders = [part for part in folders if spelled_splits(part) & HELD_OUT or reads_as_held_out(part)]
    if folders:
        notices.append(
            f"the folders {some_of(map(printable, folders))} are used for training, but their names look like held-out "
            "splits; if they are held out, put them into test/ and the others into train/"
        )
    files = [path for path in images if spelled_splits(path.stem) & HELD_OUT]
    if files and len(files) < len(images):
        notices.append(
            f"{len(files):,} of {len(images):,} images have names that look held out, such as {printable(files[0])}, "
            "but are used like the others; if they are held out, put them into test/ and the others into train/"
        )
    return notices


def _check_splits(root: Path, split_of: dict[Path, str], depth: int | None) -> None:
    """Reject splits without `train`, and two folders that mean the same split."""
    if depth is not None:
        siblings: dict[tuple[str, ...], list[str]] = {}
        for parts in sorted({path.parts[: depth + 1] for path in split_of}):
            siblings.setdefault(parts[:-1], []).append(parts[-1])
        for names in siblings.values():
            if len({_meaning(name) for name in names}) < len(names):
                raise InputError(
                    f"data.source {root}: two of the folders {', '.join(map(printable, names))} mean the same split; "
                    "expected each of train, val and test at most once. Rename or merge the folders"
                )
    if "train" not in (splits := sorted(set(split_of.values()))):
        raise InputError(f"data.source {root}: has the splits {splits}, expected one named train")


def _class_folders(images: list[Path], depth: int | None) -> dict[Path, str | None]:
    """The folder that names each image's class; None for an image without one.

    It is the first folder below the split, or else above it, whose name is not the same for all images; if there is no
    such folder, the first one below the split.
    """
    below = 0 if depth is None else depth + 1
    deepest = min(len(path.parts) for path in images) - 1  # the levels at which every image has a folder
    class_of = {path: path.parts[below] if len(path.parts) > below + 1 else None for path in images}
    if deepest > below or not any(class_of.values()):
        for level in (*range(below, deepest), *range(depth or 0)):
            if len({path.parts[level] for path in images}) > 1:
                return {path: path.parts[level] for path in images}
    return class_of


def _class_names(
    root: Path, split_of: dict[Path, str], class_of: dict[Path, str | None], depth: int | None
) -> list[str] | None:
    """The class folders of `train`, which every split must share; None if `train` has no folders."""
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
            f"data.source {where['train']}: has images next to folders of images ({some_of(map(printable, classes))}); "
            "expected either only images (no classes) or one folder per class"
        )
    for split, names in sorted(of_split.items()):
        unknown = [printable(name) for name in sorted(names - set(classes))]
        if split != "train" and classes and not names:  # a held-out split without classes
            continue
        if unknown or is_flat[split] != is_flat["train"]:
            what = f"has the folders {unknown}" if unknown else "has images outside class folders"
            known = f"the classes {classes}" if classes else "no classes"
            place = where[split] if where[split] != root else f"{root} (`{split}`)"
            raise InputError(
                f"data.source {place}: {what}, but `train` has {known}. Use the same layout and names for both"
            )
    return classes or None


def _describe_splits(splits: dict[str, list[Path]], depth: int | None) -> str:
    if len(splits) == 1:
        return ""
    if depth is None:
        return _listed(splits, "the file names")
    folders = {split: sorted({path.parts[depth] for path in paths}) for split, paths in splits.items()}
    named = [split if folders[split] == [split] else f"{split} ({printable(folders[split][0])})" for split in splits]
    return f"the splits {', '.join(named)}, each with "


def _listed(splits: dict[str, list[Path]], source: str) -> str:
    return f"the splits {', '.join(splits)} from {source}, each with "
