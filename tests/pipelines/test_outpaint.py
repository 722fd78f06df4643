"""Outpainting: the original stays in its place, every side grows, and priors refuse sides that they cannot extend."""

import numpy as np
import pytest
import torch
from messages import assert_names, refuses
from other_priors import MASKED, PIXELCNN, causal, with_prior
from PIL import Image

from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.files.masks import named_mask
from twostage.core.data.shapes import draw_shapes
from twostage.core.images.conversion import to_pil
from twostage.core.images.sheets import save_image
from twostage.core.training.random import seed_for


@pytest.fixture(scope="module")
def masked(pipeline) -> TwoStagePipeline:
    """A pipeline with a masked transformer."""
    return with_prior(pipeline, MASKED)


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    """An image (3, 16, 16)."""
    return torch.from_numpy(draw_shapes(4, 1, (16, 16), 3)[0])


def test_the_original_stays_in_its_place_and_every_side_grows(masked, image):
    output = masked.outpaint(image, left=5, right=10, top=3, bottom=1, num_images=3, class_name="star")
    assert output.images.shape == (3, 3, 20, 31)
    assert output.codes is None
    assert len(output.labels) == 3
    assert (output.images[..., 3:19, 5:21] == image).all()
    assert len(output.images.unique(dim=0)) == 3
    for side in (
        output.images[..., :5],
        output.images[..., 21:],
        output.images[..., :3, :],
        output.images[..., 19:, :],
    ):
        assert side.float().std() > 0, "something was drawn there"


def test_a_window_is_inpainted_where_pixels_are_missing(masked, image):
    wide = masked.outpaint(image, right=8, num_images=2, seed=3).images
    moved = torch.cat([image[..., 8:], torch.zeros_like(image[..., :8])], -1)
    window = masked.inpaint(moved, named_mask("right", (16, 16)), 2, seed=seed_for(3, "window", 0)).images
    assert torch.equal(wide[..., 8:], window)
    assert torch.equal(wide[..., :16], image.expand(2, -1, -1, -1))


def test_an_image_depends_on_the_seed_and_its_number_alone(masked, image):
    expected = masked.outpaint(image, right=12, num_images=9).images
    assert torch.equal(masked.outpaint(image, right=12, num_images=2).images, expected[:2])
    assert not torch.equal(masked.outpaint(image, right=12, num_images=2, seed=1).images, expected[:2])


def test_progress_covers_all_windows(masked, image):
    shares: list[float] = []
    masked.outpaint(image, bottom=20, on_progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    assert shares[0] < 0.2


@pytest.mark.parametrize(
    ("model", "side"), [(PIXELCNN, "bottom"), (causal("columns"), "right")], ids=["pixelcnn", "columns"]
)
def test_other_priors_extend_the_sides_that_their_order_allows(pipeline, image, model, side):
    other = with_prior(pipeline, model)
    height, width = {"bottom": (26, 16), "right": (16, 26)}[side]
    found = other.outpaint(image, **{side: 10}, num_images=2).images
    assert found.shape == (2, 3, height, width)
    assert (found[..., :16, :16] == image).all()
    for sides, named in (({"left": 4}, "left"), ({"bottom": 4, "right": 4}, "right, bottom")):
        with refuses(f"{named}: this prior is a {model.type}", f"({side})", "masked or parallel transformer"):
            other.outpaint(image, **sides)


def test_bad_requests_are_refused(masked, variational, image):
    with refuses("left 0, right 0, top 0, bottom 0", "expected a number of pixels"):
        masked.outpaint(image)
    with refuses("left 4, right -1,", "none below 0"):
        masked.outpaint(image, left=4, right=-1)
    with refuses("image: expected uint8"):
        masked.outpaint(image[:1], left=4)
    with refuses("variational autoencoder, which has no codes"):
        TwoStagePipeline.from_pretrained(variational("gaussian")).outpaint(image, left=4)


def test_the_command_writes_images_and_a_sheet(twostage, masked, image, tmp_path):
    masked.save_pretrained(tmp_path / "pipeline")
    save_image(to_pil(image), tmp_path / "image.png")
    words = ("outpaint", tmp_path / "pipeline", tmp_path / "image.png", "--num-images", 2, "--out", tmp_path / "out")
    ended = twostage(*words)
    assert (ended.code, (tmp_path / "out").exists()) == (2, False)
    assert_names(ended.err, "left 0, right 0", "expected a number of pixels")
    ended = twostage(*words, "--right", 9, "--top", 4, "--top-k", 3)
    assert ended.code == 0, ended.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["000000.png", "000001.png", "grid.png"]
    expected = masked.outpaint(image, right=9, top=4, num_images=2, top_k=3).images
    for number, extended in enumerate(expected):
        with Image.open(tmp_path / "out" / f"{number:06d}.png") as found:
            assert np.array_equal(np.asarray(found), extended.permute(1, 2, 0))
