"""The perceptual and the adversarial term give the autoencoder the gradient of the loss written out in one graph."""

import pytest
import torch
from accelerate import Accelerator

from stage1_tokenizer import training_losses
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.features.feature_network import FeatureNetwork, FeatureNetworkConfig
from stage1_tokenizer.losses.discriminator import Discriminator, generator_loss
from stage1_tokenizer.training_losses import ImageLosses, LossConfig
from twostage.core.config.sections import parse_config


@pytest.fixture
def features(tmp_path):
    torch.manual_seed(0)
    network = FeatureNetwork(
        FeatureNetworkConfig(image_size=(16, 16), channels=3, class_names=["a", "b"], widths=[4, 8])
    )
    network.save_pretrained(tmp_path / "features")
    return str(tmp_path / "features")


def build(tiny_autoencoder, new_process, features, reconstruction="l1", **adversarial):
    document = {
        "reconstruction": reconstruction,
        "perceptual": {"type": "features", "path": features, "weight": 0.7},
        "adversarial": {"channels": 8, "num_layers": 2, "weight": 0.3, "start": 0.5, "ramp": 0.2} | adversarial,
    }
    config = parse_config(LossConfig, document, "loss")
    model: Autoencoder = tiny_autoencoder(size=(16, 16), **dict(config))
    torch.manual_seed(1)
    discriminator = Discriminator(config.adversarial, 3, (16, 16))
    new_process()
    return config, model, discriminator, ImageLosses(config, model, discriminator, None, Accelerator(cpu=True))


def gradients(model: Autoencoder) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("reconstruction", ["l1", "l2", "bce"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_one_backward_pass_gives_the_gradient_of_the_whole_loss(
    adaptive, reconstruction, features, tiny_autoencoder, random_images, whole_batch, new_process
):
    _, model, discriminator, losses = build(tiny_autoencoder, new_process, features, reconstruction, adaptive=adaptive)
    images, random = random_images(4, size=(16, 16)), whole_batch(4)
    output = model.eval()(images, None, random)
    gradient, terms = losses.pixel_gradient(output, images, progress=0.6, random=random)  # half way up the ramp
    (output.loss + (output.decoded * gradient).sum()).backward()
    ours = gradients(model)
    assert not any(p.grad is not None for p in discriminator.parameters())

    model.zero_grad()
    output = model(images, None, random)
    pixels = model.to_pixels(output.decoded)
    perceptual = 0.7 * losses.perceptual(pixels, images)
    adversarial = generator_loss(discriminator(pixels)[0], "hinge")
    weight = 0.15
    if adaptive:
        last = model.last_layer
        push = torch.autograd.grad(output.reconstruction + perceptual, last, retain_graph=True)[0]
        pull = torch.autograd.grad(adversarial, last, retain_graph=True)[0]
        weight *= (push.norm() / (pull.norm() + 1e-4)).item()
    (output.loss + perceptual + weight * adversarial).backward()
    torch.testing.assert_close(ours, gradients(model), rtol=2e-4, atol=1e-7)
    torch.testing.assert_close(terms["adversarial_weight"].item(), weight, rtol=1e-4, atol=0)
    torch.testing.assert_close(terms["perceptual"], perceptual.detach())
    torch.testing.assert_close(terms["adversarial"], adversarial.detach())
    whole = (output.loss + perceptual + weight * adversarial).detach()
    torch.testing.assert_close(terms["loss"], whole, rtol=1e-5, atol=1e-6)


def test_the_adaptive_ratio_is_clamped(features, tiny_autoencoder, random_images, whole_batch, new_process):
    _, model, _, losses = build(tiny_autoencoder, new_process, features, adaptive=True, max_weight=0.01, ramp=0.0)
    output = model(random_images(4, size=(16, 16)), None, whole_batch(4))
    _, terms = losses.pixel_gradient(output, random_images(4, size=(16, 16)), progress=1.0, random=whole_batch(4))
    assert terms["adversarial_weight"].item() == pytest.approx(0.3 * 0.01)


def test_the_discriminator_has_no_effect_before_its_start(
    features, tiny_autoencoder, random_images, whole_batch, new_process
):
    _, model, _, losses = build(tiny_autoencoder, new_process, features)
    output = model(random_images(4, size=(16, 16)), None, whole_batch(4))
    gradient, terms = losses.pixel_gradient(
        output, random_images(4, size=(16, 16)), progress=0.49, random=whole_batch(4)
    )
    assert list(terms) == ["perceptual", "loss"]
    torch.testing.assert_close(terms["loss"], output.loss.detach() + terms["perceptual"])
    assert gradient.abs().sum() > 0


def test_transparent_images_are_compared_on_drawn_colours(
    tiny_autoencoder, random_images, whole_batch, new_process, monkeypatch
):
    """Each image on its own, by the random numbers of the batch."""
    pytest.importorskip("timm", reason="needs the extra imagenet")
    model, images = tiny_autoencoder(channels=4), random_images(2, 4)
    new_process()
    config = parse_config(LossConfig, {"perceptual": {"type": "imagenet", "weight": 0.5}}, "loss")
    losses = ImageLosses(config, model, None, None, Accelerator(cpu=True))
    output = model(images, None, whole_batch(2))
    gradient, terms = losses.pixel_gradient(output, images, 1.0, whole_batch(2))
    background = 2 * whole_batch(2).uniform("background", (3, 1, 1), images.device) - 1
    expected = 0.5 * losses.perceptual(model.to_pixels(output.decoded), images, background)
    torch.testing.assert_close(terms["perceptual"], expected.detach())
    assert gradient[:, 3].norm() > 0
    _, others = losses.pixel_gradient(output, images, 1.0, whole_batch(2, seed=1))
    assert others["perceptual"] != terms["perceptual"]


def test_a_loss_that_ignores_transparency_says_so(tiny_autoencoder, new_process, monkeypatch):
    new_process()
    monkeypatch.setattr(training_losses, "build_perceptual", lambda *_: torch.nn.Identity())
    config = parse_config(LossConfig, {"perceptual": {"type": "lpips"}}, "loss")
    for channels, count in ((3, 0), (4, 1)):
        losses = ImageLosses(config, tiny_autoencoder(channels=channels), None, None, Accelerator(cpu=True))
        assert len(losses.notices()) == count
    assert "loss.perceptual={type: imagenet}" in losses.notices()[0]


def test_without_image_losses_there_is_nothing(tiny_autoencoder, random_images, whole_batch, new_process):
    model, images = tiny_autoencoder(), random_images(4)
    new_process()
    losses = ImageLosses(LossConfig(), model, None, None, Accelerator(cpu=True))
    assert losses.pixel_gradient(model(images, None, whole_batch(4)), images, 1.0, whole_batch(4)) == (None, {})


@pytest.mark.parametrize("backbone", ["mlp", "conv"])
def test_the_last_layer_makes_the_pixels(backbone, tiny_autoencoder):
    model = tiny_autoencoder("identity", backbone)
    with torch.no_grad():
        before = model.decoder(torch.ones(1, 4, *model.grid))
        model.last_layer.zero_()
        assert not torch.equal(model.decoder(torch.ones(1, 4, *model.grid)), before)
        assert len(model.decoder(torch.ones(1, 4, *model.grid)).mean((0, 2, 3)).shape) == 1
