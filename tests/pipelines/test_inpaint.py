"""Inpainting: kept pixels stay bit for bit, masked pixels have no influence, and bad requests are refused."""

import numpy as np
import pytest
import torch
from messages import assert_names, refuses
from other_priors import MASKED, PARALLEL, PIXELCNN, causal, with_prior
from PIL import Image

from pipelines.drawing.redraw import cells_to_redraw
from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.files.given_images import read_image
from pipelines.files.masks import MASK_NAMES, named_mask
from stage2_prior.prior import PriorLossConfig
from twostage.core.data.shapes import CLASS_NAMES, draw_shapes
from twostage.core.images.conversion import to_pil
from twostage.core.images.sheets import save_image

SIZE = (16, 16)


@pytest.fixture(scope="module")
def masked(pipeline) -> TwoStagePipeline:
    """A pipeline with a masked transformer."""
    return with_prior(pipeline, MASKED)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Two images (2, 3, 16, 16)."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(2, 3, 5, 5, generator=generator) * 255
    return torch.nn.functional.interpolate(noise, SIZE, mode="bilinear").to(torch.uint8)


@pytest.fixture(scope="module")
def free_form() -> torch.Tensor:
    """An irregular mask."""
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[2:5, 1:9] = mask[9, 3:] = mask[13:, 6] = True
    return mask


def test_kept_pixels_stay_exactly_the_same(masked, images, free_form):
    found = masked.inpaint(images[0], free_form, num_images=5)
    assert found.images.shape == (5, 3, 16, 16)
    assert found.labels is None
    assert (found.images == images[0])[..., ~free_form].all()
    drawn = masked.decode(found.codes)
    assert torch.equal(found.images[..., free_form], drawn[..., free_form]), "the rest is what the codes show"
    assert len(found.images.unique(dim=0)) == 5


def test_codes_of_cells_without_a_masked_pixel_are_kept(masked, images, free_form):
    codes = masked.inpaint(images[0], free_form, num_images=5).codes
    redrawn = cells_to_redraw(masked.tokenizer, free_form)
    assert 0 < redrawn.sum() < redrawn.numel()
    assert (codes == codes[0])[:, ~redrawn].all()
    assert not (codes == codes[0])[:, redrawn].all()


def test_masked_pixels_have_no_influence(masked, images, free_form):
    other = torch.where(free_form, images[1], images[0])
    assert not torch.equal(other, images[0])
    first, second = (masked.inpaint(image, free_form, 3, class_name="star", feather=3) for image in (images[0], other))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.images[..., free_form], second.images[..., free_form])
    assert torch.equal(first.images, second.images)


def test_a_completion_depends_on_the_seed_and_its_number_alone(masked, images, free_form):
    expected = masked.inpaint(images[0], free_form, 11, guidance_scale=2.0, class_name="star").images
    found = masked.inpaint(images[0], free_form, 3, guidance_scale=2.0, class_name="star").images
    assert torch.equal(found, expected[:3])
    assert not torch.equal(masked.inpaint(images[0], free_form, 3, seed=1).images, expected[:3])


def test_the_class_and_the_settings_take_effect(masked, images):
    mask = named_mask("right", SIZE)
    free, star, guided = (
        masked.inpaint(images[0], mask, 8, class_name=name, guidance_scale=scale)
        for name, scale in ((None, 1), ("star", 1), ("star", 4))
    )
    assert star.labels == [CLASS_NAMES.index("star")] * 8
    assert not torch.equal(free.codes, star.codes)
    assert not torch.equal(star.codes, guided.codes)
    likeliest = masked.inpaint(images[0], mask, 8, top_k=1, choice_temperature=0.0).codes
    assert (likeliest == likeliest[0]).all()
    with refuses("guidance_scale 3.0", "--class-name"):
        masked.inpaint(images[0], mask, guidance_scale=3.0)
    with refuses("class name 'strar'", "did you mean 'star'"):
        masked.inpaint(images[0], mask, class_name="strar")


def test_a_feather_does_not_change_farther_pixels(masked, images):
    mask = named_mask("right", SIZE)
    hard, soft = (masked.inpaint(images[0], mask, 2, feather=feather).images for feather in (0, 3))
    assert torch.equal(soft[..., 8:], hard[..., 8:])
    assert torch.equal(soft[..., :6], hard[..., :6])
    assert not torch.equal(soft[..., 6:8], hard[..., 6:8])
    with refuses("feather -1: expected a number of pixels"):
        masked.inpaint(images[0], mask, feather=-1)


@pytest.mark.parametrize("mask", [torch.ones(SIZE, dtype=torch.bool), named_mask("bottom", SIZE)])
def test_progress_is_reported(masked, pipeline, images, mask):
    for each in (masked, pipeline):
        shares: list[float] = []
        each.inpaint(images[0], mask, 3, on_progress=shares.append)
        assert shares == sorted(shares)
        assert shares[-1] == pytest.approx(1)
        assert shares[0] < 0.5


@pytest.mark.parametrize(
    ("model", "possible"),
    [
        (PIXELCNN, ["bottom"]),
        (causal("raster"), ["bottom"]),
        (causal("columns"), ["right"]),
        (causal("z_curve"), ["bottom"]),
        (causal("spiral"), []),
        (MASKED, list(MASK_NAMES)),
        (PARALLEL, list(MASK_NAMES)),
    ],
    ids=["pixelcnn", "raster", "columns", "z_curve", "spiral", "masked", "parallel"],
)
def test_a_prior_redraws_what_its_order_allows(pipeline, images, model, possible):
    other = with_prior(pipeline, model)
    for name in MASK_NAMES:
        mask = named_mask(name, SIZE)
        if name in possible:
            found = other.inpaint(images[0], mask, 2)
            assert torch.equal(found.images[..., ~mask], images[:1, :, ~mask].expand(2, -1, -1))
        else:
            with refuses(f"mask: this prior is a {model.type}", *possible, "masked or parallel transformer"):
                other.inpaint(images[0], mask)
    last = torch.zeros(SIZE, dtype=torch.bool)
    last[-1, -1] = True
    if model not in (causal("spiral"),):
        assert torch.equal(other.inpaint(images[0], last, 1).images[0, :, ~last], images[0, :, ~last])


def test_a_prior_without_dropped_classes_asks_for_one(pipeline, images):
    other = with_prior(pipeline, MASKED, loss=PriorLossConfig(class_dropout_prob=0.0))
    mask = named_mask("top", SIZE)
    with refuses("class name", f"--class-name, one of: {', '.join(CLASS_NAMES)}"):
        other.inpaint(images[0], mask)
    assert other.inpaint(images[0], mask, 1, class_name="star").labels == [CLASS_NAMES.index("star")]


def test_a_prior_without_classes_needs_none(pipeline, images):
    without = {"class_names": None, "conditions": [], "loss": PriorLossConfig(class_dropout_prob=0.0)}
    other = with_prior(pipeline, MASKED, **without)
    assert other.inpaint(images[0], named_mask("top", SIZE), 2).labels is None
    with refuses("class name 'star': this model was trained without classes"):
        other.inpaint(images[0], named_mask("top", SIZE), class_name="star")


def test_a_variational_autoencoder_has_no_codes_to_redraw(variational, images):
    with refuses("variational autoencoder, which has no codes"):
        TwoStagePipeline.from_pretrained(variational("gaussian")).inpaint(images[0], named_mask("top", SIZE))


def test_bad_images_masks_and_counts_are_refused(masked, images):
    mask = named_mask("top", SIZE)
    with refuses("image: expected uint8", "(3, 16, 16)"):
        masked.inpaint(images[0, :, :8], mask)
    with refuses("mask: expected bool", "(16, 16)", "(16, 8)"):
        masked.inpaint(images[0], mask[:, :8])
    with refuses("mask: masks no pixel"):
        masked.inpaint(images[0], torch.zeros_like(mask))
    with refuses("num_images 0: expected at least 1"):
        masked.inpaint(images[0], mask, 0)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(masked, tmp_path_factory):
    """The saved pipeline, `image.png` of its size, and `large.png`, which is wider than it is high."""
    root = tmp_path_factory.mktemp("inpaint")
    masked.save_pretrained(root / "pipeline")
    original = to_pil(torch.from_numpy(draw_shapes(4, 1, SIZE, 3)[0]))
    save_image(original, root / "image.png")
    original.resize((96, 48)).save(root / "large.png")
    return root


def test_the_command_writes_completions_and_a_sheet(twostage, folder, masked, tmp_path):
    out = tmp_path / "out"
    words = ("inpaint", folder / "pipeline", folder / "image.png", "left", "--num-images", 3, "--top-k", 4, "--seed", 5)
    ended = twostage(*words, "--class-name", "star", "--out", out)
    assert ended.code == 0, ended.err
    assert ended.out == f"3 completions: {out}; overview: {out / 'grid.png'}\n"
    assert sorted(path.name for path in out.iterdir()) == ["000000.png", "000001.png", "000002.png", "grid.png"]
    image = torch.from_numpy(np.asarray(Image.open(folder / "image.png")).transpose(2, 0, 1).copy())
    expected = masked.inpaint(image, named_mask("left", SIZE), 3, class_name="star", seed=5, top_k=4).images
    for number, completion in enumerate(expected):
        with Image.open(out / f"{number:06d}.png") as found:
            assert np.array_equal(np.asarray(found), completion.permute(1, 2, 0))
    with Image.open(out / "grid.png") as sheet:
        assert sheet.size == (5 * (96 + 4) + 4, 96 + 18 + 2 * 4)

    again = twostage(*words, "--class-name", "star", "--out", out)
    assert again.code == 2
    assert_names(again.err, f"--out {out}", "new folder")


def test_the_mask_is_cropped_with_the_image(twostage, folder, tmp_path):
    mask = Image.new("L", (96, 48))
    mask.paste(255, (48, 0, 96, 48))
    mask.save(tmp_path / "mask.png")
    out = tmp_path / "out"
    ended = twostage(
        "inpaint", folder / "pipeline", folder / "large.png", tmp_path / "mask.png", "--num-images", 1, "--out", out
    )
    assert ended.code == 0, ended.err
    assert f"{folder / 'large.png'}: 96x48 cropped at its centre and resized to 16x16 pixels\n" in ended.out
    (seen, _), (found, _) = (read_image(file, SIZE, 3) for file in (folder / "large.png", out / "000000.png"))
    assert torch.equal(found[..., :8], seen[..., :8])
    assert not torch.equal(found[..., 8:], seen[..., 8:])


def test_bad_input_is_refused_before_anything_is_written(twostage, folder, runs, tmp_path):
    image, out = folder / "image.png", tmp_path / "out"
    Image.new("L", (8, 16), 255).save(tmp_path / "narrow.png")
    for words, sentence in [
        ((folder / "pipeline", image, tmp_path / "narrow.png"), "narrow.png: has 8x16 pixels, expected 16x16 as"),
        ((folder / "pipeline", image, "middle"), "error: middle: no such file"),
        ((folder / "pipeline", image, "left", "--class-name", "cat"), "class name 'cat': not a class of this model"),
        ((runs.prior, image, "left"), "mask: this prior is a causal_transformer"),
        ((runs.tokenizer, image, "left"), "makes no images by itself"),
    ]:
        ended = twostage("inpaint", *words, "--out", out)
        assert ended.code == 2
        assert sentence in ended.err
    assert not out.exists()
