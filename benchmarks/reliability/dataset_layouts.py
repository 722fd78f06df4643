"""Datasets in the layouts that people use: folders, tables, archives and arrays x split names x where the classes are
x image modes.

Every image has one shade that encodes its split, class and number. So for every dataset this verifies the splits and
the labels, that every file is used or reported, and that no held-out image is used for training.
"""

import gzip
import io
import json
import pickle
import random
import shutil
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images
from twostage.core.data.image_data import ImageData
from twostage.core.data.splits import SPLIT_WORDS

CLASSES = ["ant", "bee", "cow"]
SPLITS = ["train", "val", "test"]
PER_CLASS = 2
MODES = ["L", "RGB", "RGBA", "P", "I;16", "1-bit-like", "CMYK"]
COLUMN = "class, and a column of splits"
"""Folders of classes, and a table with the split of each image."""
FORMS = ["{}", "{}", "{}", "My-{}", "{}_2", "set.{}.a", "{} 01"]
FOLDERS = [
    "split/class",
    "class/split",
    "data/split/class",
    "split",
    "class/split.file",
    "split.file",
    "split/class/deep",
    COLUMN,
]
TABLES = [
    "split.parquet",
    "split-shards",
    "data/split-shards",
    "split/part",
    "saved",
    "split.arrow",
    "paths",
    "struct paths",
]
STORES = ["folder", "zip", "tar", "zips by split", "shards"]
COLUMN_FILES = ["metadata.csv", "metadata.jsonl", "labels.csv"]
"""The files that can have a column of splits."""
SIDE_LABELS = ["metadata.csv", "metadata.jsonl", "labels.csv", "lines", "dataset.json", "cls", "json", "nothing"]
"""The classes of images that are not in class folders; `lines` is a CSV file without a header."""
ARRAYS = ["npz", "npz by split", "npy", "idx", "cifar"]
LABELS = ["class names", "numbers", "sparse numbers", "texts", "floats", "lists of one", "another column", "none"]
EXTRAS = ["nothing", "another table", "notes", "broken image", "hidden image", "empty folder"]


def shade(split: str, label: int, number: int) -> int:
    """The grey value of an image; the inverse of :func:`origin`."""
    return 10 + 80 * SPLITS.index(split) + 20 * label + 5 * number


def origin(value: int) -> tuple[str, str]:
    """The split and the class of an image by its grey value (JPEG-free, so it is exact)."""
    split, rest = divmod(value - 10, 80)
    return SPLITS[split], CLASSES[rest // 20]


def draw(value: int, mode: str) -> Image.Image:
    """One shade in a mode."""
    grey = Image.new("L", (6, 5), value)
    if mode == "I;16":
        return Image.fromarray(np.full((5, 6), value * 257, dtype=np.uint16))
    if mode == "1-bit-like":
        return grey.quantize(4)
    if mode == "P":
        return grey.convert("RGB").quantize(8)
    return grey.convert(mode)


@dataclass
class Layout:
    """A random layout, and how to read it."""

    description: str
    source: Path
    options: dict[str, Any]
    labelled: bool
    files: set[Path]
    """All files that must be used or reported."""


def write(root: Path, seed: int) -> Layout:
    """Write a dataset below ``root``."""
    draws = random.Random(seed)
    layout = draws.choice(FOLDERS + TABLES + STORES * 2 + ARRAYS)
    mode, labels, extra = draws.choice(MODES), draws.choice(LABELS), draws.choice(EXTRAS)
    held_out = ("test",) if layout == "cifar" else draws.choice([("val",), ("test",), ("val", "test")])
    form = draws.choice(FORMS)
    spelled = {split: form.format(draws.choice(SPLIT_WORDS[split])) for split in ("train", *held_out)}
    if draws.random() < 0.3:
        spelled = {split: name.title() for split, name in spelled.items()}
    suffix = ".tif" if mode == "CMYK" else ".png"
    images = [
        (split, label, draw(shade(split, label, number), mode), f"{label}{number}")
        for split in spelled for label in range(len(CLASSES)) for number in range(PER_CLASS)
    ]  # fmt: skip
    root.mkdir()
    options: dict[str, Any] = {"image_size": 4, "channels": draws.choice([1, 3]), "on_bad_image": "skip"}
    words = {
        split: draws.choice([str.lower, str.title, str.upper])(draws.choice(SPLIT_WORDS[split])) for split in SPLITS
    }
    if layout in STORES:
        side = draws.choice(SIDE_LABELS)
        column = words if side in COLUMN_FILES and layout in ("folder", "zip", "tar") and draws.random() < 0.5 else None
        if column:
            spelled = dict.fromkeys(spelled, draws.choice(["images", "all/of/them", "train"]))
        named = _write_store(root, layout, spelled, images, side, suffix, extra, column)
        about = f"seed {seed}: {layout}, {spelled}, {side}, column {column}, {mode}, {extra}"
        return Layout(about, root, options, side != "nothing", named)
    if layout in ARRAYS:
        labels = draws.choice(["numbers", "none"])
        _write_arrays(root, layout, spelled, images, labels != "none")
        named = {path for path in root.rglob("*") if path.is_file() and "labels" not in path.name}
        return Layout(f"seed {seed}: {layout}, {spelled}, {labels}", root, options, labels != "none", named)
    if layout == COLUMN:
        labelled = True
        _write_column(root, words, images, suffix, draws.choice(COLUMN_FILES))
    elif layout in FOLDERS:
        labelled = "class" in layout
        for split, label, image, name in images:
            file = root / _path(layout, spelled[split], CLASSES[label], name + suffix)
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)
    else:
        labelled = labels != "none"
        _write_tables(root, layout, spelled, images, labels, suffix)
        if labels == "another column":
            options["label_column"] = "breed"
    if layout != COLUMN or extra != "broken image":  # the column would have to say something about it
        _add(root, extra, layout in FOLDERS)
    files = {path for path in root.rglob("*") if path.is_file() and path.name not in COLUMN_FILES}
    description = f"seed {seed}: {layout}, {spelled}, {labels}, {mode}, {extra}"
    return Layout(description, root, options, labelled, files)


def _write_column(root: Path, words: dict[str, str], images: list[Any], suffix: str, table: str) -> None:
    rows = []
    for split, label, image, name in images:
        file = root / CLASSES[label] / f"{SPLITS.index(split)}{name}{suffix}"
        file.parent.mkdir(exist_ok=True)
        image.save(file)
        rows.append((str(file.relative_to(root)), words[split]))
    # The label column of `_label_file` would be a second source of classes.
    names = {"metadata.csv": "file_name,split", "labels.csv": "filename,Split"}
    text = "".join(f"{name},{word}\n" for name, word in rows)
    if table == "metadata.jsonl":
        text = "".join(json.dumps({"file_name": name, "split": word}) + "\n" for name, word in rows)
    else:
        text = f"{names[table]}\n{text}"
    (root / table).write_text(text)


def _path(layout: str, split: str, name: str, file: str) -> str:
    if layout.endswith("split.file"):
        folder = f"{name}/" if layout.startswith("class") else ""
        return f"{folder}{split}_{name if not folder else ''}{file}"
    deep = {"split/class/deep": f"{split}/{name}/deep/er"}.get(layout)
    folder = deep or layout.replace("split", split).replace("class", name)
    return f"{folder}/{file if 'class' in layout else name + file}"


def _write_store(
    root: Path,
    store: str,
    spelled: dict[str, str],
    images: list[Any],
    side: str,
    suffix: str,
    extra: str,
    words: dict[str, str] | None,
) -> set[Path]:
    """Images in folders of splits, or in archives; returns the files that must be used or reported.

    Args:
        words: what a column says of each split; None: no column.
    """
    files: dict[str, dict[str, bytes]] = {split: {} for split in spelled}
    rows = []
    for split, label, image, name in images:
        content = io.BytesIO()
        image.save(content, "TIFF" if suffix == ".tif" else "PNG")
        stem = f"{SPLITS.index(split)}{name}"
        files[split][stem + suffix] = content.getvalue()
        rows.append((split, stem + suffix, label))
        if side in ("cls", "json"):
            files[split][f"{stem}.{side}"] = (str(label) if side == "cls" else json.dumps({"label": label})).encode()
    if extra == "broken image":
        files["train"]["broken.png"] = b"\x89PNG no image"
        rows.append(("train", "broken.png", 0))
        if side in ("cls", "json"):
            files["train"][f"broken.{side}"] = b"0" if side == "cls" else b'{"label": 0}'
    elif extra == "notes":
        files["train"]["notes.txt"] = b"no image"
    elif extra == "hidden image":
        files["train"][".hidden.png"] = b"no image"
    named = [(name if "s" in store[3:] else f"{spelled[split]}/{name}", label) for split, name, label in rows]
    about = _label_file(side, named, [words[split] for split, _, _ in rows] if words else None)
    members = {f"{spelled[split]}/{name}": content for split, found in files.items() for name, content in found.items()}
    if store == "folder":
        _write_files(root, members | about)
        places = [root / name for name in members]
    elif store in ("zip", "tar"):
        archive = root / f"images.{store}"
        _write_archive(archive, members | about)
        places = [archive / name for name in members]
    else:
        kind = "zip" if store.startswith("zip") else "tar"
        archives = {split: root / f"{spelled[split]}-000000.{kind}" for split in spelled}
        for split, found in files.items():
            _write_archive(archives[split], found)
        _write_files(root, about)
        places = [archives[split] / name for split, found in files.items() for name in found]
    return {place for place in places if place.suffix not in (".cls", ".json")}


def _label_file(side: str, rows: list[tuple[str, int]], splits: list[str] | None) -> dict[str, bytes]:
    """The file with the classes of all images, and with their ``splits``."""
    title, ends = (",split\n", [f",{split}\n" for split in splits]) if splits else ("\n", ["\n"] * len(rows))
    if side == "metadata.csv":
        lines = [f"{name},{CLASSES[label]}{end}" for (name, label), end in zip(rows, ends, strict=True)]
        text = f"file_name,label{title}" + "".join(lines)
    elif side == "metadata.jsonl":
        named = [{"split": split} for split in splits] if splits else [{}] * len(rows)
        pairs = zip(rows, named, strict=True)
        text = "".join(json.dumps({"file_name": name, "class": label} | more) + "\n" for (name, label), more in pairs)
    elif side == "labels.csv":
        lines = [f"{Path(name).with_suffix('')},{label}{end}" for (name, label), end in zip(rows, ends, strict=True)]
        text = f"id,category{title}" + "".join(lines)
    elif side == "lines":
        text = "".join(f"{name},{CLASSES[label]}\n" for name, label in rows)
    elif side == "dataset.json":
        text = json.dumps({"labels": rows})
    else:
        return {}
    return {"labels.csv" if side == "lines" else side: text.encode()}


def _write_files(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def _write_archive(archive: Path, files: dict[str, bytes]) -> None:
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
            for name, content in files.items():
                opened.writestr(name, content)
        return
    with tarfile.open(archive, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _write_arrays(root: Path, layout: str, spelled: dict[str, str], images: list[Any], labelled: bool) -> None:
    stacks = {}
    for split in spelled:
        rows = [(label, shade(split, label, int(name[-1]))) for where, label, _, name in images if where == split]
        values = np.array([value for _, value in rows], np.uint8)
        stacks[split] = np.tile(values[:, None, None], (1, 5, 6)), np.array([label for label, _ in rows], np.uint8)
    if layout == "npz":
        arrays = {f"x_{spelled[split]}": pixels for split, (pixels, _) in stacks.items()}
        arrays |= {f"y_{spelled[split]}": labels for split, (_, labels) in stacks.items() if labelled}
        np.savez(root / "data.npz", **arrays)
    for split, (pixels, labels) in stacks.items():
        name = spelled[split]
        if layout == "npz by split":
            np.savez_compressed(
                root / f"{name}.npz", images=pixels[:, None], **({"labels": labels} if labelled else {})
            )
        elif layout == "npy":
            np.save(root / f"{name}_images.npy", pixels[..., None].repeat(3, axis=3))
            if labelled:
                np.save(root / f"{name}_labels.npy", labels[:, None])
        elif layout == "idx":
            (root / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(_idx(pixels)))
            if labelled:
                (root / f"{name}-labels-idx1-ubyte").write_bytes(_idx(labels))
        elif layout == "cifar":
            file = root / "batches" / ("data_batch_1" if split == "train" else "test_batch")
            file.parent.mkdir(exist_ok=True)
            data = np.tile(pixels[:, :1, :1].reshape(-1, 1), (1, 3072))
            batch = {b"data": data} | ({b"labels": labels.tolist()} if labelled else {})
            file.write_bytes(pickle.dumps(batch, protocol=2))


def _idx(array: np.ndarray) -> bytes:
    shape = b"".join(side.to_bytes(4, "big") for side in array.shape)
    return bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()


def _write_tables(
    root: Path, layout: str, spelled: dict[str, str], images: list[Any], labels: str, suffix: str
) -> None:
    column = "breed" if labels == "another column" else "label"
    tables = {}
    for split in spelled:
        rows = [(label, image, name) for where, label, image, name in images if where == split]
        cells: list[Any] = []
        for label, image, name in rows:
            content = io.BytesIO()
            image.save(content, "TIFF" if suffix == ".tif" else "PNG")
            if "paths" in layout:
                file = root / "images" / split / f"{CLASSES[label]}{name}{suffix}"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content.getvalue())
                path = str(file.relative_to(root))
                cells.append({"bytes": None, "path": path} if layout == "struct paths" else path)
            else:
                cells.append({"bytes": content.getvalue(), "path": None})
        columns: dict[str, Any] = {"image": cells}
        values = [label for label, *_ in rows]
        kinds = {
            "class names": values, "numbers": values, "sparse numbers": [10**8 * v - 7 for v in values],
            "texts": [CLASSES[v] for v in values], "floats": [float(v) for v in values],
            "lists of one": [[v] for v in values], "another column": [CLASSES[v] for v in values],
        }  # fmt: skip
        if labels != "none":
            columns[column] = kinds[labels]
        kind = {"image": datasets.Image()} if layout != "paths" else {"image": datasets.Value("string")}
        table = pa.table(columns)
        if labels == "class names":
            features = datasets.Features(kind | {"label": datasets.ClassLabel(names=CLASSES)})
            table = table.replace_schema_metadata(features.arrow_schema.metadata)
        tables[split] = table
    if layout == "saved":
        parts = {spelled[split].replace(" ", "_"): datasets.Dataset(table) for split, table in tables.items()}
        datasets.DatasetDict(parts).save_to_disk(root)
        return
    for split, table in tables.items():
        _write_table(root, layout, spelled[split], table)


def _write_table(root: Path, layout: str, name: str, table: pa.Table) -> None:
    if layout == "split.arrow":
        with pa.ipc.new_stream(root / f"{name}.arrow", table.schema) as writer:
            writer.write_table(table)
    elif layout.endswith("shards"):
        folder = root / "data" if layout.startswith("data") else root
        folder.mkdir(exist_ok=True)
        for i in range(2):
            half = table.slice(i * 3, 3)
            pq.write_table(half, folder / f"{name}-{i:05d}-of-00002.parquet")
    else:
        file = root / name / "part.parquet" if layout == "split/part" else root / f"{name}.parquet"
        file.parent.mkdir(exist_ok=True)
        pq.write_table(table, file)


def _add(root: Path, extra: str, is_folder: bool) -> None:
    if extra == "another table" and not is_folder:
        near = next(path for path in root.rglob("*") if path.suffix in (".parquet", ".arrow")).parent
        image = io.BytesIO()
        draw(255, "L").save(image, "PNG")
        folder = near if not near.name.lower().strip("-_. 0123456789") or near == root or near.name == "data" else root
        pq.write_table(pa.table({"image": [{"bytes": image.getvalue(), "path": None}]}), folder / "extra.parquet")
    elif extra == "notes":
        (root / "notes.txt").write_text("no image")
    elif extra == "hidden image":
        draw(255, "L").save(root / ".hidden.png")
    elif extra == "broken image" and is_folder:
        near = next(path for path in root.rglob("*") if path.suffix in (".png", ".tif")).parent
        name = next(path for path in near.iterdir()).stem
        (near / f"{name}-broken.png").write_bytes(b"\x89PNG no image")
    elif extra == "empty folder":
        (root / "nothing").mkdir()


def check(layout: Layout) -> None:
    """Read the dataset and compare it with what was written.

    Raises:
        AssertionError: an image has the wrong split or class or is missing, or a file is neither used nor reported.
        InputError: the dataset is refused, although every layout here is valid.
    """
    data = load_images(DataConfig.model_validate({"source": str(layout.source), **layout.options}))
    counts: dict[str, int] = {}
    for name, split in data.splits.items():
        values = split.pixels[:, 0, 2, 2].tolist()
        for row, value in enumerate(values):
            where, expected = origin(value)
            assert where == name, f"{layout.description}: an image of {where} is in {name}"
            counts[expected] = counts.get(expected, 0) + 1
            if layout.labelled:
                assert split.labels is not None, f"{layout.description}: the labels of {name} are missing"
                label = data.class_names[split.labels[row]]
                assert CLASSES.index(expected) == _class(label), (
                    f"{layout.description}: label {label}, expected {expected}"
                )
            else:
                assert split.labels is None, f"{layout.description}: labels although there are none"
    assert counts == dict.fromkeys(CLASSES, PER_CLASS * len(data.splits)), f"{layout.description}: images are missing"
    _check_named(layout, data)


def fuzz_layouts(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Check ``count`` random datasets; returns the figures of the page."""
    datasets.disable_progress_bars()
    for number in range(seed * count, (seed + 1) * count):
        root = folder / str(number)
        check(write(root, number))
        shutil.rmtree(root)
    return {"layouts": count}


def _class(name: str) -> int:
    """The class of a name from any label column."""
    if name in CLASSES:
        return CLASSES.index(name)
    return int(name) if len(name) == 1 else (int(name) + 7) // 10**8


def _check_named(layout: Layout, data: ImageData) -> None:
    named = {line.partition(" (")[0] for line in [*data.skipped, *data.bad]}
    for split in data.splits.values():
        named |= {name.partition(":")[0] for name in split.records.names}
        named |= {str(file) for file in split.records.files or []}
    used = {file for file in layout.files if file.suffix in (".parquet", ".arrow") and file.stem != "extra"}
    lost = [str(file) for file in layout.files - used if str(file) not in named]
    assert not lost, f"{layout.description}: neither used nor reported: {lost}"
