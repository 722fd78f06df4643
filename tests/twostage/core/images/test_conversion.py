"""Any image becomes (C, H, W) uint8, as a person would see it."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from twostage.core.images.conversion import image_to_pixels, to_float, to_pil, to_uint8


def gradient(height: int, width: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=-1).round().astype(np.uint8))


def first_pixel(image: Image.Image, channels: int) -> list[int]:
    pixels = image_to_pixels(image, (image.height, image.width), channels)
    assert pixels.dtype == np.uint8
    return pixels[:, 0, 0].tolist()


def reopened(image: Image.Image, form: str, **options: object) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return Image.open(buffer)


@pytest.mark.parametrize(
    ("mode", "colour", "channels", "expected"),
    [
        ("RGB", (10, 20, 30), 3, [10, 20, 30]),
        ("RGB", (10, 20, 30), 4, [10, 20, 30, 255]),
        ("RGB", (100, 100, 100), 1, [100]),
        ("RGB", (255, 0, 0), 1, [76]),
        ("L", 90, 1, [90]),
        ("L", 90, 3, [90, 90, 90]),
        ("L", 90, 4, [90, 90, 90, 255]),
        ("1", 1, 1, [255]),
        ("RGBA", (200, 0, 100, 0), 3, [255, 255, 255]),
        ("RGBA", (200, 0, 100, 255), 3, [200, 0, 100]),
        ("RGBA", (0, 0, 0, 51), 3, [204, 204, 204]),
        ("RGBA", (0, 0, 0, 51), 1, [204]),
        ("RGBA", (200, 0, 100, 7), 4, [200, 0, 100, 7]),
        ("LA", (0, 51), 1, [204]),
        ("LA", (40, 51), 4, [40, 40, 40, 51]),
        ("CMYK", (0, 255, 255, 0), 3, [255, 0, 0]),
        ("I;16", 257 * 77, 1, [77]),
        ("I;16", 200, 1, [1]),
        ("I;16", 65535, 3, [255, 255, 255]),
        ("I;16B", 257 * 77, 1, [77]),
        ("I", 0, 1, [128]),
        ("F", 77.4 / 255, 1, [77]),
    ],
)
def test_modes(mode, colour, channels, expected):
    assert first_pixel(Image.new(mode, (4, 4), colour), channels) == expected


def test_sixteen_bit_png_keeps_its_range():
    ramp = Image.fromarray(np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16))
    pixels = image_to_pixels(reopened(ramp, "PNG"), (16, 16), 1)
    assert np.abs(pixels.flatten().astype(int) - np.arange(256)).max() <= 1


def test_palette_and_its_transparency():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    assert first_pixel(reopened(image, "PNG"), 3) == [10, 200, 30]
    assert first_pixel(reopened(image, "PNG", transparency=1), 3) == [255, 255, 255]
    assert first_pixel(reopened(image, "PNG", transparency=1), 4)[3] == 0


@pytest.mark.parametrize(
    ("orientation", "transposed"), [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_270)]
)
def test_exif_orientation_is_applied(orientation, transposed):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = gradient(8, 8)
    seen = image_to_pixels(reopened(stored, "PNG", exif=exif), (8, 8), 3)
    assert np.array_equal(seen, image_to_pixels(stored.transpose(transposed), (8, 8), 3))
    assert not np.array_equal(seen, image_to_pixels(stored, (8, 8), 3))


def test_same_size_is_not_resampled():
    noise = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    assert np.array_equal(image_to_pixels(Image.fromarray(noise), (7, 5), 3), noise.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("size", "box"), [((6, 12), (0, 15, 60, 45)), ((12, 6), (15, 0, 45, 60)), ((9, 9), (0, 0, 60, 60))]
)
def test_non_square_sizes_are_cropped_at_the_centre_and_not_stretched(size, box):
    height, width = size
    pixels = image_to_pixels(gradient(60, 60), size, 3)
    assert pixels.shape == (3, height, width)
    cropped = gradient(60, 60).crop(box).resize((width, height), Image.Resampling.LANCZOS)
    assert np.array_equal(pixels, np.asarray(cropped).transpose(2, 0, 1))


def test_shrinking_is_antialiased():
    checks = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    assert np.abs(image_to_pixels(checks, (16, 16), 1).astype(int) - 127).max() <= 5


def test_every_byte_survives_the_way_to_float_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    images = to_float(pixels)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (-1, 1)
    assert torch.equal(to_uint8(images), pixels)
    assert torch.equal(pixels.flatten(), torch.arange(256, dtype=torch.uint8)), "the input is left as it was"


def test_floats_out_of_range_are_clipped_and_others_rounded():
    values = torch.tensor([-5.0, -1.0, 0.0, 1.0, 5.0, 2 * 99.6 / 255 - 1])
    assert to_uint8(values).tolist() == [0, 0, 128, 255, 255, 100]
    assert to_uint8(values.bfloat16()).dtype == torch.uint8


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_to_pil_is_the_inverse(channels, mode):
    pixels = torch.randint(256, (channels, 5, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = to_pil(pixels)
    assert (image.mode, image.size) == (mode, (7, 5))
    assert np.array_equal(image_to_pixels(image, (5, 7), channels), pixels.numpy())


@pytest.mark.parametrize("orientation", [1, 6])
def test_large_photographs_are_decoded_smaller(orientation: int):
    """Which is faster, and differs by less than rounding to 8 bits can show."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph = reopened(gradient(450, 600), "JPEG", quality=95, exif=exif)
    whole = image_to_pixels(photograph.copy(), (40, 90), 3)
    smaller = image_to_pixels(reopened(gradient(450, 600), "JPEG", quality=95, exif=exif), (40, 90), 3)
    difference = np.abs(whole.astype(int) - smaller.astype(int))
    assert 0 < difference.mean() < 0.5
    assert difference.max() <= 2
