"""The conditional VAE: encoder and decoder see the class, and the nats are a bound of log p(x | y)."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from messages import refuses
from torch import nn

from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.autoencoder_config import AutoencoderConfig
from stage1_tokenizer.backbones.conditional_network import ConditionalNetwork
from twostage.core.conditions.context import Context, ContextForm
from twostage.core.config.sections import parse_config

BACKBONES = {
    "conv": {"type": "conv", "channels": 8, "channel_mult": [1, 1], "num_res_blocks": [0, 1], "patch_size": 2},
    "mlp": {"type": "mlp", "hidden_sizes": [16, 8]},
    "vqgan": {"type": "vqgan", "channels": 8, "channel_mult": [1, 1], "num_res_blocks": 1, "norm_groups": 4},
}
LABELS = torch.tensor([0, 2, 1, 2])


def document(backbone: str = "mlp", bottleneck: str = "gaussian", **changes: object) -> dict[str, object]:
    model = {"latent_channels": 2, "backbone": BACKBONES[backbone], "bottleneck": {"type": bottleneck}}
    return {
        "image_size": [8, 8],
        "channels": 1,
        "class_names": ["a", "b", "c"],
        "model": model | {"condition": "class"},
        "loss": {"reconstruction": "bce"},
    } | changes


def conditional(*words: str, **changes: object) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(parse_config(AutoencoderConfig, document(*words, **changes), "test"))


@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_a_class_is_a_bias_of_the_first_layer(backbone, random_images):
    model, images = conditional(backbone), random_images(4, 1)
    for network, x in ((model.encoder, images), (model.decoder, torch.randn(4, *model.latent_shape))):
        found = network(x, Context(4, labels=LABELS))
        for label in range(3):
            plain = copy.deepcopy(network.network)
            first = next(layer for layer in plain.modules() if isinstance(layer, nn.Linear | nn.Conv2d))
            first.bias += network.shifts.weight[label]
            rows = label == LABELS
            torch.testing.assert_close(found[rows], plain(x)[rows])
        assert (found - network(x, Context(4, labels=(LABELS + 1) % 3))).abs().amax((1, 2, 3)).min() > 1e-4


@torch.no_grad()
def test_that_equals_a_one_hot_class_beside_the_input(random_images):
    model, images = conditional("mlp"), random_images(4, 1)
    first, *others = model.encoder.network[2]
    weight = torch.cat([first.weight, model.encoder.shifts.weight.T], 1)
    x = F.linear(torch.cat([(images.flatten(1) + 1) / 2, F.one_hot(LABELS, 3)], 1), weight, first.bias)
    torch.testing.assert_close(model.run_encoder(images, LABELS).flatten(1), nn.Sequential(*others)(x))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_training_moves_the_classes_of_the_batch_in_both_networks(backbone, random_images, whole_batch):
    model = conditional(backbone)
    model(random_images(4, 1), torch.tensor([0, 2, 2, 0]), whole_batch(4)).loss.backward()
    for network in (model.encoder, model.decoder):
        assert (network.shifts.weight.grad.abs().amax(1) > 0).tolist() == [True, False, True]


@torch.no_grad()
def test_nats_exceed_the_exact_ones_given_the_class_by_the_posteriors_error(random_images, whole_batch):
    """-log p(x | y) = nats - KL(q(z | x, y) || p(z | x, y)), both by a sum over the plane of z."""
    model, (image,) = conditional(), random_images(4, 1)[:1]
    for parameter in model.parameters():
        parameter *= 2  # a posterior that depends on the class
    lattice = torch.linspace(-9, 9, 241)
    z, cell = torch.cartesian_prod(lattice, lattice), (lattice[1] - lattice[0]).item() ** 2
    prior = torch.distributions.Normal(0, 1).log_prob(z).sum(1)
    target, exact = ((image + 1) / 2).flatten(), []
    for label in range(3):
        labels = torch.tensor([label])
        logits = model.run_decoder(z[..., None, None], labels.expand(len(z))).flatten(1)
        joint = prior - F.binary_cross_entropy_with_logits(logits, target.expand_as(logits), reduction="none").sum(1)
        log_p = joint.logsumexp(0) + math.log(cell)
        mean, log_variance = model.run_encoder(image[None], labels).flatten(1).chunk(2, dim=1)
        q = torch.distributions.Normal(mean, (0.5 * log_variance).exp()).log_prob(z).sum(1)
        kl = (q.exp() * (q - (joint - log_p))).sum() * cell
        assert kl > 0.01
        batch = image.expand(20000, -1, -1, -1)
        nats = model(batch, labels.expand(20000), whole_batch(20000)).metrics["nats_per_image"]
        torch.testing.assert_close(nats - kl, -log_p, rtol=0, atol=0.05)
        exact.append(-log_p.item())
    assert max(exact) - min(exact) > 0.3, "the class matters"


@torch.no_grad()
def test_the_style_of_a_sample_does_not_depend_on_its_class():
    model = conditional()
    noise = torch.randn(1, *model.latent_shape).expand(3, -1, -1, -1)
    found = model.sample_from(noise, torch.arange(3))
    assert torch.equal(found, model.decode(noise, torch.arange(3)))
    assert (found[0] - found[1]).abs().max() > 1e-3
    assert torch.equal(model.sample(4, generator=torch.Generator().manual_seed(0)),
                       model.sample(4, torch.tensor([0, 1, 2, 0]), torch.Generator().manual_seed(0)))  # fmt: skip


@torch.no_grad()
def test_it_is_saved_and_its_hash_covers_what_the_encoder_sees(tmp_path, random_images):
    model, images = conditional("conv"), random_images(4, 1)
    model.save_pretrained(tmp_path)
    loaded = Autoencoder.from_pretrained(tmp_path)
    assert torch.equal(loaded.reconstruct(images, LABELS), model.reconstruct(images, LABELS))
    before = model.content_hash()
    assert loaded.content_hash() == before
    model.decoder.shifts.weight.add_(1)
    assert model.content_hash() == before
    model.encoder.shifts.weight.add_(1)
    assert model.content_hash() != before


def test_earlier_versions_can_read_a_model_without_condition(tmp_path, tiny_autoencoder):
    tiny_autoencoder("gaussian").save_pretrained(tmp_path)
    assert "condition" not in json.loads((tmp_path / "config.json").read_text())["model"]


def test_what_does_not_fit_is_refused(random_images, whole_batch):
    with refuses("model.condition 'class'", "no classes", "`label` column", "model.condition=null"):
        conditional(class_names=None)
    for bottleneck in ("identity", "vector", "class_gaussian"):
        with refuses("model.condition 'class'", repr(bottleneck), "model.bottleneck.type=gaussian"):
            conditional("conv", bottleneck)
    with refuses("model.condition", "Sequential", "model.backbone.type", "model.condition=null"):
        ConditionalNetwork(nn.Sequential(nn.Linear(2, 2)), ContextForm(num_classes=3), (1, 1))
    model, images = conditional(), random_images(4, 1)
    for call in (
        lambda: model(images, None, whole_batch(4)),
        lambda: model.reconstruct(images),
        lambda: model.decode(torch.zeros(4, *model.latent_shape)),
    ):
        with refuses("model.condition 'class'", "no classes", "one for every image", "Use images with classes"):
            call()
