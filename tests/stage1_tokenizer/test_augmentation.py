import numpy as np
import pytest
import torch
from PIL import Image

from stage1_tokenizer.augmentation import crop, flip_half, shift
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
    """The windows of single-channel images, as Pillow resizes them."""
    height, width = images.shape[2:]
    for image, s, (down, across) in zip(images[:, 0], share.tolist(), place.tolist(), strict=True):
        left, top = width * (1 - s) * across, height * (1 - s) * down
        box = (left, top, left + width * s, top + height * s)
        resized = Image.fromarray(image.numpy()).resize(size[::-1], Image.Resampling.LANCZOS, box=box)
        yield torch.from_numpy(np.array(resized)).clamp(-1, 1)


@pytest.mark.parametrize(("full", "size", "min_share"), [((20, 30), (16, 24), 0.8), ((12, 12), (12, 12), 0.5)])
def test_a_crop_is_a_window_that_pillow_would_resize(full, size, min_share, whole_batch, random_images):
    images, random = random_images(40, channels=1, size=full), whole_batch(40)
    cropped = crop(images, size, min_share, random)
    draws = random.uniform("crop", (3,), images.device)
    share = min_share + (1 - min_share) * draws[:, 0]
    assert share.min() < min_share + 0.1
    assert share.max() > 0.9
    torch.testing.assert_close(
        cropped[:, 0], torch.stack(list(pillow_windows(images, size, share, draws[:, 1:]))), rtol=0, atol=1e-4
    )


def test_a_crop_depends_on_the_images_place_in_the_batch_alone(whole_batch, random_images):
    images = random_images(40, size=(10, 10))
    halves = [crop(images[rows], (8, 8), 0.8, BatchRandom(0, rows, 40)) for rows in (slice(0, 20), slice(20, 40))]
    assert torch.equal(torch.cat(halves), crop(images, (8, 8), 0.8, whole_batch(40)))
