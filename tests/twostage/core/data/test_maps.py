"""Each image has its map, cropped and resized as the image is; classes are never blended; what is missing is named."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from messages import refuses
from PIL import Image

from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images
from twostage.core.data.image_data import ImageData, ImageSplit
from twostage.core.images.conversion import classes_to_uint8, image_to_pixels

MEMORY = pytest.mark.parametrize("mode", [{}, {"in_memory_gb": 0}], ids=["in memory", "on disk"])


def load(source: Path | str, **options: object) -> ImageData:
    return load_images(DataConfig.model_validate({"source": str(source), "image_size": 8, **options}))


def everything(split: ImageSplit) -> tuple[torch.Tensor, torch.Tensor | None]:
    rows = torch.arange(len(split))
    return split.read(rows), split.read_maps(rows)


def map_of(red: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    """The class of the pixels is the red of the image, and 255 in the left half."""
    classes = np.full(size, red, dtype=np.uint8)
    classes[:, : size[1] // 2] = 255
    return Image.fromarray(classes)


@pytest.fixture
def mapped(images, tmp_path) -> Path:
    """Four images in `images` with maps of other suffixes in `maps`."""
    root = images("train/0.png", "train/1.png", "train/2.png", "test/3.png")
    for i, name in enumerate(("train/0.png", "train/1.tif", "train/2.bmp", "test/3.png")):
        (tmp_path / "maps" / name).parent.mkdir(parents=True, exist_ok=True)
        map_of(10 * i).save(tmp_path / "maps" / name)
    return root


def check_maps(data: ImageData) -> None:
    for split in data.splits.values():
        pixels, maps = everything(split)
        assert maps is not None
        assert maps.dtype == torch.uint8
        assert split.map_form == (8, 8)
        for image, found in zip(pixels, maps, strict=True):
            expected = torch.from_numpy(np.array(map_of(int(image[0, 0, 0]))))
            assert torch.equal(found, expected)


@MEMORY
def test_a_folder_of_the_same_names(mapped, tmp_path, mode):
    check_maps(load(mapped, maps=str(tmp_path / "maps"), **mode))
    plain = load(mapped, **mode)
    assert plain.splits["train"].read_maps(torch.arange(2)) is None
    assert plain.splits["train"].map_form is None


@MEMORY
def test_a_column_of_a_table(table, mode):
    path = table("train.parquet", count=5)
    cells = []
    for i in range(5):
        buffer = io.BytesIO()
        map_of(10 * i).save(buffer, format="PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    with_column = pa.parquet.read_table(path).append_column("segmentation", pa.array(cells))
    pa.parquet.write_table(with_column, path)
    data = load(path, maps="segmentation", num_images=3, **mode)
    assert len(data.splits["train"]) == 3
    check_maps(data)
    with refuses("data.maps 'masks'", f"a column of {path}", "['image', 'segmentation']"):
        load(path, maps="masks")
    pa.parquet.write_table(with_column.set_column(1, "segmentation", pa.array([*cells[:4], None])), path)
    with refuses("data.maps", "1 of 5 maps", f"{path}:train:segmentation:4 (no image in this row)", "remove data.maps"):
        load(path, maps="segmentation", **mode)


def test_a_folder_beside_a_table_of_paths(mapped, tmp_path):
    columns = {"file_name": ["train/0.png", "train/1.png", "train/2.png"]}
    pa.parquet.write_table(pa.table(columns), mapped / "train.parquet")
    check_maps(load(mapped / "train.parquet", maps=str(tmp_path / "maps")))


def test_maps_below_the_images_are_not_images(mapped, tmp_path):
    (tmp_path / "maps").rename(mapped / "maps")
    for name in ("train", "test"):
        (mapped / "images" / name).parent.mkdir(exist_ok=True)
        (mapped / name).rename(mapped / "images" / name)
    for name in ("train", "test"):
        (mapped / "maps" / "images").mkdir(exist_ok=True)
        (mapped / "maps" / name).rename(mapped / "maps" / "images" / name)
    data = load(mapped, maps=str(mapped / "maps"))
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 3, "test": 1}
    check_maps(data)


def test_maps_follow_their_images_when_bad_ones_are_skipped(mapped, tmp_path):
    (mapped / "train" / "1.png").write_bytes(b"damaged")
    check_maps(load(mapped, maps=str(tmp_path / "maps"), on_bad_image="skip"))


def test_classes_are_resized_and_cropped_like_their_image():
    """An image of two flat colours that differ by its map's classes keeps that, except for blended borders."""
    noise = np.random.default_rng(0)
    classes = np.kron(noise.integers(0, 3, (4, 6)), np.ones((9, 9), dtype=np.uint8)).astype(np.uint8)
    for turn in (None, 6):
        exif = Image.Exif()
        if turn:
            exif[0x0112] = turn
        files = []
        for image in (Image.fromarray(100 * classes), Image.fromarray(classes)):
            files.append(io.BytesIO())
            image.save(files[-1], format="PNG", exif=exif)
        image, found = (Image.open(file) for file in files)
        for size in ((12, 12), (10, 20), (36, 54), (50, 40)):
            grey, small = image_to_pixels(image, size, 1)[0].astype(int), classes_to_uint8(found, size)[0].astype(int)
            assert set(np.unique(small)) <= {0, 1, 2}
            assert (np.abs(grey - 100 * small) < 50).mean() > 0.85, "another place, but for pixels at borders"
            assert (grey == 100 * small).mean() > 0.15


@pytest.mark.parametrize("mode", ["P", "L", "1", "I;16", "I", "LA", "RGB", "RGBA"])
def test_classes_in_any_mode(mode):
    classes = np.random.default_rng(0).integers(0, 2 if mode == "1" else 9, (5, 7)).astype(np.uint8)
    if mode == "P":
        image = Image.fromarray(classes).convert("P")
        image.putpalette(list(np.random.default_rng(1).integers(0, 256, 768)))
    elif mode == "1":
        image = Image.fromarray(classes.astype(bool))
    elif mode in ("I;16", "I"):
        image = Image.fromarray(classes.astype(np.uint16 if mode == "I;16" else np.int32))
    else:
        image = Image.fromarray(classes).convert(mode)
    assert image.mode == mode
    assert np.array_equal(classes_to_uint8(image, (5, 7))[0], classes)


@MEMORY
@pytest.mark.parametrize("channels", [1, 3])
def test_maps_that_are_images(mapped, tmp_path, mode, channels):
    if channels == 3:
        map_of(0).convert("RGB").save(tmp_path / "maps" / "train" / "0.png")
        Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "maps" / "train" / "0.png")
    else:
        for file in (tmp_path / "maps" / "train").iterdir():
            if file.suffix != ".png":
                map_of(10 * int(file.stem)).save(file.with_suffix(".png"))
                file.unlink()
    data = load(mapped, maps=str(tmp_path / "maps"), map_kind="image", channels=4, **mode)
    train = data.splits["train"]
    maps = everything(train)[1]
    assert train.map_form == (channels, 8, 8) == maps.shape[1:]
    assert maps[1, :, 0, 7].tolist() == [10] * channels
    if channels == 3:
        assert maps[0, :, 0, 0].tolist() == [1, 2, 3]


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_missing_and_double_maps_are_named(mapped, tmp_path):
    maps = tmp_path / "maps"
    map_of(1).save(maps / "train" / "1.png")
    load(mapped, maps=str(maps))  # the very same name goes first
    (maps / "train" / "1.png").rename(maps / "train" / "1.bmp")
    with refuses(f"data.maps {maps}", "train/1.bmp, train/1.tif", "train/1.png", "Remove the others"):
        load(mapped, maps=str(maps))
    (maps / "train" / "1.bmp").unlink()
    (maps / "train" / "1.tif").unlink()
    with refuses(f"data.maps {maps}", "1 of 4 images have no map", "train/1.png", "remove data.maps"):
        load(mapped, maps=str(maps))
    with refuses(f"data.maps {tmp_path}/none", "expected a folder"):
        load(mapped, maps=str(tmp_path / "none"))


@MEMORY
@pytest.mark.parametrize(
    ("image", "parts"),
    [
        (map_of(0, (8, 9)), ["9 x 8 pixels, but its image has 8 x 8"]),
        (Image.new("RGB", (8, 8), (1, 2, 3)), ["mode RGB", "data.map_kind=image"]),
        (Image.new("I;16", (8, 8), 256), ["the class 256", "from 0 to 255"]),
        (None, ["not a readable image"]),
    ],
    ids=["size", "colours", "class", "damaged"],
)
def test_a_bad_map_is_named(mapped, tmp_path, image, parts, mode):
    file = tmp_path / "maps" / "test" / "3.png"
    if image is None:
        file.write_bytes(b"damaged")
    else:
        image.save(file)
    with refuses("data.maps", "1 of 4 maps", str(file), *parts, "remove data.maps"):
        load(mapped, maps=str(tmp_path / "maps"), **mode)


@MEMORY
def test_other_maps_are_other_images(mapped, tmp_path, mode):
    options = {"maps": str(tmp_path / "maps"), **mode}
    before, plain = load(mapped, **options).identity(), load(mapped, **mode).identity()
    assert before != plain
    map_of(77).save(tmp_path / "maps" / "train" / "0.png")
    assert load(mapped, **options).identity() != before
    assert load(mapped, **mode).identity() == plain
