"""Image and mask files that users give: converted to the model's form, or refused with a clear message."""

import numpy as np
import pytest
import torch
from messages import assert_names, refuses
from PIL import Image

from pipelines.files.given_images import MAX_PIXELS, find_images, open_given_image, read_image
from pipelines.files.masks import MASK_NAMES, named_mask, read_mask
from twostage.core.errors import InputError
from twostage.core.images.conversion import image_to_pixels


@pytest.fixture
def image_file(tmp_path):
    """``image_file("a.png", array)``: the file with these pixels."""

    def save(name: str, pixels: np.ndarray):
        Image.fromarray(pixels).save(tmp_path / name)
        return tmp_path / name

    return save


def test_an_image_is_converted_and_the_changes_are_named(image_file):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    found, said = read_image(image_file("a.png", pixels), (12, 20), 3)
    assert np.array_equal(found.permute(1, 2, 0), pixels)
    assert said is None
    found, said = read_image(image_file("a.png", pixels), (8, 8), 1)
    assert np.array_equal(found, image_to_pixels(Image.fromarray(pixels), (8, 8), 1))
    assert said == "20x12 cropped at its centre and resized to 8x8 pixels; mode RGB converted to L"


def test_values_of_more_than_8_bits_are_read_as_in_training(image_file):
    twelve = image_file("a.png", np.full((8, 8), 2048, dtype=np.uint16))
    assert read_image(twelve, (8, 8), 1, (0, 4095))[0].unique().tolist() == [128]
    twelve = image_file("b.png", np.linspace(0, 4095, 64).astype(np.uint16).reshape(8, 8))
    found, said = read_image(twelve, (8, 8), 1)
    assert found.max() == 16
    assert said.endswith("has 16-bit values from 0 to 4095, which is little of the range from 0 to 65535")
    eight = image_file("e.png", np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8))
    assert_names(read_image(eight, (8, 8), 1, (0, 4095))[1], "8-bit values from 0 to 255", "range from 0 to 4095")
    floats = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    assert read_image(image_file("c.tif", floats), (8, 8), 1)[0].max() == 255
    with refuses("d.tif", "float values from 0 to 255", "from 0 to 1", "data.value_range"):
        read_image(image_file("d.tif", floats * 255), (8, 8), 1)
    assert read_image(image_file("d.tif", floats * 255), (8, 8), 1, (0, 255))[0].max() == 255


def test_a_file_that_is_not_an_image_is_refused(tmp_path, image_file):
    with refuses("gone.png: no such file", "PNG"):
        read_image(tmp_path / "gone.png", (8, 8), 1)
    (tmp_path / "text.png").write_text("not an image")
    with refuses("text.png: not a readable image; expected PNG"):
        read_image(tmp_path / "text.png", (8, 8), 1)
    whole = image_file("whole.png", np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    with refuses("half.png: cannot be decoded"):
        read_image(tmp_path / "half.png", (8, 8), 1)
    Image.new("1", (MAX_PIXELS // 1000 + 1, 1000)).save(tmp_path / "huge.png")
    with refuses("huge.png: has 25001 x 1000 pixels", "at most 25 million"):
        read_image(tmp_path / "huge.png", (8, 8), 1)


def test_white_is_masked(image_file):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20), dtype=np.uint8)
    image = image_file("image.png", pixels)
    assert np.array_equal(read_mask(image_file("mask.png", pixels), image, (12, 20)), pixels >= 128)
    assert np.array_equal(read_mask(image_file("bits.png", pixels >= 128), image, (12, 20)), pixels >= 128)
    layers = np.full((12, 20, 4), 255, dtype=np.uint8)
    layers[..., 3] = pixels
    assert np.array_equal(read_mask(image_file("layer.png", layers), image, (12, 20)), pixels >= 128), (
        "transparent is black"
    )
    layers[..., :3] = [255, 100, 0]
    with refuses("layer.png: masks nothing", "Paint white"):
        read_mask(image_file("layer.png", layers), image, (12, 20))


@pytest.mark.parametrize("name", MASK_NAMES)
def test_a_mask_may_be_a_word(name, tmp_path):
    assert torch.equal(read_mask(name, tmp_path / "not looked at", (6, 9)), named_mask(name, (6, 9)))


def test_no_thin_mask_vanishes(image_file):
    pixels = np.zeros((300, 500), dtype=np.uint8)
    pixels[151, :] = pixels[:, 297] = 255
    found = read_mask(image_file("mask.png", pixels), image_file("image.png", pixels), (8, 8))
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[151 * 8 // 300, :] = expected[:, (297 - 100) * 8 // 300] = True
    assert torch.equal(found, expected)


def test_a_mask_of_another_size_is_refused(image_file):
    white = np.full((30, 50), 255, dtype=np.uint8)
    image = image_file("image.png", white)
    with refuses("mask.png: has 50x20 pixels, expected 50x30", "image.png", "center"):
        read_mask(image_file("mask.png", white[:20]), image, (8, 8))
    edge = white.copy()
    edge[:, 5:] = 0
    with refuses("mask.png: masks nothing", "centre"):
        read_mask(image_file("mask.png", edge), image, (8, 8))


def test_a_mask_is_rotated_with_its_image(tmp_path):
    """A photo is stored on its side and turned by its EXIF tag; an editor saves the mask upright."""
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right
    Image.new("L", (20, 12)).save(tmp_path / "photo.jpg", exif=exif)
    upright = np.zeros((20, 12), dtype=np.uint8)
    upright[:5] = 255
    Image.fromarray(upright).save(tmp_path / "mask.png")
    assert np.array_equal(read_mask(tmp_path / "mask.png", tmp_path / "photo.jpg", (20, 12)), upright > 0)


def test_only_the_named_decoders_are_tried(tmp_path):
    """For example, decoding EPS starts a program."""
    file = tmp_path / "image.png"
    Image.new("RGB", (4, 4)).save(tmp_path / "image.eps")
    (tmp_path / "image.eps").rename(file)
    with refuses("not a readable image"):
        open_given_image(file)


# --- folders --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Twelve images, and other things that lie in folders of images."""
    for number in range(1, 13):
        Image.new("RGB", (20, 20), (20 * number, 0, 0)).save(tmp_path / f"img {number}.png")
    (tmp_path / "img 3.png").write_bytes(b"no image")
    (tmp_path / "img 4.png").write_bytes((tmp_path / "img 5.png").read_bytes()[:40])
    Image.new("L", (8, 8)).save(tmp_path / "z.JPEG")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "cats").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "cats" / "0.png")
    (tmp_path / "folder.png").mkdir()
    return tmp_path


def test_the_images_of_a_folder_are_in_order_and_unused_files_are_named(folder, capsys):
    used = find_images([folder], 4, "--num-images")
    assert [file.name for file in used] == ["img 1.png", "img 2.png", "img 5.png", "img 6.png"]
    said = capsys.readouterr().out
    assert f"skipped: {folder / 'gone.png'}: no such file" in said
    assert f"skipped: {folder / 'img 3.png'}: not a readable image" in said
    assert f"skipped: {folder / 'img 4.png'}: " in said
    assert f"{folder}: not images: notes.txt\n" in said
    assert f"{folder}: subfolders are not searched: cats, folder.png\n" in said
    assert f"{folder}: the first 4 of 14 images; --num-images shows more\n" in said
    used = find_images([folder], 100, "--num-images")
    assert [file.name for file in used] == [f"img {n}.png" for n in (1, 2, *range(5, 13))] + ["z.JPEG"]
    assert "shows more" not in capsys.readouterr().out


def test_many_damaged_images_do_not_fill_the_screen(tmp_path, capsys):
    for number in range(30):
        (tmp_path / f"{number}.png").write_bytes(b"damaged")
    Image.new("L", (8, 8)).save(tmp_path / "good.png")
    assert [file.name for file in find_images([tmp_path], 3, "--num-images")] == ["good.png"]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 21
    assert said[-1] == f"{tmp_path}: 10 more unreadable images are skipped"


def test_files_and_folders_together(folder):
    used = find_images([folder / "z.JPEG", folder / "cats", folder / "img 1.png"], 1, "--num-images")
    assert [file.name for file in used] == ["z.JPEG", "0.png", "img 1.png"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("empty", "no readable image in this folder; expected PNG, JPEG"),
        ("classes", "no readable image in this folder, only the folders cats, dogs"),
        ("damaged", "no readable image in this folder; expected PNG"),
        ("texts", "no readable image in this folder; expected PNG"),
    ],
)
def test_a_folder_without_images(tmp_path, name, said):
    folder = tmp_path / name
    folder.mkdir()
    if name == "classes":
        for part in ("cats", "dogs"):
            (folder / part).mkdir()
            Image.new("L", (8, 8)).save(folder / part / "0.png")
    if name == "damaged":
        (folder / "a.png").write_bytes(b"x")
    if name == "texts":
        (folder / "a.txt").write_bytes(b"x")
    with pytest.raises(InputError) as refused:
        find_images([folder], 3, "--num-images")
    assert f"{folder}: {said}" in str(refused.value)


def test_a_folder_instead_of_one_image_is_refused(folder):
    with refuses("cats: is a folder; expected one image, such as", "image.png"):
        read_image(folder / "cats", (8, 8), 1)
