"""Where pictures come from: a folder, parquet or arrow files, a Hugging Face dataset. Nothing is decoded here.

A source is named by `data.source`. A local one never touches the network.
"""

import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq
from PIL import Image

from core.errors import InputError
from core.files import expand_home
from core.images import open_picture, printable, quiet_decoders
from core.picture_folder import SPLIT_NAMES, read_folder

__all__ = ["Records", "Source", "find_local", "find_source", "first_form", "shortened"]

TABLE_SUFFIXES = {".parquet", ".arrow"}
KNOWN_NAMES = {"mnist": "ylecun/mnist", "fashion_mnist": "zalando-datasets/fashion_mnist", "cifar10": "uoft-cs/cifar10"}


@dataclass
class Records:
    """The undecoded pictures of one split: a name for messages, a label, and how to open each."""

    names: list[str]
    labels: np.ndarray | None  # (n,) int64
    open: Callable[[int], Image.Image]
    sizes: Callable[[], np.ndarray]
    """Bytes of each picture, (n,) int64; 0 for one that is not there."""
    origin: str
    """What the names begin with: where they are, which does not matter to what they are."""
    files: list[Path] | None = None
    """Where each picture has a file of its own."""
    version: str = ""
    """Changes when a file that holds many pictures does."""

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: np.ndarray) -> "Records":
        """Some of them, in that order."""
        return Records(
            [self.names[row] for row in rows],
            None if self.labels is None else self.labels[rows],
            lambda i: self.open(int(rows[i])),
            lambda: self.sizes()[rows],
            self.origin,
            None if self.files is None else [self.files[row] for row in rows],
            self.version,
        )


@dataclass
class Source:
    """What was understood of a `data.source`."""

    description: str
    splits: dict[str, Records]
    class_names: list[str] | None
    notices: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Files that are no pictures, each with the reason."""


def find_source(name: str) -> Source:
    """Finds ``name`` as a path, then under ``$TWOSTAGE_DATA``, then as a Hugging Face dataset ``owner/name``.

    Raises:
        InputError: nothing was found, it is empty, or its layout is ambiguous; says where it was looked for.
    """
    candidates, looks_local = _candidates(name)
    if found := find_local(name):
        return _read_local(found)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not looks_local:
        return _read_hub(name, candidates)
    hint = ""
    if not os.environ.get("TWOSTAGE_DATA") and not looks_local:
        hint = "; the variable TWOSTAGE_DATA (a folder that holds datasets by name) is not set"
    if name in KNOWN_NAMES:
        hint += f"; data.source={KNOWN_NAMES[name]} downloads it"
    looked = ", ".join(str(candidate) for candidate in candidates)
    raise InputError(f"data.source {name!r}: nothing there (looked for {looked}){hint}")


def find_local(name: str) -> Path | None:
    """The file or folder that ``name`` means; None for `shapes`, and where there is none on this disk."""
    if name == "shapes":
        return None
    return next((candidate for candidate in _candidates(name)[0] if candidate.exists()), None)


def _candidates(name: str) -> tuple[list[Path], bool]:
    """Where ``name`` is looked for on this disk, and whether it cannot be but a path."""
    path = Path(expand_home(name))
    root = os.environ.get("TWOSTAGE_DATA")
    looks_local = name.startswith((".", "/", "~")) or path.suffix in TABLE_SUFFIXES or name.count("/") > 1
    if not root or looks_local:
        return [path], looks_local
    return [path, *dict.fromkeys([Path(root) / name, Path(root) / Path(name).name])], looks_local


def first_form(source: str) -> tuple[tuple[int, int], int]:
    """The size (at most 256) and the channels of the first readable picture; 32x32 RGB for `shapes`."""
    quiet_decoders()
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
    found = read_folder(root)
    splits = {}
    for split, files in found.splits.items():
        labels = None if found.labels is None else np.array(found.labels[split], dtype=np.int64)
        splits[split] = Records(
            [printable(file) for file in files],
            labels,
            lambda i, files=files: open_picture(files[i]),
            lambda files=files: np.array([file.stat().st_size if file.exists() else 0 for file in files], np.int64),
            printable(root),
            files,
        )
    names = None if found.class_names is None else [printable(name) for name in found.class_names]
    layout = "pictures without classes" if names is None else f"one folder a class ({len(names)} classes)"
    within = f"the splits {', '.join(splits)}, each " if len(splits) > 1 else ""
    skipped = [f"{printable(path)} ({reason})" for path, reason in found.skipped.items()]
    notices = []
    if skipped:
        within_root = [line.removeprefix(f"{printable(root)}/") for line in skipped]
        notices.append(f"files left out because they are no pictures: {len(skipped)}: {shortened(within_root)}")
    return Source(f"folder {printable(root)}: {within}{layout}", splits, names, notices, skipped)


def shortened(names: list[str], most: int = 5) -> str:
    """The first of many names."""
    return "; ".join(names[:most]) + (f"; and {len(names) - most:,} more" if len(names) > most else "")


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
    folder = root if root.is_dir() else root.parent
    return _from_tables(f"{files[0].suffix[1:]} {root}", tables, printable(root), version, folder)


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
    return _from_tables(f"Hugging Face dataset {name}", tables, name, version, None)


def _from_tables(
    description: str, tables: dict[str, pa.Table], origin: str, version: str, folder: Path | None
) -> Source:
    """The splits of tables; ``folder`` is what the paths in a local one are within."""
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
        splits[split] = Records(
            names,
            labels,
            lambda i, images=images: _open_cell(images[i].as_py(), folder),
            lambda images=images: _cell_sizes(images),
            origin,
            version=version,
        )
    return Source(description, splits, class_names)


def _open_cell(cell: Any, folder: Path | None) -> Image.Image:
    """The picture of a row: its bytes, or a file within ``folder``; anywhere, for what the hub's library has made."""
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if content is not None:
        return open_picture(io.BytesIO(content))
    path = cell.get("path") if isinstance(cell, dict) else None
    if not path:
        raise ValueError("the row holds no picture")
    if folder is None:
        return open_picture(Path(path))
    file = (folder / path).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise ValueError(f"its path {printable(path)} leads out of the table's folder")
    return open_picture(file)


def _cell_sizes(images: pa.ChunkedArray) -> np.ndarray:
    content = pc.struct_field(images, "bytes") if pa.types.is_struct(images.type) else images  # type: ignore[attr-defined]
    return pc.fill_null(pc.binary_length(content), 0).to_numpy().astype(np.int64)  # type: ignore[attr-defined]


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
