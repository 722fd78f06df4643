"""Edits with every kind of bottleneck: which codes a mask redraws, that masked pixels have no influence, and where an
interpolation ends."""

import numpy as np
import pytest
import torch
from messages import refuses

from pipelines.drawing import rebuilt_images, redraw
from pipelines.files import masks
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.autoencoder_config import AutoencoderConfig
from twostage.core.config.sections import parse_config
from twostage.core.images.conversion import to_float, to_uint8

BOTTLENECKS = {
    "identity": ({"type": "identity"}, 4),
    "gaussian": ({"type": "gaussian"}, 4),
    "vector": ({"type": "vector", "codebook_size": 16}, 4),
    "normalized": ({"type": "vector", "codebook_size": 16, "l2_normalize": True}, 4),
    "finite_scalar": ({"type": "finite_scalar", "levels": [8, 5, 3]}, 3),
    "lookup_free": ({"type": "lookup_free"}, 6),
    "residual": ({"type": "residual", "codebook_size": 8, "depth": 3}, 4),
    "multi_scale": ({"type": "multi_scale", "scales": [1, 2, 4], "codes": {"type": "vector", "codebook_size": 16}}, 4),
}


def make(name: str, size: tuple[int, int] = (16, 16), channels: int = 3) -> Autoencoder:
    """A small tokenizer with that bottleneck and cells of 4x4 pixels, untrained, whose codes differ."""
    torch.manual_seed(0)
    bottleneck, latent_channels = BOTTLENECKS[name]
    document = {
        "image_size": size,
        "channels": channels,
        "model": {
            "latent_channels": latent_channels,
            "backbone": {"type": "conv", "channels": 8, "channel_mult": [1, 1, 1], "num_res_blocks": [0, 0, 0]},
            "bottleneck": bottleneck,
        },
        "loss": {"reconstruction": "l2"},
    }
    model = Autoencoder(parse_config(AutoencoderConfig, document, "test")).eval()
    with torch.no_grad():
        model.encoder.layers[-1].weight.mul_(10)
        model.encoder.layers[-1].bias.zero_()
    return model


def random_images(count: int, size: tuple[int, int] = (16, 16), channels: int = 3) -> torch.Tensor:
    """Smooth random images, (count, channels, *size) uint8."""
    noise = torch.rand(count, channels, 5, 5, generator=torch.Generator().manual_seed(1)) * 255
    return torch.nn.functional.interpolate(noise, size, mode="bilinear").to(torch.uint8)


@pytest.mark.parametrize("name", BOTTLENECKS)
def test_a_reconstruction_does_not_depend_on_the_batch(name):
    model, images = make(name), random_images(11)
    found = rebuilt_images.rebuild_images(model, images)
    assert torch.equal(found[:8], to_uint8(model.reconstruct(to_float(images[:8]))))
    assert torch.equal(rebuilt_images.rebuild_images(model, images[3:5]), found[3:5])


@pytest.mark.parametrize("name", BOTTLENECKS)
def test_an_interpolation_ends_in_the_reconstructions(name):
    model, images = make(name), random_images(2)
    between = rebuilt_images.blend_images(model, images[0], images[1], 9)
    assert between.shape == (9, 3, 16, 16)
    assert torch.equal(between[[0, -1]], rebuilt_images.rebuild_images(model, images))
    assert not torch.equal(between[0], between[-1])
    assert torch.equal(rebuilt_images.blend_images(model, images[1], images[0], 9)[[0, 8]], between[[8, 0]])
    assert torch.equal(rebuilt_images.blend_images(model, images[0], images[1], 17)[::8], between[::4])


@pytest.mark.parametrize("name", ["vector", "normalized", "finite_scalar", "lookup_free", "residual", "multi_scale"])
def test_images_between_two_are_made_of_codes(name):
    model, images = make(name), random_images(2)
    both = model.run_encoder(to_float(images))
    latent = model.bottleneck.encode(torch.lerp(both[:1], both[1:], 0.5))
    found = rebuilt_images.blend_images(model, images[0], images[1], 5)[2]
    assert torch.equal(found, to_uint8(model.decode_indices(latent.indices))[0])
    ends = [model.encode(to_float(image[None])).indices for image in images]
    assert all(not torch.equal(latent.indices, codes) for codes in ends)


def test_continuous_latents_are_blended_as_they_are():
    model, images = make("gaussian"), random_images(2)
    means = model.encode(to_float(images)).z
    found = rebuilt_images.blend_images(model, images[0], images[1], 3)[1].int()
    assert (found - to_uint8(model.decode(means.mean(0, keepdim=True)))[0].int()).abs().max() <= 1


def test_an_interpolation_needs_two_images():
    with refuses("num_images 1", "at least 2"):
        rebuilt_images.blend_images(make("identity"), *random_images(2), 1)


@pytest.mark.parametrize(
    ("size", "pixel", "cell"),
    [((16, 16), (0, 0), (0, 0)), ((16, 16), (7, 8), (1, 2)), ((9, 14), (8, 13), (2, 3)), ((9, 14), (3, 12), (0, 3))],
)
def test_a_cell_is_redrawn_if_any_of_its_pixels_is_masked(size, pixel, cell):
    mask = torch.zeros(size, dtype=torch.bool)
    mask[pixel] = True
    found = redraw.cells_to_redraw(make("vector", size), mask)
    assert found.shape == (-(-size[0] // 4), -(-size[1] // 4)), "images are padded to whole cells"
    assert found.nonzero().tolist() == [list(cell)]
    several = redraw.cells_to_redraw(make("residual", size), mask)
    assert several.shape == (found.shape[0], 3 * found.shape[1])
    assert several.nonzero().tolist() == [[cell[0], 3 * cell[1] + i] for i in range(3)], "all codes of a cell"


def test_the_one_code_of_a_fully_connected_tokenizer_is_redrawn():
    document = {
        "image_size": [6, 6],
        "channels": 1,
        "model": {
            "latent_channels": 2,
            "backbone": {"type": "mlp", "hidden_sizes": [8]},
            "bottleneck": {"type": "vector", "codebook_size": 4},
        },
        "loss": {},
    }
    model = Autoencoder(parse_config(AutoencoderConfig, document, "test"))
    assert redraw.cells_to_redraw(model, masks.named_mask("right", (6, 6))).tolist() == [[True]]


@pytest.mark.parametrize("name", ["vector", "finite_scalar", "lookup_free", "residual"])
@pytest.mark.parametrize("size", [(16, 16), (9, 14)])
def test_masked_pixels_do_not_influence_kept_codes(name, size):
    model, (image, other) = make(name, size), random_images(2, size)
    random = torch.rand(size, generator=torch.Generator().manual_seed(2)) < 0.1
    for mask in (random, masks.named_mask("left", size), masks.named_mask("center", size)):
        found = redraw.known_codes(model, torch.where(mask, other, image)[None], mask)
        assert torch.equal(found, redraw.known_codes(model, image[None], mask))
        assert torch.equal(found[0] == -1, redraw.cells_to_redraw(model, mask))
    nothing = torch.zeros(size, dtype=torch.bool)
    assert torch.equal(redraw.known_codes(model, image[None], nothing), model.encode(to_float(image[None])).indices)
    assert (redraw.known_codes(model, image[None], ~nothing) == -1).all()


def test_masked_pixels_are_filled_by_the_nearest_kept_ones():
    image = torch.arange(20, dtype=torch.uint8).view(1, 1, 4, 5)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[2:] = True
    mask[0, 0] = True
    filled = redraw.fill_masked(image, mask)[0, 0]
    assert filled[1:].tolist() == [[5, 6, 7, 8, 9]] * 3
    assert filled[0, 0] in (1, 5)
    assert filled[0, 1:].tolist() == [1, 2, 3, 4]


def test_kept_pixels_stay_exactly_the_same():
    images, drawn = random_images(2), 255 - random_images(2)
    mask = masks.named_mask("center", (16, 16))
    found = redraw.paste(images, drawn, mask)
    assert torch.equal(found[..., ~mask], images[..., ~mask])
    assert torch.equal(found[..., mask], drawn[..., mask])
    assert torch.equal(redraw.paste(images, drawn, mask, 1), found), "no pixel is nearer than 1"


def test_a_feather_blends_only_closer_pixels():
    images, drawn = torch.zeros(1, 1, 1, 12, dtype=torch.uint8), torch.full((1, 1, 1, 12), 200, dtype=torch.uint8)
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[:, :3] = True
    assert redraw.paste(images, drawn, mask, 4).flatten().tolist() == [200, 200, 200, 150, 100, 50, *[0] * 6]


@pytest.mark.parametrize(
    ("name", "count"), [("left", 4 * 3), ("right", 4 * 4), ("top", 2 * 7), ("bottom", 2 * 7), ("center", 2 * 5)]
)
def test_named_masks(name, count):
    mask = masks.named_mask(name, (4, 7))
    assert mask.sum() == count
    where = {"left": (2, 0), "right": (2, 6), "top": (0, 3), "bottom": (3, 3), "center": (2, 3)}
    assert mask[where[name]]


def test_windows_go_outwards_and_cover_everything_once():
    model = make("vector", (16, 16))
    windows = redraw.extension_windows(model, left=0, right=20, top=3, bottom=0)
    drawn = torch.zeros(19, 36)
    known = torch.zeros(19, 36, dtype=torch.bool)
    known[3:, :16] = True
    for rows, columns, mask in windows:
        assert drawn[rows, columns].shape == mask.shape == (16, 16)
        assert torch.equal(~mask, known[rows, columns]), "a window knows what was drawn before it"
        assert (~mask).float().mean() >= 0.5
        drawn[rows, columns] += mask
        known[rows, columns] = True
    assert torch.equal(drawn == 1, ~torch.nn.functional.pad(torch.ones(16, 16, dtype=torch.bool), (0, 20, 3, 0)))
    assert drawn.max() == 1
    assert [(w.rows.start, w.columns.start) for w in windows] == [
        (3, 8),
        (0, 0),
        (3, 16),
        (0, 8),
        (3, 20),
        (0, 16),
        (0, 20),
    ]


def test_windows_advance_by_whole_cells():
    (window,) = redraw.extension_windows(make("vector", (28, 28), 1), left=0, right=0, top=0, bottom=12)
    assert (window.rows, window.mask.sum()) == (slice(12, 40), 12 * 28), "14 is no multiple of 4"


def test_images_and_masks_of_another_shape_are_refused():
    model = make("vector")
    with refuses("image: expected uint8", "(3, 16, 16)", "got torch.float32"):
        rebuilt_images.check_image(model, torch.zeros(3, 16, 16))
    with refuses("first image:", "got torch.uint8", "(1, 3, 16, 16)"):
        rebuilt_images.check_image(model, random_images(1), "first image")
    with refuses("images:", "got torch.uint8", "(1, 16, 16)"):
        rebuilt_images.check_image(model, random_images(1)[0, :1], "images", batch=True)
    rebuilt_images.check_image(model, random_images(1), "images", batch=True)
    with refuses("mask: expected bool", "(16, 16)", "int64"):
        redraw.check_mask(torch.ones(16, 16, dtype=torch.int64), (16, 16))
    with refuses("mask:", "got torch.bool", "(1, 16, 16)"):
        redraw.check_mask(torch.ones(1, 16, 16, dtype=torch.bool), (16, 16))
    with refuses("mask: masks no pixel"):
        redraw.check_mask(torch.zeros(16, 16, dtype=torch.bool), (16, 16))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_mask_is_shown_in_colour(channels):
    images, mask = random_images(1, channels=channels), masks.named_mask("top", (16, 16))
    shown = masks.mark_masked(images, mask)
    assert shown.shape == (1, max(3, channels), 16, 16)
    assert len(np.unique(shown[0, :, mask].numpy(), axis=1).T) == 1
    assert torch.equal(shown[..., ~mask], images.expand_as(shown)[..., ~mask])
