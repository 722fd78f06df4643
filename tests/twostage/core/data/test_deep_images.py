"""Images of 16 bits, and of any number of channels: their pixels reach the float tensor as the files have them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from messages import assert_names, refuses
from PIL import Image

from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images, load_larger
from twostage.core.data.image_data import ImageData
from twostage.core.data.survey import survey
from twostage.core.images.conversion import to_float

SIDE = 12
NOISE = np.random.default_rng(0)
DEEP = NOISE.integers(0, 65536, (6, SIDE, SIDE, 5), dtype=np.uint16)
SHALLOW = NOISE.integers(0, 256, (6, SIDE, SIDE, 5), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(params=["in memory", "on disk"])
def mode(request) -> dict[str, float]:
    return {} if request.param == "in memory" else {"in_memory_gb": 0.0}


def load(source: Path, **options: object) -> ImageData:
    group = {"source": str(source), "image_size": SIDE, "channels": 5, "validation_share": 0.3}
    return load_images(DataConfig.model_validate(group | options))


def everything(data: ImageData) -> np.ndarray:
    """All images (n, C, H, W), in the order of their names."""
    found = {}
    for split in data.splits.values():
        rows = torch.arange(len(split))
        found |= dict(zip(split.names(rows), split.read(rows).numpy(), strict=True))
    return np.stack([found[name] for name in sorted(found)])


def grey_pngs(folder: Path, images: np.ndarray, start: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    for number, image in enumerate(images, start):
        Image.fromarray(image).save(folder / f"{number}.png")
    return folder


def tiffs(folder: Path, images: np.ndarray) -> Path:
    """A file for each image, with a page for each channel."""
    folder.mkdir()
    for number, image in enumerate(images):
        first, *others = (Image.fromarray(np.ascontiguousarray(image[..., i])) for i in range(image.shape[2]))
        first.save(folder / f"{number}.tif", save_all=True, append_images=others)
    return folder


def in_arrays(folder: Path, images: np.ndarray, name: str) -> Path:
    folder.mkdir()
    match name:
        case "npy":
            np.save(folder / "images.npy", images)
        case "npz, channels first":
            np.savez(folder / "images.npz", images=images.transpose(0, 3, 1, 2))
    return folder


@pytest.mark.parametrize("layout", ["tiff", "npy", "npz, channels first"])
@pytest.mark.parametrize("images", [DEEP, SHALLOW], ids=["16 bits", "8 bits"])
def test_five_channels_are_read_without_loss(tmp_path, mode, layout, images):
    folder = tmp_path / "images"
    source = tiffs(folder, images) if layout == "tiff" else in_arrays(folder, images, layout)
    for _ in range(2):  # the second time from the cache
        data = load(source, **mode)
        assert everything(data).dtype == images.dtype
        assert np.array_equal(everything(data), images.transpose(0, 3, 1, 2))
        assert not any("grey" in line or "frames" in line for line in data.notices)
    assert survey(str(source)).channels == 5


def test_16_bits_reach_the_float_tensor(tmp_path, mode):
    data = load(grey_pngs(tmp_path / "images", DEEP[..., 0]), channels=1, **mode)
    split = data.splits["train"]
    image, _ = split[0]
    names = split.names(torch.tensor([0]))
    expected = DEEP[int(Path(names[0]).stem), ..., 0].astype(np.float64) / 65535 * 2 - 1
    assert split.bits == 16
    np.testing.assert_allclose(image[0], expected, atol=1e-7)
    assert to_float(torch.tensor([0, 65535], dtype=torch.uint16)).tolist() == [-1, 1]


def test_a_late_file_of_16_bits_makes_all_of_them_16(tmp_path, mode):
    shallow = np.concatenate([SHALLOW[..., i] for i in range(5)])
    folder = grey_pngs(tmp_path / "images", shallow)
    grey_pngs(folder, DEEP[:1, ..., 0], start=13)  # neither first, last nor in the middle
    found = everything(load(folder, channels=1, **mode))
    order = sorted(range(len(shallow)), key=lambda number: f"{number}.png")
    for image, number in zip(found, order, strict=True):
        expected = DEEP[0, ..., 0] if number == 13 else shallow[number].astype(np.uint16) * 257
        assert np.array_equal(image[0], expected), number


def test_8_bits_are_enough_for_values_of_8_bits(tmp_path):
    grey = SHALLOW[..., 0]
    for name, images in {"floats": grey / 255, "wide": grey.astype(np.uint16) * 257}.items():
        np.save(tmp_path / f"{name}.npy", images)
        data = load(tmp_path / f"{name}.npy", channels=1)
        assert np.array_equal(everything(data)[:, 0], grey), name
    assert everything(data).dtype == np.uint8


def test_fewer_or_more_bits_are_chosen(tmp_path, mode):
    folder = grey_pngs(tmp_path / "images", DEEP[..., 0])
    rounded = load(folder, channels=1, bits=8, **mode)
    assert np.array_equal(everything(rounded)[:, 0], (DEEP[..., 0] / 257).round().astype(np.uint8))
    assert_names(" ".join(rounded.notices), "more than 8 bits", "data.bits=8")
    folder = grey_pngs(tmp_path / "shallow", SHALLOW[..., 0])
    assert np.array_equal(everything(load(folder, channels=1, bits=16, **mode))[:, 0], SHALLOW[..., 0] * np.uint16(257))
    with refuses("data.bits 16", "expected 8", "data.source=shapes"):
        load_images(DataConfig(source="shapes", bits=16))


@pytest.mark.parametrize(("given", "channels"), [(1, 3), (1, 4), (3, 1), (3, 4), (4, 1), (4, 3)])
def test_channels_convert_as_those_of_8_bits_do(tmp_path, given, channels):
    images = SHALLOW[..., :given].astype(np.uint16) * 257
    np.save(tmp_path / "x.npy", SHALLOW[..., :given])
    expected = everything(load(tmp_path / "x.npy", channels=channels)).astype(int) * 257
    np.save(tmp_path / "y.npy", images)
    found = everything(load(tmp_path / "y.npy", channels=channels, bits=16)).astype(int)
    assert np.abs(found - expected).max() <= 257, "Pillow rounds more often"


def test_deep_images_are_resized_without_rounding_to_8_bits(tmp_path):
    ramp = np.linspace(20_000, 21_000, 64).astype(np.uint16)
    np.save(tmp_path / "x.npy", np.tile(ramp[:, None, None], (4, 1, 64, 2)))
    found = everything(load(tmp_path / "x.npy", channels=2, image_size=16))
    assert len(np.unique(found[0, 0, :, 0])) == 16, "at 8 bits, the ramp has 5 shades"
    assert np.abs(found[0, 0, :, 0].astype(int) - ramp.reshape(16, 4).mean(1)).max() < 15
    larger = load_larger(load(tmp_path / "x.npy", channels=2, image_size=16), (20, 20))
    assert larger.read(torch.tensor([0])).dtype == torch.uint16


def test_pages_are_channels_only_if_there_are_as_many(tmp_path):
    folder = tiffs(tmp_path / "three", DEEP[..., :3])
    assert np.array_equal(everything(load(folder, channels=3)), DEEP[..., :3].transpose(0, 3, 1, 2))
    first = load(folder, channels=1)
    assert np.array_equal(everything(first)[:, 0], DEEP[..., 0])
    assert_names(" ".join(first.notices), "6 images have several frames", "only the first")
    with refuses("6 unreadable images", "0.tif", "3 channels, expected data.channels=5; set data.channels=3"):
        load(folder)
    with refuses("1 channels, expected data.channels=5"):
        load(grey_pngs(tmp_path / "grey", DEEP[..., 0]))


def test_pages_of_different_sizes_are_no_channels(tmp_path):
    folder = tiffs(tmp_path / "images", SHALLOW)
    pages = [Image.new("L", (SIDE, SIDE + i)) for i in range(5)]
    pages[0].save(folder / "9.tif", save_all=True, append_images=pages[1:])
    with refuses("1 unreadable image", "9.tif (pages of different sizes", f"{SIDE}x{SIDE + 1} L"):
        load(folder)


def test_a_broken_page_is_a_bad_image(tmp_path):
    folder = tiffs(tmp_path / "images", DEEP)
    whole = (folder / "3.tif").read_bytes()
    (folder / "3.tif").write_bytes(whole[: len(whole) - 200])
    with refuses("1 unreadable image", "3.tif"):
        load(folder)
    assert len(everything(load(folder, on_bad_image="skip"))) == 5


def test_drawn_images_have_no_other_channels():
    with refuses("data.channels 5", "expected 1, 3 or 4", "data.source=shapes"):
        load_images(DataConfig(source="shapes", channels=5))


def test_shown_channels_must_exist():
    assert DataConfig(channels=5, shown_channels=(3, 1, 0)).shown_channels == (3, 1, 0)
    for shown in ([5], [0, 1], [0, 1, 2, 3], []):
        with pytest.raises(ValueError, match=r"shown_channels .*expected one or three of the channels 0 to 4"):
            DataConfig.model_validate({"channels": 5, "shown_channels": shown})
