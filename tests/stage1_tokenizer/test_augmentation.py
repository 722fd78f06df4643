import torch

from stage1_tokenizer.augmentation import flip_half, shift
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
