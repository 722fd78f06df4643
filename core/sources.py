"""Where pictures come from: a folder, parquet or arrow files, a Hugging Face dataset. Nothing is decoded here.

A source is named by `data.source`. A local one never touches the network.
"""

import io
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
from PIL import Image

from core.errors import InputError

__all__ = ["Records", "Source", "find_source", "first_form"]

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
TABLE_SUFFIXES = {".parquet", ".arrow"}
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
KNOWN_NAMES = {"mnist": "ylecun/mnist", "fashion_mnist": "zalando-datasets/fashion_mnist", "cifar10": "uoft-cs/cifar10"}


@dataclass
class Records:
    """The undecoded pictures of one split: a name for messages, a label, and how to open each."""

    names: list[str]
    labels: np.ndarray | None  # (n,) int64
    open: Callable[[int], Image.Image]
    version: str = ""
    """Changes when a file that holds many pictures does; a picture's own file tells by its size and time."""

    def __len__(self) -> int:
        return len(self.names)


@dataclass
class Source:
    """What was understood of a `data.source`."""

    description: str
    splits: dict[str, Records]
    class_names: list[str] | None
    notices: list[str] = field(default_factory=list)


def find_source(name: str) -> Source:
    """Finds ``name`` as a path, then under ``$TWOSTAGE_DATA``, then as a Hugging Face dataset ``owner/name``.

    Raises:
        InputError: nothing was found, it is empty, or its layout is ambiguous; says where it was looked for.
    """
    path = Path(name).expanduser()
    root = os.environ.get("TWOSTAGE_DATA")
    looks_local = name.startswith((".", "/", "~")) or path.suffix in TABLE_SUFFIXES or name.count("/") > 1
    candidates = [path]
    if root and not looks_local:
        candidates += dict.fromkeys([Path(root) / name, Path(root) / Path(name).name])
    for candidate in candidates:
        if candidate.exists():
            return _read_local(candidate)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not looks_local:
        return _read_hub(name, candidates)
    hint = ""
    if not root and not looks_local:
        hint = "; the variable TWOSTAGE_DATA (a folder that holds datasets by name) is not set"
    if name in KNOWN_NAMES:
        hint += f"; data.source={KNOWN_NAMES[name]} downloads it"
    looked = ", ".join(str(candidate) for candidate in candidates)
    raise InputError(f"data.source {name!r}: nothing there (looked for {looked}){hint}")


def first_form(source: str) -> tuple[tuple[int, int], int]:
    """The size (at most 256) and the channels of the first readable picture; 32x32 RGB for `shapes`."""
    splits = {} if source == "shapes" else find_source(source).splits
    for records in splits.values():
        for row in range(len(records)):
            try:
                with records.open(row) as image:
                    scale = min(1.0, 256 / max(image.size))
                    height, width = max(1, round(image.height * scale)), max(1, round(image.width * scale))
                    return (height, width), 1 if image.mode in ("1", "L", "LA", "I", "I;16") else 3
            except Exception:  # counted and named by load_images
                continue
    return (32, 32), 3


def _read_local(path: Path) -> Source:
    if path.is_file():
        if path.suffix not in TABLE_SUFFIXES:
            raise InputError(f"data.source {path}: expected a folder, or a .parquet or .arrow file, got a single file")
        return _read_tables(path, [path])
    tables = sorted(p for p in path.iterdir() if p.suffix in TABLE_SUFFIXES)
    return _read_tables(path, tables) if tables else _read_folder(path)


# --- a folder of pictures -------------------------------------------------------------------------------------------


def _read_folder(root: Path) -> Source:
    folders = [p for p in _subfolders(root) if _holds_images(p)]
    split_folders = {SPLIT_NAMES[p.name.lower()]: p for p in folders if p.name.lower() in SPLIT_NAMES}
    beside = [p.name for p in folders if p.name.lower() not in SPLIT_NAMES]
    if _images_directly_in(root) or (beside and "train" not in split_folders) or not folders:
        split_folders = {"train": root}
    elif beside:
        raise InputError(
            f"data.source {root}: holds the split `train` and also the folders {', '.join(beside[:5])}; expected "
            "either only train, val and test or one folder a class"
        )
    elif "train" not in split_folders:
        raise InputError(f"data.source {root}: has the splits {list(split_folders)}, expected one named train")
    classes = [p.name for p in _subfolders(split_folders["train"]) if _holds_images(p)]
    flat = bool(_images_directly_in(split_folders["train"]))
    if flat and classes:
        raise InputError(
            f"data.source {split_folders['train']}: holds pictures and also folders of pictures "
            f"({', '.join(classes[:5])}); expected either pictures only (no classes) or one folder a class"
        )
    splits, others = {}, 0
    for split, folder in split_folders.items():
        unknown = [p.name for p in _subfolders(folder) if p.name not in classes and _holds_images(p)]
        if unknown or (not flat and _images_directly_in(folder)):
            what = f"has the folders {unknown}" if unknown else "holds pictures outside class folders"
            known = f"the classes {classes}; name them alike" if classes else "no classes; give both the same layout"
            raise InputError(f"data.source {folder}: {what}, but `train` has {known}")
        if flat:
            paths, labels = _find_images(folder), None
        else:
            of_class = [_find_images(folder / name) if (folder / name).is_dir() else [] for name in classes]
            paths = [path for group in of_class for path in group]
            labels = np.repeat(np.arange(len(classes)), [len(group) for group in of_class])
        visible = (p for p in folder.rglob("*") if p.is_file() and not _is_hidden(p, folder))
        others += sum(1 for p in visible if p.suffix.lower() not in IMAGE_SUFFIXES)
        splits[split] = Records([str(p) for p in paths], labels, lambda i, paths=paths: Image.open(paths[i]))
    if not any(len(records) for records in splits.values()):
        known = " ".join(sorted(IMAGE_SUFFIXES))
        raise InputError(f"data.source {root}: no pictures in this folder (looked for {known}, .parquet and .arrow)")
    layout = "pictures without classes" if flat else f"one folder a class ({len(classes)} classes)"
    within = f"the splits {', '.join(splits)}, each " if len(splits) > 1 or root not in split_folders.values() else ""
    notices = [f"{others} files in {root} are no pictures and are left out"] if others else []
    return Source(f"folder {root}: {within}{layout}", splits, None if flat else classes, notices)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images_directly_in(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]


def _find_images(folder: Path) -> list[Path]:
    return sorted(_images_below(folder))


def _holds_images(folder: Path) -> bool:
    return next(_images_below(folder), None) is not None


def _images_below(folder: Path) -> Iterator[Path]:
    found = (p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not _is_hidden(p, folder))
    return (p for p in found if p.is_file())


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


# --- parquet and arrow files, Hugging Face datasets -------------------------------------------------------------------


def _read_tables(root: Path, files: list[Path]) -> Source:
    by_split: dict[str, list[pa.Table]] = {}
    for file in files:
        first_word = re.split(r"[-_.]", file.name.lower())[0]
        try:
            table = _read_table(file)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"data.source {file}: not a readable {file.suffix} file: {error}") from None
        by_split.setdefault(SPLIT_NAMES.get(first_word, "train"), []).append(table)
    tables = {}
    for split, parts in by_split.items():
        try:
            tables[split] = pa.concat_tables(parts, promote_options="permissive")
        except pa.ArrowException as error:
            raise InputError(f"data.source {root}: the files of `{split}` do not fit together: {error}") from None
    version = " ".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)
    return _from_tables(f"{files[0].suffix[1:]} {root}", tables, str(root), version)


def _read_table(file: Path) -> pa.Table:
    if file.suffix == ".parquet":
        return pq.read_table(file)
    source = pa.memory_map(str(file))
    try:
        return pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid:  # the stream format, which Hugging Face datasets writes
        source.seek(0)
        return pa.ipc.open_stream(source).read_all()


def _read_hub(name: str, looked: list[Path]) -> Source:
    import datasets

    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # the libraries below raise their own families of errors when offline
        places = ", ".join(str(path) for path in looked)
        raise InputError(
            f"data.source {name!r}: not on this machine (looked for {places}), and it could not be had as a Hugging "
            f"Face dataset ({type(error).__name__}: {' '.join(str(error).split())[:200]}). Without a network, put its "
            f"train.parquet and test.parquet into $TWOSTAGE_DATA/{Path(name).name}/, or give data.source=FOLDER"
        ) from None
    tables = {SPLIT_NAMES.get(str(split), str(split)): part.data.table for split, part in loaded.items()}
    version = " ".join(part._fingerprint for part in loaded.values())
    return _from_tables(f"Hugging Face dataset {name}", tables, name, version)


def _from_tables(description: str, tables: dict[str, pa.Table], origin: str, version: str) -> Source:
    first = "train" if "train" in tables else next(iter(tables))
    schema = tables[first].schema
    column = next((n for n in ("image", "img", "png", "jpg", "pixels") if n in schema.names), None)
    if column is None:
        raise InputError(f"data.source {origin}: expected a column `image`, got {schema.names}")
    label_column = next((n for n in ("label", "labels", "class", "fine_label") if n in schema.names), None)
    for split, table in tables.items():
        if not {column, label_column} - {None} <= set(table.schema.names):
            raise InputError(
                f"data.source {origin}: `{split}` has the columns {table.schema.names}, but `{first}` has "
                f"{schema.names}; name them alike"
            )
    class_names = _class_names(schema, tables, label_column)
    splits = {}
    for split, table in tables.items():
        images = table.column(column)
        labels = None
        if label_column and class_names:
            labels = _labels(table, label_column, class_names, f"{origin}: `{split}`")
        names = [f"{origin}:{split}:{row}" for row in range(table.num_rows)]
        splits[split] = Records(names, labels, lambda i, images=images: _open_cell(images[i].as_py()), version)
    return Source(description, splits, class_names)


def _open_cell(cell: Any) -> Image.Image:
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if content is None:
        path = cell.get("path") if isinstance(cell, dict) else None
        if not path:
            raise ValueError("the row holds no picture")
        return Image.open(path)
    return Image.open(io.BytesIO(content))


def _class_names(schema: pa.Schema, tables: dict[str, pa.Table], column: str | None) -> list[str] | None:
    if column is None:
        return None
    try:  # the names that Hugging Face datasets keeps in the file's metadata
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[column]["names"]]
    except (KeyError, ValueError, TypeError):
        pass
    values = {value for table in tables.values() for value in table.column(column).to_pylist() if value is not None}
    if all(isinstance(value, int) for value in values):
        return [str(i) for i in range(max(values) + 1)] if values else None
    return sorted(map(str, values))


def _labels(table: pa.Table, column: str, class_names: list[str], origin: str) -> np.ndarray:
    values = table.column(column).to_pylist()
    index = {name: i for i, name in enumerate(class_names)}
    labels = np.array([v if isinstance(v, int) else index.get(str(v), -1) for v in values], dtype=np.int64)
    wrong = np.flatnonzero((labels < 0) | (labels >= len(class_names)))
    if len(wrong):
        row = int(wrong[0])
        raise InputError(
            f"data.source {origin} has in row {row} the {column} {values[row]!r}; "
            f"expected a number from 0 to {len(class_names) - 1} or one of its class names"
        )
    return labels
