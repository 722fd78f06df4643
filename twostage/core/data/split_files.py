"""The splits of tables, archives and arrays, from the names of the files and their folders."""

import re
from pathlib import Path

from twostage.core.data.splits import exact_split, spelled_splits
from twostage.core.errors import InputError
from twostage.core.wording import printable, some_of

__all__ = ["split_files"]

_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}")


def split_files(root: Path, files: list[Path]) -> tuple[dict[str, list[Path]], list[Path]]:
    """The files of each split, by their own names or their folders' names, and the files that belong to none.

    If no name spells a split, all files are `train`, or, if there are any, only those directly in ``root``.

    Args:
        files: relative to ``root``, which is the file itself or a folder.

    Raises:
        InputError: a name spells two splits, none of several is `train`, or a shard is there twice.
    """
    splits = {file: _split_of(root, file) for file in files}
    direct = {split for file, split in splits.items() if split and len(file.parts) == 1}
    exact = {split for file, split in splits.items() if exact_split(_shard_name(file))}
    by_split: dict[str, list[Path]] = {}
    ignored = []
    for file, split in splits.items():
        name = _shard_name(file)
        # For `datasets`, `train_extra-00000-of-00001` next to `train-00000-of-00001` is a split of its own.
        another = _SHARD.fullmatch(file.stem) and split in exact and spelled_splits(name) and not exact_split(name)
        # If the folder itself has a split's files, deeper ones are copies or another dataset.
        if split is None or another or (split in direct and len(file.parts) > 1):
            ignored.append(file)
        else:
            by_split.setdefault(split, []).append(file)
    if not by_split:
        used = [file for file in files if len(file.parts) == 1] or files
        return {"train": used}, [file for file in files if file not in used]
    if ignored and "train" not in by_split:
        raise InputError(
            f"data.source {root}: has the splits {sorted(by_split)} and files whose names are not splits "
            f"({some_of(map(printable, ignored))}), expected one named train. Rename the one to train on to "
            f"train{ignored[0].suffix}"
        )
    for paths in by_split.values():
        _check_configurations(root, paths)
    return by_split, ignored


def _check_configurations(root: Path, paths: list[Path]) -> None:
    """Refuse the same shard in two folders: on the Hugging Face Hub, these are configurations, which may overlap."""
    found: dict[str, Path] = {}
    for path in paths:
        other = found.setdefault(path.name, path)
        if other != path and (_SHARD.fullmatch(path.stem) or path.stem.isdecimal()):
            level = next(i for i, (a, b) in enumerate(zip(other.parts, path.parts, strict=False)) if a != b)
            folders = [printable(root / Path(*one.parts[: level + 1])) for one in (other, path)]
            raise InputError(
                f"data.source {root}: {printable(path.name)} is in {folders[0]} and in {folders[1]}, which look like "
                f"two configurations of one dataset; expected one. Set data.source={folders[0]}, or another"
            )


def _split_of(root: Path, file: Path) -> str | None:
    """The split that a file's name spells, or else the nearest folder above it.

    Raises:
        InputError: the name and the folder spell two splits.
    """
    own = spelled_splits(_shard_name(file))
    above = next((splits for name in reversed(file.parts[:-1]) if (splits := spelled_splits(name))), set())
    if len(own | above) > 1:
        raise InputError(
            f"data.source {root}: {printable(file)} could be {' or '.join(sorted(own | above))} by its name, "
            "expected one split. Rename it or its folder"
        )
    return next(iter(own | above), None)


def _shard_name(file: Path) -> str:
    """`train` for `train-00000-of-00002.parquet`; the stem of a file that is not a shard."""
    shard = _SHARD.fullmatch(file.stem)
    return shard[1] if shard else file.stem
