import math

import pytest
import torch
from torch.distributions import Bernoulli, Laplace, Normal

from stage1_tokenizer.losses.objective import (
    CorruptionConfig,
    ObjectiveConfig,
    corrupt,
    negative_log_likelihood,
    reconstruction_loss,
)
from twostage.core.config.sections import parse_config
from twostage.core.errors import InputError
from twostage.core.training.random import BatchRandom

KINDS = ["bce", "l1", "l2"]


@pytest.fixture
def decoded():
    return torch.randn(4, 3, 5, 2, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def images():
    return torch.rand(4, 3, 5, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1


def likelihood(kind: str, decoded: torch.Tensor, scale: float):
    """The pixels' distribution in float64; the Bernoulli's is over [0, 1]."""
    decoded = decoded.double()
    return {"bce": lambda: Bernoulli(logits=decoded), "l1": lambda: Laplace(decoded, scale),
            "l2": lambda: Normal(decoded, scale)}[kind]()  # fmt: skip


def test_values_by_hand():
    decoded, images = torch.tensor([[0.5, -1.0]]), torch.tensor([[1.0, 0.0]])
    assert reconstruction_loss(decoded, images, "l1").item() == pytest.approx((0.5 + 1.0) / 2)
    assert reconstruction_loss(decoded, images, "l2").item() == pytest.approx((0.25 + 1.0) / 2)
    soft_target = 0.5 * (math.log1p(math.exp(-1.0)) + math.log1p(math.exp(1.0)))  # a grey pixel is the target 1/2
    assert reconstruction_loss(decoded, images, "bce").item() == pytest.approx(
        (math.log1p(math.exp(-0.5)) + soft_target) / 2
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.1, 1.5])
def test_likelihood_and_its_gradient_equal_those_of_torch_distributions(kind, scale, decoded, images):
    decoded.requires_grad_()
    images = images.sign() if kind == "bce" else images  # the Bernoulli's own support: black and white
    value, _ = negative_log_likelihood(decoded, images, ObjectiveConfig(reconstruction=kind, likelihood_scale=scale))
    target = (images.double() + 1) / 2 if kind == "bce" else images.double()
    expected = -likelihood(kind, decoded, scale).log_prob(target).flatten(1).sum(1).mean()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    gradient, expected_gradient = (torch.autograd.grad(nats, decoded)[0] for nats in (value, expected))
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_bits_per_dim_are_those_of_the_8_bit_levels(kind, decoded, images):
    nats, level = negative_log_likelihood(decoded, images, ObjectiveConfig(reconstruction=kind, likelihood_scale=0.5))
    bits = nats.item() / (images[0].numel() * math.log(2)) + level
    # A grey level owns the 2/255 of [-1, 1] around it; the likelihood's mass there is its probability.
    distribution, half = likelihood(kind, decoded, 0.5), 1 / 255
    mass = distribution.cdf(images.double() + half) - distribution.cdf(images.double() - half)
    assert bits == pytest.approx(-mass.log2().mean().item(), abs=1e-4)


def test_the_bernoulli_is_not_a_density(decoded, images):
    assert negative_log_likelihood(decoded, images, ObjectiveConfig(reconstruction="bce"))[1] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_float32_under_mixed_precision(kind, decoded, images):
    low = decoded.bfloat16()
    assert torch.equal(reconstruction_loss(low, images, kind), reconstruction_loss(low.float(), images, kind))


@pytest.mark.parametrize(("key", "value"), [("likelihood_scale", 0.0), ("kl_weight", -1.0), ("reconstruction", "l3")])
def test_impossible_settings_are_refused(key, value):
    with pytest.raises(InputError, match=key):
        parse_config(ObjectiveConfig, {key: value}, "loss")


# --- corruption -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_exactly_the_masked_share_of_each_image_is_black(share, whole_batch, random_images):
    images = random_images(6, size=(8, 10))
    corrupted = corrupt(images, CorruptionConfig(masked_share=share), whole_batch(6))
    black = (corrupted == -1).flatten(1).sum(1)
    assert (black == round(share * 3 * 8 * 10)).all()
    untouched = corrupted != -1
    assert torch.equal(corrupted[untouched], images[untouched])
    if 0 < share < 1:
        assert not torch.equal(corrupted[0] == -1, corrupted[1] == -1)


def test_noise_has_its_standard_deviation(whole_batch, random_images):
    images = random_images(50, size=(16, 16))
    noise = corrupt(images, CorruptionConfig(noise_std=0.3), whole_batch(50)) - images
    assert noise.std().item() == pytest.approx(0.3, rel=0.02)
    assert abs(noise.mean().item()) < 0.01


def test_corruption_depends_on_the_image_not_on_the_process(whole_batch, random_images):
    images, config = random_images(8), CorruptionConfig(masked_share=0.3, noise_std=0.1)
    whole = corrupt(images, config, whole_batch(8))
    halves = [corrupt(images[rows], config, BatchRandom(0, rows, 8)) for rows in (slice(0, 4), slice(4, 8))]
    assert torch.equal(torch.cat(halves), whole)


def test_a_denoising_autoencoder_gets_the_corrupted_image_and_targets_the_clean_one(
    tiny_autoencoder, random_images, whole_batch
):
    images = random_images(4)
    model = tiny_autoencoder("identity", corruption=CorruptionConfig(masked_share=0.5))
    output = model(images, None, whole_batch(4))
    corrupted = corrupt(images, CorruptionConfig(masked_share=0.5), whole_batch(4))
    assert torch.equal(output.decoded, model.decoder(model.encoder(corrupted)))
    torch.testing.assert_close(output.loss, (output.decoded - images).square().mean())
    assert torch.equal(model.reconstruct(images), model.to_images(model.decoder(model.encoder(images))))
