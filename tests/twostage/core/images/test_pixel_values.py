"""Values of more than 8 bits: one range for the whole dataset, and a warning if images use a small part of it."""

import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from messages import assert_names, refuses
from PIL import Image

from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images
from twostage.core.errors import InputError
from twostage.core.images.conversion import image_to_pixels
from twostage.core.images.pixel_values import is_grey

RAMP = np.tile(np.linspace(0, 1, 64), (64, 1))
COLUMNS = [0, 16, 32, 48, 63]
SEEN = [0, 65, 130, 194, 255]
"""A linear ramp over 64 columns, at those columns."""
SHORT, LONG, SHORTS = 3, 4, "H"


def write_tiff(file: Path, values: np.ndarray, white_is_zero: bool = False) -> None:
    """An uncompressed TIFF of any type, which Pillow cannot write itself (it has no signed 16 and unsigned 32 bits)."""
    order = ">" if values.dtype.byteorder == ">" else "<"
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    height, width = values.shape
    tags = {256: (LONG, width), 257: (LONG, height), 258: (SHORT, values.dtype.itemsize * 8), 259: (SHORT, 1),
            262: (SHORT, 0 if white_is_zero else 1), 273: (LONG, 8), 277: (SHORT, 1), 278: (LONG, height),
            279: (LONG, values.nbytes), 339: (SHORT, kind)}  # fmt: skip
    fields = [struct.pack(f"{order}HHL", tag, form, 1)
              + (struct.pack(f"{order}HH", v, 0) if form == SHORT else struct.pack(f"{order}L", v))
              for tag, (form, v) in tags.items()]  # fmt: skip
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HL", 42, 8 + values.nbytes)
    file.write_bytes(
        head + values.tobytes() + struct.pack(f"{order}H", len(tags)) + b"".join(fields) + struct.pack(f"{order}L", 0)
    )


def save(folder: Path, name: str, values: np.ndarray, **options: bool) -> Path:
    folder.mkdir(exist_ok=True)
    for copy in ("a", "b"):
        file = folder / f"{copy}_{name}"
        if file.suffix == ".tif":
            write_tiff(file, values, **options)
        else:
            Image.fromarray(values).save(file)
    return folder


def load(folder: Path, **options: object):
    return load_images(DataConfig.model_validate({"source": str(folder), "image_size": 64, "channels": 1, **options}))


def seen(data) -> list[float]:
    """A row of pixels, in units of 8 bits."""
    pixels = data.splits["train"].pixels[0, 0, 0, COLUMNS]
    return (pixels.double() / (257 if pixels.dtype == torch.uint16 else 1)).tolist()


@pytest.fixture(params=["in memory", "on disk"])
def mode(request) -> dict[str, float]:
    return {} if request.param == "in memory" else {"in_memory_gb": 0.0}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("x.tif", RAMP.astype("<f4")),
        ("x.tif", RAMP.astype(">f4")),
        ("x.tif", (RAMP * 65535).round().astype("<u2")),
        ("x.tif", (RAMP * 65535).round().astype(">u2")),
        ("x.png", (RAMP * 65535).round().astype("<u2")),
        ("x.tif", (RAMP * (2**32 - 1)).astype("<u4")),
        ("x.tif", (RAMP * 65535 - 32768).round().astype("<i2")),
        ("x.tif", (RAMP * 65535 - 32768).round().astype(">i2")),
        ("x.tif", (RAMP * (2**32 - 1) - 2**31).astype("<i4")),
        ("x.png", (RAMP * 255).round().astype("u1")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.dtype.str,
)
def test_the_range_is_that_of_the_type(tmp_path, name, values):
    data = load(save(tmp_path / "images", name, values))
    assert data.splits["train"].bits == (8 if values.dtype == np.uint8 else 16)
    assert np.abs(np.array(seen(data)) - SEEN).max() <= 1
    assert data.notices == ["no `val` or `test` split: 1 of 2 training images are held out as `val`"]


@pytest.mark.parametrize(
    ("values", "value_range"),
    [
        ((RAMP * 4095).astype("<u2"), [0, 4095]),
        ((RAMP * 3000 - 1000).astype("<i2"), [-1000, 2000]),
        ((RAMP * 255).astype("<f4"), [0, 255]),
        ((RAMP * 2 - 1).astype("<f4"), [-1, 1]),
        ((RAMP * 1e6).astype("<u4"), [0, 1e6]),
        ((RAMP * 255).astype("<i4"), [0, 255]),
        ((RAMP * 1e-3).astype("<f4"), [0, 1e-3]),
    ],
    ids=["12 in 16 bits", "Hounsfield units", "floats to 255", "floats from -1", "counts", "8 in 32 bits", "small"],
)
def test_another_range_is_given(tmp_path, mode, values, value_range):
    folder = save(tmp_path / "images", "x.tif", values)
    data = load(folder, value_range=value_range, **mode)
    found = data.splits["train"].read(torch.arange(1)).numpy()[0, 0, 0, COLUMNS]
    needs_16 = values.dtype.kind == "f" or value_range != [0, 255]
    assert found.dtype == (np.uint16 if needs_16 else np.uint8), "only as many bits as the values need"
    assert np.abs(found / (257 if needs_16 else 1) - SEEN).max() <= 1
    # Without it, a notice or an error tells which range to set.
    try:
        said = " ".join(load(folder, **mode).notices)
    except InputError as error:
        said = str(error)
    (low, high), (least, most) = value_range, re.search(r"data\.value_range=\[(\S+), (\S+)\]", said).groups()
    assert float(least) == pytest.approx(low, abs=1e-3 * (high - low))
    assert float(most) == pytest.approx(high, rel=2e-3)


def test_one_range_for_all_images_not_each_its_own(tmp_path):
    folder = save(tmp_path / "images", "dark.tif", (RAMP * 6553).astype("<u2"))
    save(folder, "bright.tif", (RAMP * 65535).astype("<u2"))
    data = load(folder, validation_share=0.25)
    brightest = sorted(split.pixels[i].int().max().item() for split in data.splits.values() for i in range(len(split)))
    assert brightest == [6553, 6553, 65535, 65535]
    assert not any("small part" in line for line in data.notices), "together they use all of it"


def test_few_values_are_said_for_8_bits_too(tmp_path):
    folder = save(tmp_path / "images", "mask.png", (RAMP > 0.5).astype("u1"))
    data = load(folder)
    assert_names(
        str(data.notices), "2 images have 8-bit values from 0 to 1", "range 0 to 255", "set data.value_range=[0, 1]"
    )
    assert load(folder, value_range=[0, 1]).splits["train"].pixels.unique().tolist() == [0, 255]


def test_what_is_remembered_of_a_dataset_is_read_as_it_was(tmp_path):
    folder = save(tmp_path / "images", "x.png", (RAMP * 9).astype("u1"))
    first, again = (load(folder, value_range=[0, 4095], in_memory_gb=0) for _ in range(2))
    assert first.notices == again.notices
    assert_names(str(again.notices), "small part of the range 0 to 4095")


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_range_of_8_bits_leaves_transparency_alone(channels):
    image = Image.new("RGBA", (2, 2), (10, 20, 30, 128))
    found = image_to_pixels(image, (2, 2), channels, (0, 51))[:, 0, 0].tolist()
    assert found == {1: [172], 3: [152, 177, 202], 4: [50, 100, 150, 128]}[channels], "the range first, then on white"


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ((RAMP * 255).astype("<f4"), ["float values from 0 to 255", "expected floats from 0 to 1", "=[0, 255]"]),
        ((RAMP - 0.5).astype("<f4"), ["float values from -0.5 to 0.5", "expected floats from 0 to 1", "=[-0.5, 0.5]"]),
        ((RAMP * 255).astype("<i4"), ["signed 32-bit values from 0 to 255", "single shade", "=[0, 255]"]),
        ((RAMP * 200).astype("<u2"), ["16-bit values from 0 to 200", "single shade", "=[0, 200]"]),
    ],
)
def test_invisible_differences_are_refused(tmp_path, mode, values, parts):
    folder = save(tmp_path / "images", "x.tif", values)
    for _ in range(2):  # the second time from the cache
        with refuses(f"data.source {folder}: 2 images", "Set data.value_range", *parts):
            load(folder, **mode)


def test_values_outside_of_the_given_range_are_clipped_and_said(tmp_path):
    data = load(save(tmp_path / "images", "x.tif", (RAMP * 4095).astype("<u2")), value_range=[1000, 2000])
    assert seen(data)[0] == 0
    assert seen(data)[-1] == 255
    assert_names(str(data.notices), "values from 0 to 4095", "outside data.value_range=[1000, 2000] are clipped")


def test_values_that_are_no_numbers_are_black_and_said(tmp_path):
    values = RAMP.astype("<f4")
    values[0, :32], values[0, 48] = np.nan, np.inf
    data = load(save(tmp_path / "images", "x.tif", values))
    assert np.round(seen(data)).tolist() == [0, 0, 130, 255, 255]
    assert_names(str(data.notices), "2 images have NaN or infinite values", "NaN becomes black")


def test_a_dataset_of_one_value_is_said(tmp_path):
    data = load(save(tmp_path / "images", "x.tif", np.zeros((64, 64), "<u2")))
    assert_names(str(data.notices), "all 2 images only have the value 0")


def test_white_may_be_zero(tmp_path):
    folder = save(tmp_path / "images", "x.tif", (RAMP * 65535).round().astype("<u2"), white_is_zero=True)
    assert np.abs(np.array(seen(load(folder))) - [255 - value for value in SEEN]).max() <= 1


@pytest.mark.parametrize("value_range", [[1, 1], [2, 1], [0], "all", [0, float("inf")]])
def test_a_range_that_is_none_is_refused(value_range):
    with pytest.raises(ValueError, match="value_range"):
        DataConfig.model_validate({"value_range": value_range})


def test_every_mode_without_colour_is_grey():
    grey = ["1", "L", "LA", "La", "F", "I", "I;16", "I;16B", "I;16L", "I;16N"]
    assert all(map(is_grey, grey))
    assert not any(map(is_grey, ["RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV"]))
