"""A split as a dataset of torch: by index, in a `DataLoader`, and in its worker processes."""

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images
from twostage.core.data.image_data import ImageSplit
from twostage.core.images.conversion import to_float


def images_in(folder: Path) -> str:
    """Twelve images of two classes, and a map of each."""
    for number in range(12):
        name = Path("ab"[number % 2]) / f"{number:02}.png"
        for place, value in (("images", 20 * number), ("maps", number % 3)):
            (folder / place / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8), value, np.uint8)).save(folder / place / name)
    return str(folder / "images")


def table_in(folder: Path) -> str:
    source = Path(images_in(folder))
    rows = [{"image": {"bytes": file.read_bytes()}, "label": i % 2} for i, file in enumerate(source.rglob("*.png"))]
    pq.write_table(pa.Table.from_pylist(rows), folder / "images.parquet")
    return str(folder / "images.parquet")


@pytest.fixture(params=["shapes", "folder", "folder on disk", "table on disk"])
def split(request, tmp_path) -> ImageSplit:
    source = {"shapes": lambda _: "shapes", "table on disk": table_in}.get(request.param, images_in)(tmp_path)
    more = {"maps": str(tmp_path / "maps")} if "folder" in request.param else {}
    memory = 0.0 if "disk" in request.param else 1.0
    config = DataConfig(source=source, image_size=8, channels=1, num_images=10, in_memory_gb=memory, **more)
    return load_images(config).splits["train"]


def test_an_index_gives_an_image_and_its_class(split):
    image, label = split[-1]
    last = torch.tensor([len(split) - 1])
    assert torch.equal(image, to_float(split.read(last))[0])
    assert label == int(split.read_labels(last))
    images, labels = split[2:4]
    assert images.shape == (2, 1, 8, 8)
    assert torch.equal(labels, split.labels[2:4])
    assert len(list(split)) == len(split), "a loop over it ends"
    with pytest.raises(IndexError):
        split[len(split)]


def test_a_split_can_be_pickled_for_worker_processes(split):
    copy = pickle.loads(pickle.dumps(split))
    rows = torch.arange(len(split))
    assert torch.equal(copy.read(rows), split.read(rows))
    if split.map_form:
        assert torch.equal(copy.read_maps(rows), split.read_maps(rows))


def test_workers_read_the_images(split):
    (images, labels), *_ = DataLoader(split, batch_size=len(split), num_workers=1)
    assert torch.equal(images, split[:][0])
    assert torch.equal(labels, split.labels)


def test_images_without_a_class_have_minus_one(tmp_path):
    images_in(tmp_path)
    split = load_images(DataConfig(source=str(tmp_path / "images" / "a"), image_size=8, channels=1)).splits["train"]
    assert split[0][1] == -1
    assert split[:][1].tolist() == [-1] * len(split)
