import pytest
import torch
import torch.nn.functional as F
from messages import refuses
from torch import nn

from stage1_tokenizer.losses.discriminator import (
    AdversarialConfig,
    Discriminator,
    adversarial_weight,
    discriminator_loss,
    generator_loss,
    r1_penalty,
)
from twostage.core.config.sections import parse_config

LOSSES = ["hinge", "non_saturating", "vanilla"]


def config(**options: object) -> AdversarialConfig:
    return parse_config(AdversarialConfig, {"channels": 8, "num_layers": 2} | options, "adversarial")


def logits(seed: int) -> torch.Tensor:
    return torch.randn(
        4, 1, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.double, requires_grad=True
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_the_signs_of_the_gradients(loss):
    real, fake = logits(0), logits(1)
    discriminator_loss(real, fake, config(loss=loss)).backward()
    assert (real.grad <= 0).all()  # a step makes real logits rise
    assert real.grad.min() < 0
    assert (fake.grad >= 0).all()
    assert fake.grad.max() > 0
    fake = logits(1)
    generator_loss(fake, loss).backward()
    assert (fake.grad < 0).all()  # and the generator makes the fake ones rise


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("lecam_weight", [0.0, 0.3])
def test_gradients_equal_finite_differences(loss, lecam_weight):
    settings, ema = config(loss=loss, lecam_weight=lecam_weight), torch.tensor([0.4, -0.3], dtype=torch.double)
    assert torch.autograd.gradcheck(lambda r, f: discriminator_loss(r, f, settings, ema), (logits(0), logits(1)))
    assert torch.autograd.gradcheck(lambda f: generator_loss(f, loss), (logits(1),))


def test_losses_by_hand():
    real, fake = torch.tensor([0.5, 2.0]), torch.tensor([-3.0, 1.0])
    assert discriminator_loss(real, fake, config()).item() == pytest.approx(0.5 * (0.25 + 1.0))
    logistic = 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
    for loss in ("vanilla", "non_saturating"):
        torch.testing.assert_close(discriminator_loss(real, fake, config(loss=loss)), logistic)
    ema = torch.tensor([1.0, -1.0])
    with_lecam = discriminator_loss(real, fake, config(lecam_weight=2.0), ema).item()
    expected = 2 * (
        (1.5**2 + 3.0**2) / 2 + (4.0**2 + 0) / 2
    )  # real above the fakes' average, fake below the real ones'
    assert with_lecam == pytest.approx(0.625 + expected)


def test_non_saturating_is_the_cross_entropy_of_fakes_labelled_real():
    fake = logits(1)
    expected = F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake))
    torch.testing.assert_close(generator_loss(fake, "non_saturating"), expected)


def test_r1_is_half_the_squared_gradient_and_can_be_trained():
    torch.manual_seed(0)
    weight = torch.randn(3 * 4 * 4, dtype=torch.double, requires_grad=True)
    images = torch.randn(5, 3, 4, 4, dtype=torch.double, requires_grad=True)
    penalty = r1_penalty(torch.tanh(images.flatten(1) @ weight), images)
    slopes = 1 - torch.tanh(images.flatten(1) @ weight).square()
    torch.testing.assert_close(penalty, 0.5 * (slopes.square() * weight.square().sum()).mean())
    assert torch.autograd.grad(penalty, weight)[0].abs().sum() > 0


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(16, 16), (17, 24)])
@pytest.mark.parametrize("norm", ["group", "sync_batch", "none"])
def test_each_patch_has_a_logit(norm, size, channels):
    net = Discriminator(config(norm=norm), channels, size)
    real, fake = net(torch.randn(2, channels, *size), torch.randn(3, channels, *size))
    assert real.shape[:2] == (2, 1)
    assert fake.shape[0] == 3
    assert min(real.shape[2:]) >= 1


def test_three_layers_see_70_pixels():
    net = Discriminator(AdversarialConfig(channels=4, norm="none"), 1, (128, 128))
    image = torch.randn(1, 1, 128, 128, requires_grad=True)
    (output,) = net(image)
    middle = output[0, 0, output.shape[2] // 2, output.shape[3] // 2]
    seen = torch.autograd.grad(middle, image)[0][0, 0].abs() > 0
    assert seen.any(0).sum() == seen.any(1).sum() == 70


def test_the_first_convolutions_start_as_in_pix2pix():
    torch.manual_seed(0)
    net = Discriminator(AdversarialConfig(), 3, (32, 32))
    stds = [layer.weight.std().item() for layer in net.layers if isinstance(layer, nn.Conv2d)]
    assert stds == pytest.approx([0.02] * len(stds), rel=0.1)


def test_images_too_small_are_refused():
    with refuses("loss.adversarial.num_layers 3", "23x40", "24 pixels", "fewer layers"):
        Discriminator(AdversarialConfig(), 3, (23, 40))


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_the_smallest_images_have_one_patch(num_layers):
    side = 3 * 2**num_layers
    (output,) = Discriminator(config(num_layers=num_layers), 3, (side, side))(torch.zeros(1, 3, side, side))
    assert output.shape == (1, 1, 1, 1)


def test_the_weight_starts_late_and_ramps():
    settings = config(weight=0.5, start=0.2, ramp=0.4)
    weights = [adversarial_weight(settings, progress) for progress in (0, 0.19, 0.2, 0.4, 0.6, 1.0)]
    assert weights == pytest.approx([0, 0, 0, 0.25, 0.5, 0.5])
    assert adversarial_weight(config(weight=0.5, start=0.2, ramp=0.0), 0.2) == 0.5


def test_lecam_averages_over_the_parts_of_a_batch_and_the_processes():
    net = Discriminator(config(), 1, (16, 16))
    for real, fake in [(1.0, -1.0), (3.0, -5.0)]:
        metrics = net.observe(torch.tensor(0.5), torch.full((2, 1, 3, 3), real), torch.full((2, 1, 3, 3), fake))
    assert metrics["discriminator_accuracy"] == 1.0
    net.update_statistics(lambda sums: sums * 2)  # two processes that saw the same
    torch.testing.assert_close(net.ema_logits, torch.tensor([2.0, -3.0]) * 0.01)
    assert net.pending_logits.sum() == 0
