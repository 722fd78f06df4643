import pytest
import torch
from messages import refuses

from stage1_tokenizer.losses.equivariance import EquivarianceConfig, Transform, draw_transform
from twostage.core.training.random import BatchRandom, seed_for

ALWAYS = EquivarianceConfig(probability=1.0)


def batch(step: int, rows: slice = slice(0, 8)) -> BatchRandom:
    return BatchRandom(seed_for(0, step), rows, 8)


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [(4, 6), (2, 3)])
def test_images_change_as_their_latents_do(turns, size):
    """Seen through a decoder that repeats each cell, and images that are such repetitions."""
    latent = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))

    def decode(z: torch.Tensor) -> torch.Tensor:
        return z.repeat_interleave(2, 2).repeat_interleave(2, 3)

    transform = Transform(size, turns)
    images, decoded = transform.of_images(decode(latent), 2), decode(transform.of_latent(latent))
    assert images.shape == decoded.shape == (2, 3, *[2 * side for side in (size[::-1] if turns % 2 else size)])
    torch.testing.assert_close(images.mean((2, 3)), decoded.mean((2, 3)), rtol=0.1, atol=0.1)
    if size == (4, 6):
        assert torch.equal(images, decoded)
        assert torch.equal(images, torch.rot90(decode(latent), turns, (2, 3)))


def test_transforms_depend_on_the_step_alone():
    drawn = [draw_transform((8, 12), ALWAYS, batch(step)) for step in range(400)]
    assert drawn == [draw_transform((8, 12), ALWAYS, batch(step, slice(4, 8))) for step in range(400)]
    assert {transform.turns for transform in drawn} == {1, 2, 3}
    assert {transform.grid for transform in drawn} == {(rows, round(rows * 1.5)) for rows in range(2, 9)}


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_the_share_of_transformed_steps(probability):
    config = EquivarianceConfig(probability=probability)
    share = sum(draw_transform((7, 7), config, batch(step)) is not None for step in range(2000)) / 2000
    assert share == pytest.approx(probability, abs=0.04)


@pytest.mark.parametrize("family", ["vector", "residual", "gaussian", "product"])
@pytest.mark.parametrize("size", [(16, 16), (8, 12)])
def test_the_loss_is_that_of_the_transformed_image(family, size, tiny_autoencoder, random_images):
    model, images = tiny_autoencoder(family, size=size), random_images(8, size=size)
    plain = model(images, None, batch(0))
    assert plain.target is images
    shapes = set()
    for step in range(6):
        transform = draw_transform(model.grid, ALWAYS, batch(step))
        output = model(images, None, batch(step), None, ALWAYS)
        assert torch.equal(output.target, transform.of_images(images, model.factor))
        assert output.decoded.shape == output.target.shape
        torch.testing.assert_close(output.encoded, model.run_encoder(images))
        if family != "gaussian":
            torch.testing.assert_close(output.reconstruction, (output.decoded - output.target).square().mean())
        shapes.add(output.target.shape)
    assert len(shapes) > 2
    (gradient,) = torch.autograd.grad(output.reconstruction, next(model.encoder.parameters()))
    assert gradient.abs().sum() > 0


def test_the_decoder_sees_codes(tiny_autoencoder, random_images):
    model, images = tiny_autoencoder("vector"), random_images(8)
    output = model(images, None, batch(1), None, ALWAYS)
    torch.testing.assert_close(output.bottleneck.z, model.bottleneck.lookup(output.bottleneck.indices))


@pytest.mark.parametrize(
    ("size", "grid", "fixed", "said"),
    [
        ((28, 28), (1, 1), False, ["28x28", "1x1", "model.backbone.type=conv"]),
        ((30, 28), (8, 7), False, ["30x28", "multiple of its 4 pixels", "loss.equivariance=null"]),
        ((28, 28), (7, 7), True, ["class_gaussian", "multi_scale", "model.bottleneck={type: vector}"]),
    ],
)
def test_latents_that_cannot_be_scaled_are_refused(size, grid, fixed, said):
    with refuses("loss.equivariance", *said):
        ALWAYS.check(size, grid, 4, fixed, False)
    with refuses("loss.equivariance", "'map'", "model.condition=null"):
        ALWAYS.check((28, 28), (7, 7), 4, False, True)
    ALWAYS.check((28, 32), (7, 8), 4, False, False)
