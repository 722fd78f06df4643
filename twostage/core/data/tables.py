"""Parquet and arrow files, and Hugging Face datasets, as sources of images."""

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from twostage.core.data.folder_content import FolderContent
from twostage.core.data.records import Columns, Source
from twostage.core.data.split_files import split_files
from twostage.core.data.splits import exact_split, reads_as_held_out, spelled_splits
from twostage.core.data.table_columns import source_of_tables
from twostage.core.errors import InputError
from twostage.core.machine.progress import on_terminal
from twostage.core.wording import one_line, printable, some_of

__all__ = ["TABLE_SUFFIXES", "find_tables", "read_hub", "read_tables"]

TABLE_SUFFIXES = {".parquet", ".arrow"}


def find_tables(content: FolderContent) -> list[Path]:
    """The tables of a folder that is a dataset of tables, relative to it.

    Tables that only lie deeper than loose images are the dataset if they contain at least as many images; an overview
    or a figure may lie above them. Files named `cache-*.arrow` are ignored: `datasets` keeps copies in them.
    """
    found = [
        path
        for path in sorted(content.others)
        if path.suffix.lower() in TABLE_SUFFIXES and not path.name.startswith("cache-")
    ]
    if not content.images or any(len(path.parts) == 1 for path in found):
        return found
    return found if sum(_count_images(content.root / path) for path in found) >= len(content.images) else []


def _count_images(file: Path) -> int:
    """The rows of a table that contains images themselves; 0 for other tables."""
    try:
        if file.suffix.lower() == ".parquet":
            with pq.ParquetFile(file) as opened:
                schema, rows = opened.schema_arrow, opened.metadata.num_rows
        else:
            table = _read_table(file)
            schema, rows = table.schema, table.num_rows
    except (pa.ArrowException, OSError, InputError):  # named when it is used
        return 0
    return rows if any(map(_holds_bytes, schema.types)) else 0


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(_holds_bytes(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


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
    by_split, ignored = split_files(root, files or [Path(root.name)])
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
    source = source_of_tables(f"{used[0].suffix[1:]} {root}", tables, printable(root), version, folder, columns)
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
        if unused := [path for path in content.images if str((root / path).resolve()) not in opened]:
            source.skipped += [f"{printable(root / path)} (in no table)" for path in unused]
            shown = some_of(map(printable, unused))
            source.notices.append(f"{len(unused):,} images next to the tables are in no table and not used: {shown}")
    return source


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
    source = source_of_tables(f"Hugging Face dataset {name}", tables, name, version, None, columns)
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
