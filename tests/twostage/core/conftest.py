"""Small real images and tables; the machine's own scan cache and $TWOSTAGE_DATA are never used."""

import io
import json
import socket
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

WriteSheets = Callable[..., Path]
WriteTable = Callable[..., Path]


@pytest.fixture(autouse=True)
def _own_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TWOSTAGE_DATA", raising=False)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)


@pytest.fixture
def images(tmp_path: Path) -> WriteSheets:
    """``images("cat/0.png", …)`` writes 8 x 8 RGB images; the red of the i-th is 10 i. Returns their root."""
    root = tmp_path / "images"

    def write(*names: str, size: tuple[int, int] = (8, 8)) -> Path:
        root.mkdir(exist_ok=True)
        for i, name in enumerate(names):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size, (10 * i, 100, 200)).save(root / name)
        return root

    return write


@pytest.fixture
def table(tmp_path: Path) -> WriteTable:
    """``table("train.parquet", labels=[0, 1], caption=["a", "b"])`` writes one image per label; the red of the i-th is
    10 i."""

    def write(name: str, labels: list | None = None, *, count: int | None = None, column: str = "image",
              class_names: list[str] | None = None, as_struct: bool = True, **others: list) -> Path:  # fmt: skip
        cells = [_png(i) for i in range(count if labels is None else len(labels))]
        columns = {column: [{"bytes": cell, "path": None} for cell in cells] if as_struct else cells}
        if labels is not None:
            columns["label"] = labels
        columns |= others
        content = pa.table(columns)
        if class_names:
            features = {"label": {"names": class_names, "_type": "ClassLabel"}}
            content = content.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        path = tmp_path / "tables" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".parquet":
            pa.parquet.write_table(content, path)
        else:
            with pa.ipc.new_stream(path, content.schema) as writer:  # what Hugging Face datasets writes
                writer.write_table(content)
        return path

    return write


def _png(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (10 * i, 100, 200)).save(buffer, format="PNG")
    return buffer.getvalue()
