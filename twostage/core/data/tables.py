"""Parquet and arrow files, and Hugging Face datasets, as sources of images."""

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

from twostage.core.data.captions import caption_column, column_cells, has_captions, read_captions
from twostage.core.data.image_folder import FolderContent
from twostage.core.data.labels import hub_features, label_candidates, label_column, table_labels
from twostage.core.data.records import Captions, Columns, Records, Source
from twostage.core.data.splits import exact_split, reads_as_held_out, spelled_splits
from twostage.core.errors import InputError
from twostage.core.images.conversion import open_image
from twostage.core.machine.progress import on_terminal
from twostage.core.wording import one_line, printable, some_of

__all__ = ["TABLE_SUFFIXES", "find_tables", "read_hub", "read_tables"]

TABLE_SUFFIXES = {".parquet", ".arrow"}
IMAGE_NAMES = ("image", "img", "png", "jpg", "jpeg", "webp", "picture", "photo", "pixels")
PATH_NAMES = ("image_path", "file_name", "filename", "path", "file")
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}")


def find_tables(content: FolderContent) -> list[Path]:
    """The tables of a folder that is a dataset of tables, relative to it; [] if tables only lie deeper than images.

    Files named `cache-*.arrow` are ignored: `datasets` keeps copies in them.
    """
    found = [
        path
        for path, reason in sorted(content.skipped.items())
        if path.suffix.lower() in TABLE_SUFFIXES and reason != "hidden" and not path.name.startswith("cache-")
    ]
    return [] if content.images and not any(len(path.parts) == 1 for path in found) else found


def read_tables(root: Path, files: list[Path], columns: Columns, content: FolderContent | None) -> Source:
    """Read tables as the splits that their names spell.

    Args:
        root: a folder, or a single table.
        files: the tables in the folder, relative to it; [] if ``root`` is a table.
        columns: what to read beside the images.
        content: everything in the folder; None if ``root`` is a table.

    Raises:
        InputError: a table is unreadable, or its split, images or labels are ambiguous.
    """
    folder = root if files else root.parent
    by_split, ignored = _table_splits(root, files or [Path(root.name)])
    tables = {}
    for split, paths in by_split.items():
        parts = [_read_table(folder / path) for path in paths]
        try:
            tables[split] = pa.concat_tables(parts, promote_options="permissive")
        except pa.ArrowException as error:
            raise InputError(
                f"data.source {root}: the files of `{split}` have different columns ({error}). Make them the same"
            ) from None
    used = [folder / path for paths in by_split.values() for path in paths]
    version = " ".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in used)
    source = _from_tables(f"{used[0].suffix[1:]} {root}", tables, printable(root), version, folder, columns)
    if ignored:
        source.notices.append(
            "tables not used, because their names are not splits, or because the split also exists higher up: "
            f"{some_of(map(printable, ignored))}; to train on one, move it next to the others and rename it to "
            "train-NAME.parquet"
        )
    if list(by_split) == ["train"] and (odd := [path for path in by_split["train"] if reads_as_held_out(str(path))]):
        source.notices.append(
            f"tables used for training although their names look held out: {some_of(map(printable, odd))}; if they are "
            "held out, rename them to test-NAME.parquet and the others to train-NAME.parquet"
        )
    if content:
        reasons = content.skipped | dict.fromkeys(ignored, "a table that is not a split")
        source.skipped = [f"{printable(root / p)} ({reasons[p]})" for p in reasons if root / p not in used]
        opened = {file for records in source.splits.values() for file in records.files or []}
        if unused := [path for path in content.images if (root / path).resolve() not in opened]:
            source.skipped += [f"{printable(root / path)} (in no table)" for path in unused]
            shown = some_of(map(printable, unused))
            source.notices.append(f"{len(unused):,} images next to the tables are in no table and not used: {shown}")
    return source


def _table_splits(root: Path, files: list[Path]) -> tuple[dict[str, list[Path]], list[Path]]:
    """The files of each split, by their own names or their folders' names, and the files that belong to none.

    If no name spells a split, all files are `train`, or, if there are any, only those directly in ``root``.
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
            f"data.source {root}: has the splits {sorted(by_split)} and tables whose names are not splits "
            f"({some_of(map(printable, ignored))}), expected one named train. Rename the one to train on to "
            "train.parquet"
        )
    return by_split, ignored


def _split_of(root: Path, file: Path) -> str | None:
    """The split that a table's name spells, or else the nearest folder above it.

    Raises:
        InputError: the name and the folder spell two splits.
    """
    own = spelled_splits(_shard_name(file))
    above = next((splits for name in reversed(file.parts[:-1]) if (splits := spelled_splits(name))), set())
    if len(own | above) > 1:
        raise InputError(
            f"data.source {root}: the table {printable(file)} could be {' or '.join(sorted(own | above))} by its name, "
            "expected one split. Rename it or its folder"
        )
    return next(iter(own | above), None)


def _shard_name(file: Path) -> str:
    """`train` for `train-00000-of-00002.parquet`; the stem of a file that is not a shard."""
    shard = _SHARD.fullmatch(file.stem)
    return shard[1] if shard else file.stem


def _read_table(file: Path) -> pa.Table:
    try:
        if file.suffix.lower() == ".parquet":
            return pq.ParquetFile(file).read()  # pq.read_table would turn folder names into columns
        source = pa.memory_map(str(file))
        try:
            return pa.ipc.open_file(source).read_all()
        except pa.ArrowInvalid:  # the stream format, which `datasets` writes
            source.seek(0)
            return pa.ipc.open_stream(source).read_all()
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"data.source {file}: not a readable {file.suffix} file ({error}). Copy the file again, or remove it"
        ) from None


def read_hub(name: str, searched: list[Path], columns: Columns) -> Source:
    """Load a Hugging Face dataset from the cache, or downloads it.

    Args:
        searched: the local paths that were tried before, for the message.

    Raises:
        InputError: the dataset is not available, or its splits, images or labels are ambiguous.
    """
    import datasets

    if not on_terminal():
        datasets.disable_progress_bars()  # in a file each bar is one long line
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # offline, the libraries below raise their own kinds of errors
        raise InputError(
            f"data.source {name!r}: not found on this machine (searched: {', '.join(map(str, searched))}) and not "
            f"available as a Hugging Face dataset ({type(error).__name__}: {one_line(error)}). Without a network, put "
            f"its train.parquet and test.parquet into $TWOSTAGE_DATA/{Path(name).name}/, or set data.source=FOLDER"
        ) from None
    parts = {str(split): part for split, part in loaded.items()}
    by_split, ignored = named_splits(name, parts)
    if not by_split and len(parts) == 1:  # a single split is for training, whatever its name
        by_split, ignored = {"train": ignored[0]}, []
    if not by_split:
        raise InputError(f"data.source {name}: has the splits {list(parts)}, expected one named train")
    tables = {split: parts[part].data.table for split, part in by_split.items()}
    version = " ".join(part._fingerprint for part in parts.values())
    source = _from_tables(f"Hugging Face dataset {name}", tables, name, version, None, columns)
    if ignored:
        shown = ", ".join(f"`{part}` ({len(parts[part]):,} rows)" for part in ignored)
        source.notices.append(f"splits not used, because they are none of train, val and test: {shown}")
    return source


def named_splits(origin: str, parts: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Sort a dataset's own splits into `train`, `val`, `test` and others.

    Raises:
        InputError: two of its splits mean the same one.
    """
    parts = list(parts)
    exact = {part: split for part in parts if (split := exact_split(part))}
    spelled = {part: next(iter(found)) for part in parts if len(found := spelled_splits(part)) == 1}
    chosen: dict[str, str] = {}
    for part, split in [*exact.items(), *((p, s) for p, s in spelled.items() if s not in exact.values())]:
        if chosen.setdefault(split, part) != part:
            raise InputError(
                f"data.source {origin}: its splits {chosen[split]!r} and {part!r} are both `{split}`, expected one"
            )
    return chosen, [part for part in parts if part not in chosen.values()]


# --- columns --------------------------------------------------------------------------------------------------------


def _from_tables(
    description: str,
    tables: dict[str, pa.Table],
    origin: str,
    version: str,
    folder: Path | None,
    columns: Columns,
) -> Source:
    """The splits of tables; ``folder`` is the folder that paths in a local table may not leave."""
    first = "train" if "train" in tables else next(iter(tables))
    column = _image_column(tables[first].schema, origin)
    for split, table in tables.items():
        if column not in table.schema.names:
            raise InputError(
                f"data.source {origin}: `{split}` has the columns {table.schema.names}, but `{first}` has "
                f"{tables[first].schema.names}. Use the same column names"
            )
    schemas = [tables[first].schema, *(table.schema for split, table in tables.items() if split != first)]
    labels_from, notices = label_column(columns.label, schemas, column, origin)
    if columns.label is not None and labels_from is None:
        notices += label_candidates(tables[first], column)
    class_names, labels = None, dict.fromkeys(tables)
    if labels_from:
        class_names, labels, more = table_labels(tables, labels_from, origin)
        notices += more
    captions, more = _captions(tables, columns.caption, schemas, [column, labels_from], origin)
    notices += more
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
            captions=captions[split],
        )
    return Source(description, splits, class_names, notices)


def _captions(
    tables: dict[str, pa.Table], wanted: str | None, schemas: list[pa.Schema], taken: list[str | None], origin: str
) -> tuple[dict[str, Captions | None], list[str]]:
    """The captions of each split (None in all of them if no image has one), and notices."""
    column, notices = caption_column(wanted, schemas, taken, origin)
    if column is None:
        return dict.fromkeys(tables), notices
    found = {
        split: read_captions(
            column_cells(table, column, f"{origin}: `{split}`"),
            [f"{origin}:{split}:{row}" for row in range(table.num_rows)],
            column,
        )
        for split, table in tables.items()
    }
    return found if any(map(has_captions, found.values())) else dict.fromkeys(tables), notices


def _image_column(schema: pa.Schema, origin: str) -> str:
    images = [name for name, about in hub_features(schema).items() if about.get("_type") == "Image"]
    for name in (*IMAGE_NAMES, *images, *PATH_NAMES):
        if name in schema.names:
            return name
    raise InputError(
        f"data.source {origin}: expected a column `image` (encoded images, or paths to them), got {schema.names}"
    )


def _open_cell(cell: Any, folder: Path | None) -> Image.Image:
    """The image in a cell: its bytes, or a file inside ``folder``; None for ``folder`` allows every file."""
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if isinstance(content, bytes):
        return open_image(io.BytesIO(content))
    if folder is None and isinstance(cell, dict) and cell.get("path"):
        return open_image(Path(cell["path"]))
    file = _cell_file(cell, folder)
    if file is None:
        raise ValueError("numbers, not an encoded image" if isinstance(content, list) else "no image in this row")
    assert folder is not None
    path = cell["path"] if isinstance(cell, dict) else cell
    if not file.is_relative_to(folder.resolve()):
        raise ValueError(f"the path {printable(path)} leaves the table's folder")
    if not file.is_file():
        raise ValueError(f"no such file: {printable(path)}")
    return open_image(file)


def _cell_file(cell: Any, folder: Path | None) -> Path | None:
    path = cell.get("path") if isinstance(cell, dict) and not cell.get("bytes") else cell
    return _within(folder, path) if isinstance(path, str) else None


def _within(folder: Path | None, path: str | None) -> Path | None:
    return (folder / path).resolve() if folder and path and "\0" not in path else None


def _paths(images: pa.ChunkedArray) -> list[str | None] | None:
    """The path in each row that does not contain the image itself; None if all rows contain it."""
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
    """The file of each row; None if any row contains the image itself."""
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
