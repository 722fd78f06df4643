"""The columns of tables: images, classes, captions, vectors and maps."""

import io
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from twostage.core.data.captions import caption_column, column_cells, has_captions, read_captions
from twostage.core.data.folder_content import file_records
from twostage.core.data.labels import hub_features, label_candidates, label_column, table_labels
from twostage.core.data.maps import map_files, with_maps
from twostage.core.data.records import Captions, Columns, Records, Source
from twostage.core.data.vectors import check_same_length, read_vectors
from twostage.core.errors import InputError
from twostage.core.images.conversion import open_image
from twostage.core.wording import printable

__all__ = ["source_of_tables"]

IMAGE_NAMES = ("image", "img", "png", "jpg", "jpeg", "webp", "picture", "photo", "pixels")
PATH_NAMES = ("image_path", "file_name", "filename", "path", "file")


def source_of_tables(
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
    taken = [column, labels_from, columns.vector, columns.maps]
    captions, more = _captions(tables, columns.caption, schemas, taken, origin)
    notices += more
    vectors = _vectors(tables, columns.vector, origin)
    splits = {
        split: replace(
            _images(table.column(column), f"{origin}:{split}:", origin, version, folder),
            labels=labels[split],
            captions=captions[split],
            vectors=vectors[split],
        )
        for split, table in tables.items()
    }
    if columns.maps is not None:
        splits = _add_maps(splits, tables, columns.maps, folder)
    return Source(description, splits, class_names, notices)


def _images(cells: pa.ChunkedArray, prefix: str, origin: str, version: str, folder: Path | None) -> Records:
    """The images in a column; row 7 is called ``prefix`` and 7."""
    return Records(
        [f"{prefix}{row}" for row in range(len(cells))],
        None,
        partial(_open_cell, cells, folder),
        partial(_cell_sizes, cells, folder),
        origin,
        files=_cell_files(cells, folder),
        version=version,
    )


def _captions(
    tables: dict[str, pa.Table], wanted: str | None, schemas: list[pa.Schema], taken: list[str | None], origin: str
) -> tuple[dict[str, Captions | None], list[str]]:
    """The captions of each split (None in all of them if no image has one), and notices."""
    column, notices = caption_column(wanted, schemas, taken, origin)
    if column is None:
        return dict.fromkeys(tables), notices
    found: dict[str, Captions | None] = {}
    for split, table in tables.items():
        names = [f"{origin}:{split}:{row}" for row in range(table.num_rows)]
        found[split] = read_captions(column_cells(table, column, f"{origin}: `{split}`"), names, column)
    return found if any(map(has_captions, found.values())) else dict.fromkeys(tables), notices


def _vectors(tables: dict[str, pa.Table], column: str | None, origin: str) -> dict[str, np.ndarray | None]:
    if column is None:
        return dict.fromkeys(tables)
    found: dict[str, np.ndarray | None] = {}
    for split, table in tables.items():
        if column not in table.schema.names:
            raise InputError(
                f"data.vector_column {column!r}: expected a column of {origin}, whose `{split}` has "
                f"{table.schema.names}"
            )
        names = [f"{origin}:{split}:{row}" for row in range(table.num_rows)]
        found[split] = read_vectors(table.column(column), names, column)
    check_same_length(found, column)
    return found


def _add_maps(
    splits: dict[str, Records], tables: dict[str, pa.Table], maps: str, folder: Path | None
) -> dict[str, Records]:
    """The splits with the maps in the column ``maps``, or in the folder of that name if images are files.

    Raises:
        InputError: there is no such column in all splits and no such folder, or an image has no map.
    """
    found: dict[str, Records] = {}
    if any(maps in table.schema.names for table in tables.values()):
        for split, images in splits.items():
            if maps not in tables[split].schema.names:
                raise InputError(
                    f"data.maps {maps!r}: expected this column in all splits, but `{split}` has "
                    f"{tables[split].schema.names}. Add it, or remove data.maps"
                )
            cells, version = tables[split].column(maps), f"{maps} {images.version}"
            prefix = f"{images.origin}:{split}:{maps}:"
            found[split] = with_maps(images, _images(cells, prefix, images.origin, version, folder))
        return found
    files = {split: list(map(Path, images.files)) for split, images in splits.items() if images.files is not None}
    if folder is None or len(files) < len(splits):
        origin, names = next(iter(splits.values())).origin, next(iter(tables.values())).schema.names
        raise InputError(f"data.maps {maps!r}: expected a column of {origin}, which has {names}")
    root = folder.resolve()
    relative = {
        split: [file.relative_to(root) if file.is_relative_to(root) else Path(file.name) for file in paths]
        for split, paths in files.items()
    }
    for split, paths in map_files(Path(maps), relative).items():
        found[split] = with_maps(splits[split], file_records(paths, maps))
    return found


def _image_column(schema: pa.Schema, origin: str) -> str:
    images = [name for name, about in hub_features(schema).items() if about.get("_type") == "Image"]
    for name in (*IMAGE_NAMES, *images, *PATH_NAMES):
        if name in schema.names:
            return name
    raise InputError(
        f"data.source {origin}: expected a column `image` (encoded images, or paths to them), got {schema.names}"
    )


def _open_cell(cells: pa.ChunkedArray, folder: Path | None, row: int) -> Image.Image:
    """The image in a cell: its bytes, or a file inside ``folder``; None for ``folder`` allows every file."""
    cell: Any = cells[row].as_py()
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


def _cell_files(images: pa.ChunkedArray, folder: Path | None) -> list[str] | None:
    """The file of each row; None if any row contains the image itself."""
    files = [_within(folder, path) for path in _paths(images) or [None]]
    return [str(file) for file in files] if all(files) else None


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
