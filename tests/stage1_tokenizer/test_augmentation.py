import numpy as np
import pytest
import torch
from PIL import Image

from stage1_tokenizer.augmentation import crop, flip_half, shift
from twostage.core.images.conversion import to_float
from twostage.core.training.random import BatchRandom


def test_half_of_the_images_are_mirrored(whole_batch, random_images):
    images = random_images(400, channels=1)
    flipped = flip_half(images, whole_batch(400))
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert (mirrored | (flipped == images).flatten(1).all(1)).all()
    assert 150 < mirrored.sum() < 250
    halves = [flip_half(images[rows], BatchRandom(0, rows, 400)) for rows in (slice(0, 200), slice(200, 400))]
    assert torch.equal(torch.cat(halves), flipped)


def test_images_are_moved_and_their_border_repeated():
    images = torch.arange(2 * 25, dtype=torch.float).view(1, 2, 5, 5).repeat(300, 1, 1, 1)
    moved = shift(images, 1, BatchRandom(0, slice(0, 300), 300))
    padded = torch.nn.functional.pad(images[:1], (1, 1, 1, 1), mode="replicate")
    places = {(y, x): padded[0, :, y : y + 5, x : x + 5] for y in range(3) for x in range(3)}
    found = [next(place for place, expected in places.items() if torch.equal(image, expected)) for image in moved]
    assert set(found) == set(places)
    assert all(15 < found.count(place) < 60 for place in places)
    assert moved.is_contiguous()
    halves = [shift(images[:150], 1, BatchRandom(0, rows, 300)) for rows in (slice(0, 150), slice(150, 300))]
    assert torch.equal(torch.cat(halves), moved)
    assert torch.equal(shift(images, 0, BatchRandom(0, slice(0, 300), 300)), images)


def test_no_move_leads_out_of_a_small_image():
    images = torch.tensor([[[[3.0]]], [[[5.0]]]])
    assert torch.equal(shift(images, 4, BatchRandom(0, slice(0, 2), 2)), images)


def pillow_windows(images: torch.Tensor, size: tuple[int, int], share: torch.Tensor, place: torch.Tensor):
    """The windows of images (B, H, W) float or (B, H, W, 4) uint8, as Pillow resizes them."""
    height, width = images.shape[1:3]
    for image, s, (down, across) in zip(images, share.tolist(), place.tolist(), strict=True):
        left, top = width * (1 - s) * across, height * (1 - s) * down
        box = (left, top, left + width * s, top + height * s)
        resized = Image.fromarray(image.numpy()).resize(size[::-1], Image.Resampling.LANCZOS, box=box)
        yield torch.from_numpy(np.array(resized))


@pytest.mark.parametrize(("full", "size", "min_share"), [((20, 30), (16, 24), 0.8), ((12, 12), (12, 12), 0.5)])
def test_a_crop_is_a_window_that_pillow_would_resize(full, size, min_share, whole_batch, random_images):
    images, random = random_images(40, channels=1, size=full), whole_batch(40)
    cropped = crop(images, size, min_share, random)
    draws = random.uniform("crop", (3,), images.device)
    share = min_share + (1 - min_share) * draws[:, 0]
    assert share.min() < min_share + 0.1
    assert share.max() > 0.9
    expected = torch.stack(list(pillow_windows(images[:, 0], size, share, draws[:, 1:]))).clamp(-1, 1)
    torch.testing.assert_close(cropped[:, 0], expected, rtol=0, atol=1e-4)


def test_a_crop_weights_colours_by_alpha_as_pillow_does(whole_batch):
    # Medium values: Pillow stores the result of each direction in 8 bits, clipped.
    pixels = torch.randint(50, 200, (40, 20, 30, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    random = whole_batch(40)
    cropped = crop(to_float(pixels.permute(0, 3, 1, 2)), (16, 24), 0.8, random)
    draws = random.uniform("crop", (3,), cropped.device)
    expected = torch.stack(list(pillow_windows(pixels, (16, 24), 0.8 + 0.2 * draws[:, 0], draws[:, 1:])))
    difference = (cropped.permute(0, 2, 3, 1) + 1) * 127.5 - expected.float()
    assert difference[..., 3].abs().max() < 3
    assert difference[expected[..., 3] > 100].abs().max() < 6  # 8 bits are coarse where alpha is small


def test_a_crop_has_no_dark_fringes(whole_batch):
    images = torch.full((20, 4, 20, 20), -1.0)  # transparent black
    images[:, [0, 3], 5:15, 5:15] = 1.0  # an opaque red square
    cropped = crop(images, (16, 16), 0.8, whole_batch(20))
    seen = cropped[:, 3] > -0.9
    assert (seen & (cropped[:, 3] < 0.9)).any()
    assert cropped[:, 0][seen].min() > 0.99
    assert (cropped[:, 1:3] == -1).all()
    assert cropped.abs().max() == 1


def test_a_crop_depends_on_the_images_place_in_the_batch_alone(whole_batch, random_images):
    images = random_images(40, size=(10, 10))
    halves = [crop(images[rows], (8, 8), 0.8, BatchRandom(0, rows, 40)) for rows in (slice(0, 20), slice(20, 40))]
    assert torch.equal(torch.cat(halves), crop(images, (8, 8), 0.8, whole_batch(40)))
