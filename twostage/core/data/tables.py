"""Parquet and arrow files, and Hugging Face datasets, as sources of pictures."""

import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq
from PIL import Image

from twostage.core.data.image_folder import FolderContent
from twostage.core.data.labels import hub_features, label_candidates, label_column, read_labels
from twostage.core.data.records import Records, Source, shortened
from twostage.core.data.splits import exact_split, reads_as_held_out, spelled_splits
from twostage.core.errors import InputError
from twostage.core.images.conversion import open_image, printable
from twostage.core.machine.progress import on_terminal

__all__ = ["TABLE_SUFFIXES", "find_tables", "read_hub", "read_tables"]

TABLE_SUFFIXES = {".parquet", ".arrow"}
IMAGE_NAMES = ("image", "img", "png", "jpg", "jpeg", "webp", "picture", "photo", "pixels")
PATH_NAMES = ("image_path", "file_name", "filename", "path", "file")
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}")


def find_tables(content: FolderContent) -> list[Path]:
    """The tables of a folder that is a dataset of tables, relative to it; [] where the only tables lie among pictures.
    `cache-*.arrow` does not count: `datasets` keeps copies there."""
    found = [
        path
        for path, reason in sorted(content.skipped.items())
        if path.suffix.lower() in TABLE_SUFFIXES and reason != "hidden" and not path.name.startswith("cache-")
    ]
    return [] if content.pictures and not any(len(path.parts) == 1 for path in found) else found


def read_tables(root: Path, files: list[Path], wanted_label: str | None, content: FolderContent | None) -> Source:
    """Reads tables as the splits that their names spell.

    Args:
        files: relative to ``root``; or ``root`` itself is the one table, and this is [].
        wanted_label: `data.label_column`.
        content: of the folder ``root``.

    Raises:
        InputError: a table that cannot be read, or whose split, pictures or labels are not clear.
    """
    folder = root if files else root.parent
    by_split, ignored = _table_splits(root, files or [Path(root.name)])
    tables = {}
    for split, paths in by_split.items():
        parts = [_read_table(folder / path) for path in paths]
        try:
            tables[split] = pa.concat_tables(parts, promote_options="permissive")
        except pa.ArrowException as error:
            raise InputError(f"data.source {root}: the files of `{split}` do not fit together: {error}") from None
    used = [folder / path for paths in by_split.values() for path in paths]
    version = " ".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in used)
    source = _from_tables(f"{used[0].suffix[1:]} {root}", tables, printable(root), version, folder, wanted_label)
    if ignored:
        names = shortened([printable(path) for path in ignored])
        source.notices.append(
            f"tables that are not used, because their names are no split or the split lies higher up: {names}; to "
            "train on one, put it beside the others and call it train-NAME.parquet"
        )
    if list(by_split) == ["train"] and (odd := [path for path in by_split["train"] if reads_as_held_out(str(path))]):
        source.notices.append(
            f"tables that are trained on, though their names read as held out: {shortened(list(map(printable, odd)))}; "
            "if they are, call them test-NAME.parquet and the others train-NAME.parquet"
        )
    if content:
        reasons = content.skipped | dict.fromkeys(ignored, "a table that is no split")
        source.skipped = [f"{printable(root / p)} ({reasons[p]})" for p in reasons if root / p not in used]
        opened = {file for records in source.splits.values() for file in records.files or []}
        if unused := [path for path in content.pictures if (root / path).resolve() not in opened]:
            source.skipped += [f"{printable(root / path)} (in no table)" for path in unused]
            names = shortened([printable(path) for path in unused])
            source.notices.append(f"{len(unused):,} pictures beside the tables are not used: {names}")
    return source


def _table_splits(root: Path, files: list[Path]) -> tuple[dict[str, list[Path]], list[Path]]:
    """The files of each split, and those that are none: by their own names or by the folder that they are in. Where no
    name says anything, all are `train`, or those directly in ``root``."""
    splits = {file: _split_of(root, file) for file in files}
    direct = {split for file, split in splits.items() if split and len(file.parts) == 1}
    exact = {split for file, split in splits.items() if exact_split(_shard_name(file))}
    by_split: dict[str, list[Path]] = {}
    ignored = []
    for file, split in splits.items():
        name = _shard_name(file)
        # `datasets` takes `train_extra-00000-of-00001` beside `train-00000-of-00001` for another split.
        another = _SHARD.fullmatch(file.stem) and split in exact and spelled_splits(name) and not exact_split(name)
        # Where a split lies in the folder itself, what lies deeper is a copy or another dataset.
        if split is None or another or (split in direct and len(file.parts) > 1):
            ignored.append(file)
        else:
            by_split.setdefault(split, []).append(file)
    if not by_split:
        used = [file for file in files if len(file.parts) == 1] or files
        return {"train": used}, [file for file in files if file not in used]
    if ignored and "train" not in by_split:
        raise InputError(
            f"data.source {root}: has the splits {sorted(by_split)} and tables whose names are none "
            f"({shortened([printable(file) for file in ignored])}); call the one to train on train.parquet"
        )
    return by_split, ignored


def _split_of(root: Path, file: Path) -> str | None:
    """The split that a table's name, or else the nearest folder above it that spells any, spells.

    Raises:
        InputError: they spell two.
    """
    own = spelled_splits(_shard_name(file))
    above = next((splits for name in reversed(file.parts[:-1]) if (splits := spelled_splits(name))), set())
    if len(own | above) > 1:
        raise InputError(
            f"data.source {root}: the table {printable(file)} could be {' or '.join(sorted(own | above))} by its name; "
            "give it, and its folder, the name of one split"
        )
    return next(iter(own | above), None)


def _shard_name(file: Path) -> str:
    """`train` of `train-00000-of-00002.parquet`; the file's stem where it is no shard."""
    shard = _SHARD.fullmatch(file.stem)
    return shard[1] if shard else file.stem


def _read_table(file: Path) -> pa.Table:
    try:
        if file.suffix.lower() == ".parquet":
            return pq.ParquetFile(file).read()  # pq.read_table would make columns of the folders' names
        source = pa.memory_map(str(file))
        try:
            return pa.ipc.open_file(source).read_all()
        except pa.ArrowInvalid:  # the stream format, which Hugging Face datasets writes
            source.seek(0)
            return pa.ipc.open_stream(source).read_all()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"data.source {file}: not a readable {file.suffix} file: {error}") from None


def read_hub(name: str, looked: list[Path], wanted_label: str | None) -> Source:
    """Downloads a Hugging Face dataset, or takes it from the cache.

    Args:
        looked: where ``name`` was looked for before, for the message.

    Raises:
        InputError: it is not there, or what it holds is not clear.
    """
    import datasets

    if not on_terminal():
        datasets.disable_progress_bars()  # in a file each of them is one long line
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # the libraries below raise their own families of errors when offline
        places = ", ".join(str(path) for path in looked)
        raise InputError(
            f"data.source {name!r}: not on this machine (looked for {places}), and it could not be had as a Hugging "
            f"Face dataset ({type(error).__name__}: {' '.join(str(error).split())[:200]}). Without a network, put its "
            f"train.parquet and test.parquet into $TWOSTAGE_DATA/{Path(name).name}/, or give data.source=FOLDER"
        ) from None
    parts = {str(split): part for split, part in loaded.items()}
    by_split, ignored = named_splits(name, parts)
    if not by_split and len(parts) == 1:  # a lone split of any name is what there is to train on
        by_split, ignored = {"train": ignored[0]}, []
    if not by_split:
        raise InputError(f"data.source {name}: has the splits {list(parts)}, expected one named train")
    tables = {split: parts[part].data.table for split, part in by_split.items()}
    version = " ".join(part._fingerprint for part in parts.values())
    source = _from_tables(f"Hugging Face dataset {name}", tables, name, version, None, wanted_label)
    if ignored:
        shown = ", ".join(f"`{part}` ({len(parts[part]):,} rows)" for part in ignored)
        source.notices.append(f"splits that are not used, because they are none of train, val and test: {shown}")
    return source


def named_splits(origin: str, parts: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Which of a dataset's own splits is `train`, `val` and `test`, and which are none of them.

    Raises:
        InputError: two are the same one.
    """
    parts = list(parts)
    exact = {part: split for part in parts if (split := exact_split(part))}
    spelled = {part: next(iter(found)) for part in parts if len(found := spelled_splits(part)) == 1}
    chosen: dict[str, str] = {}
    for part, split in [*exact.items(), *((p, s) for p, s in spelled.items() if s not in exact.values())]:
        if chosen.setdefault(split, part) != part:
            raise InputError(
                f"data.source {origin}: its splits {chosen[split]!r} and {part!r} are both `{split}`; expected one"
            )
    return chosen, [part for part in parts if part not in chosen.values()]


# --- columns --------------------------------------------------------------------------------------------------------


def _from_tables(
    description: str,
    tables: dict[str, pa.Table],
    origin: str,
    version: str,
    folder: Path | None,
    wanted_label: str | None,
) -> Source:
    """The splits of tables; ``folder`` is what the paths in a local one are within."""
    first = "train" if "train" in tables else next(iter(tables))
    column = _image_column(tables[first].schema, origin)
    for split, table in tables.items():
        if column not in table.schema.names:
            raise InputError(
                f"data.source {origin}: `{split}` has the columns {table.schema.names}, but `{first}` has "
                f"{tables[first].schema.names}; name them alike"
            )
    schemas = [tables[first].schema, *(table.schema for split, table in tables.items() if split != first)]
    labels_from, notices = label_column(wanted_label, schemas, column, origin)
    if wanted_label is not None and labels_from is None:
        notices += label_candidates(tables[first], column)
    class_names, labels = None, dict.fromkeys(tables)
    if labels_from:
        class_names, labels, said = read_labels(tables, labels_from, origin)
        notices += said
    splits = {}
    for split, table in tables.items():
        images = table.column(column)
        splits[split] = Records(
            [f"{origin}:{split}:{row}" for row in range(table.num_rows)],
            labels[split],
            lambda i, images=images: _open_cell(images[i].as_py(), folder),
            lambda images=images: _cell_sizes(images, folder),
            origin,
            files=_cell_files(images, folder),
            version=version,
        )
    return Source(description, splits, class_names, notices)


def _image_column(schema: pa.Schema, origin: str) -> str:
    images = [name for name, about in hub_features(schema).items() if about.get("_type") == "Image"]
    for name in (*IMAGE_NAMES, *images, *PATH_NAMES):
        if name in schema.names:
            return name
    raise InputError(
        f"data.source {origin}: expected a column `image` (encoded pictures, or paths to them), got {schema.names}"
    )


def _open_cell(cell: Any, folder: Path | None) -> Image.Image:
    """The picture of a row: its bytes, or a file within ``folder``; anywhere, for what the hub's library has made."""
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if isinstance(content, bytes):
        return open_image(io.BytesIO(content))
    if folder is None and isinstance(cell, dict) and cell.get("path"):
        return open_image(Path(cell["path"]))
    file = _cell_file(cell, folder)
    if file is None:
        what = "holds no picture" if not isinstance(content, list) else "holds numbers, expected an encoded picture"
        raise ValueError(f"the row {what}")
    assert folder is not None
    path = cell["path"] if isinstance(cell, dict) else cell
    if not file.is_relative_to(folder.resolve()):
        raise ValueError(f"its path {printable(path)} leads out of the table's folder")
    if not file.is_file():
        raise ValueError(f"no such file: {printable(path)}")
    return open_image(file)


def _cell_file(cell: Any, folder: Path | None) -> Path | None:
    path = cell.get("path") if isinstance(cell, dict) and not cell.get("bytes") else cell
    return _within(folder, path) if isinstance(path, str) else None


def _within(folder: Path | None, path: str | None) -> Path | None:
    return (folder / path).resolve() if folder and path and "\0" not in path else None


def _paths(images: pa.ChunkedArray) -> list[str | None] | None:
    """The path in each row that does not hold the picture itself; None where all do."""
    if pa.types.is_string(images.type) or pa.types.is_large_string(images.type):
        return images.to_pylist()
    fields = [field.name for field in images.type] if pa.types.is_struct(images.type) else []
    if "path" not in fields:
        return None
    paths = pc.struct_field(images, "path").to_pylist()  # type: ignore[attr-defined]
    if "bytes" not in fields:
        return paths
    content = pc.struct_field(images, "bytes")  # type: ignore[attr-defined]
    if not content.null_count:
        return None
    return [path if empty else None for path, empty in zip(paths, content.is_null().to_pylist(), strict=True)]


def _cell_files(images: pa.ChunkedArray, folder: Path | None) -> list[Path] | None:
    """The file of each row; None where any holds the picture itself."""
    files = [_within(folder, path) for path in _paths(images) or [None]]
    return [file for file in files if file] if all(files) else None


def _cell_sizes(images: pa.ChunkedArray, folder: Path | None) -> np.ndarray:
    content = images
    if pa.types.is_struct(images.type) and "bytes" in [field.name for field in images.type]:
        content = pc.struct_field(images, "bytes")  # type: ignore[attr-defined]
    sizes = np.zeros(len(images), dtype=np.int64)
    if pa.types.is_binary(content.type) or pa.types.is_large_binary(content.type):
        sizes = pc.fill_null(pc.binary_length(content), 0).to_numpy().astype(np.int64)  # type: ignore[attr-defined]
    for row, path in enumerate(_paths(images) or []):
        if (file := _within(folder, path)) and file.is_file():
            sizes[row] = file.stat().st_size
    return sizes
