import socket
import sys
import warnings
from pathlib import Path

import pytest
import torch
from messages import refuses
from pydantic import TypeAdapter, ValidationError
from torch import nn

from stage1_tokenizer.features.feature_network import FeatureNetwork, FeatureNetworkConfig
from stage1_tokenizer.losses.perceptual import (
    IMAGENET_MIN_SIDE,
    IMAGENET_STAGES,
    TRUNK,
    FeaturePerceptualConfig,
    ImageNetPerceptualConfig,
    LPIPSConfig,
    PerceptualConfig,
    build_perceptual,
)
from twostage.core.machine.installation import pip_install

SIZE = (16, 20)


@pytest.fixture(scope="module")
def weights_dir(tmp_path_factory) -> Path:
    """A folder with VGG-16's convolutions, of random weights that keep the size of what passes through."""
    from torchvision.models.vgg import cfgs, make_layers

    torch.manual_seed(0)
    layers = make_layers(cfgs["D"])
    for parameter in layers.parameters():
        nn.init.kaiming_normal_(parameter) if parameter.ndim > 1 else nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("weights")
    torch.save({f"features.{name}": tensor for name, tensor in layers.state_dict().items()}, folder / TRUNK)
    return folder


@pytest.fixture(scope="module")
def reference(weights_dir):
    """The package's own LPIPS, with the same weights."""
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    stored = torch.load(weights_dir / TRUNK, weights_only=True)
    for name, parameter in network.net.named_parameters():
        parameter.data.copy_(stored["features." + name.split(".", 1)[1]])
    return network


@pytest.fixture(scope="module")
def lpips_distance(weights_dir):
    return build_perceptual(LPIPSConfig(), 3, SIZE, weights_dir)


@pytest.fixture
def features_run(tmp_path) -> str:
    torch.manual_seed(0)
    config = FeatureNetworkConfig(image_size=SIZE, channels=3, class_names=["cat", "dog"], widths=[4, 8])
    FeatureNetwork(config).save_pretrained(tmp_path / "run" / "model")
    return str(tmp_path / "run")


@pytest.fixture
def features_distance(features_run):
    return build_perceptual(FeaturePerceptualConfig(path=features_run), 3, SIZE)


@pytest.fixture(scope="module")
def imagenet_distance():
    pytest.importorskip("timm", reason="needs the extra imagenet")
    return build_perceptual(ImageNetPerceptualConfig(), 3, SIZE)


@pytest.fixture(params=["lpips", "features", "imagenet"])
def distance(request):
    return request.getfixturevalue(f"{request.param}_distance")


@pytest.fixture
def offline(monkeypatch, tmp_path) -> Path:
    """No network, and torch's cache, empty; returns where it keeps weights."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


# --- all three --------------------------------------------------------------------------------------------------------


def test_only_the_decoded_images_get_gradients(distance, random_images):
    decoded, images = random_images(2, 3, SIZE).requires_grad_(), random_images(3, 3, SIZE)[:2].requires_grad_()
    value = distance(decoded, images)
    assert value.shape == ()
    assert value.item() > 0
    value.backward()
    assert decoded.grad.isfinite().all()
    assert decoded.grad.flatten(1).norm(dim=1).min() > 0
    assert images.grad is None


def test_descent_along_the_gradient_lowers_it(distance, random_images):
    decoded, images = random_images(2, 3, SIZE).requires_grad_(), random_images(3, 3, SIZE)[:2]
    before = distance(decoded, images)
    before.backward()
    step = 1e-2 * decoded.grad / decoded.grad.norm()
    assert distance(decoded - step, images).item() < before.item()


@pytest.mark.parametrize("make", [torch.zeros, torch.ones, lambda *shape: -torch.ones(*shape)])
def test_a_distance_of_zero_has_a_finite_gradient(make, distance, random_images):
    for images in (make(2, 3, *SIZE), random_images(2, 3, SIZE)):
        decoded = images.clone().requires_grad_()
        value = distance(decoded, images)
        value.backward()
        assert value.item() == 0
        assert decoded.grad.isfinite().all()


def test_it_is_a_mean_over_the_batch(distance, random_images):
    decoded, images = random_images(4, 3, SIZE), random_images(5, 3, SIZE)[:4]
    alone = torch.stack([distance(decoded[i : i + 1], images[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(distance(decoded, images), alone.mean())
    torch.testing.assert_close(distance(images, decoded), distance(decoded, images))
    assert alone.std() > 0


def test_distances_are_float32_under_autocast(distance, random_images):
    decoded, images = random_images(2, 3, SIZE), random_images(3, 3, SIZE)[:2]
    with torch.autocast("cpu", torch.bfloat16):
        value = distance(decoded, images)
        halved = distance(decoded.bfloat16(), images)
    assert value.dtype == halved.dtype == torch.float32
    assert torch.equal(value, distance(decoded, images))
    assert torch.equal(halved, distance(decoded.bfloat16().float(), images))


def test_values_out_of_range_are_not_clamped(distance, random_images):
    images = random_images(2, 3, SIZE)
    assert distance(images * 3, images.clamp(-0.1, 0.1)) != distance((images * 3).clamp(-1, 1), images.clamp(-0.1, 0.1))


def test_the_network_is_not_trained_averaged_or_saved(distance, random_images):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), distance)
    model.train()
    model.requires_grad_(True)
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias"]
    assert not any(module.training for module in distance.modules())
    network = distance._hidden[0]
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_its_network_moves_with_the_model(features_distance):
    network = features_distance._hidden[0]
    nn.Sequential(features_distance).to("meta")
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}


@pytest.mark.parametrize("kind", ["lpips", "features", "imagenet"])
def test_building_it_keeps_the_random_state(kind, weights_dir, features_run):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    configs = {"lpips": LPIPSConfig(), "features": FeaturePerceptualConfig(path=features_run)}
    if kind == "imagenet":
        pytest.importorskip("timm", reason="needs the extra imagenet")
    build_perceptual(configs.get(kind, ImageNetPerceptualConfig()), 3, SIZE, weights_dir)
    assert torch.equal(torch.get_rng_state(), before)


# --- a feature network of one's own -----------------------------------------------------------------------------------


def test_the_formula(features_distance, features_run, random_images):
    network = FeatureNetwork.from_pretrained(features_run)
    decoded, images = random_images(2, 3, SIZE), random_images(3, 3, SIZE)[:2]
    stages = []
    for one, other in zip(network.stages(decoded), network.stages(images), strict=True):
        one, other = nn.functional.normalize(one.double(), dim=1), nn.functional.normalize(other.double(), dim=1)
        stages.append((one - other).square().sum(dim=1).mean())
    expected = sum(stages) / len(stages)
    assert features_distance(decoded, images).item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_feature_vector_of_zeros_has_a_finite_gradient(features_distance, random_images):
    for parameter in features_distance._hidden[0].parameters():
        nn.init.zeros_(parameter)
    decoded = random_images(2, 3, SIZE).requires_grad_()
    features_distance(decoded, random_images(3, 3, SIZE)[:2]).backward()
    assert decoded.grad.isfinite().all()


@pytest.mark.parametrize(("channels", "size"), [(1, SIZE), (3, (20, 16))])
def test_a_feature_network_for_other_images_is_refused(channels, size, features_run):
    got = [f"data.image_size is {size[0]}x{size[1]}", f"data.channels is {channels}"]
    with refuses(f"loss.perceptual.path {features_run}", "16x20", "3 channels", *got, "twostage train-features"):
        build_perceptual(FeaturePerceptualConfig(path=features_run), channels, size)


def test_a_missing_feature_network_is_named(tmp_path):
    with refuses("loss.perceptual.path", "nowhere", "no such folder"):
        build_perceptual(FeaturePerceptualConfig(path=str(tmp_path / "nowhere")), 3, SIZE)


# --- the ImageNet network ---------------------------------------------------------------------------------------------


def test_the_first_stages_are_compared_after_enlarging(imagenet_distance, random_images):
    decoded, images = random_images(2, 3, SIZE), random_images(3, 3, SIZE)[:2]
    size = (IMAGENET_MIN_SIDE, IMAGENET_MIN_SIDE * SIZE[1] // SIZE[0])
    large = [nn.functional.interpolate(each, size, mode="bilinear") for each in (decoded, images)]
    network, stages = imagenet_distance.network, []
    for one, other in zip(network.stages(large[0]), network.stages(large[1]), strict=True):
        one, other = nn.functional.normalize(one.double(), dim=1), nn.functional.normalize(other.double(), dim=1)
        stages.append((one - other).square().sum(dim=1).mean().item())
    expected = sum(stages[:IMAGENET_STAGES]) / IMAGENET_STAGES
    assert imagenet_distance(decoded, images).item() == pytest.approx(expected, rel=1e-4)


def test_transparent_images_are_compared_on_a_background(imagenet_distance, random_images):
    decoded, images = random_images(2, 4, SIZE), random_images(3, 4, SIZE)[:2]
    decoded[:, 3], images[:, 3] = 1, 1
    opaque = imagenet_distance(decoded[:, :3], images[:, :3])
    torch.testing.assert_close(imagenet_distance(decoded, images, torch.rand(2, 3, 1, 1)), opaque)
    images[:, 3] = -1
    hidden = images.clone()
    hidden[:, :3] = 0.5
    assert torch.equal(imagenet_distance(decoded, images, 0.2), imagenet_distance(decoded, hidden, 0.2))
    assert imagenet_distance(decoded, images, 0.2) != imagenet_distance(decoded, images, -0.2)
    decoded[:, 3] = 0
    decoded.requires_grad_()
    imagenet_distance(decoded, images, 0.2).backward()
    assert decoded.grad[:, 3].norm() > 0


def test_grey_images_are_repeated(imagenet_distance, random_images):
    decoded, images = random_images(2, 1, SIZE), random_images(3, 1, SIZE)[:2]
    repeated = [each.repeat(1, 3, 1, 1) for each in (decoded, images)]
    assert torch.equal(imagenet_distance(decoded, images), imagenet_distance(*repeated))


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with refuses("loss.perceptual imagenet", "timm", pip_install("imagenet")):
        build_perceptual(ImageNetPerceptualConfig(), 3, SIZE)


# --- LPIPS ------------------------------------------------------------------------------------------------------------


def test_it_is_the_lpips_of_the_package(lpips_distance, reference, random_images):
    decoded, images = random_images(3, 3, SIZE), random_images(4, 3, SIZE)[:3]
    expected = reference(decoded, images)
    assert expected.std() > 0
    torch.testing.assert_close(lpips_distance(decoded, images), expected.mean())


def test_grey_images_are_repeated_over_the_colours(lpips_distance, weights_dir, random_images):
    decoded, images = random_images(2, 1, SIZE).requires_grad_(), random_images(3, 1, SIZE)[:2]
    value = build_perceptual(LPIPSConfig(), 1, SIZE, weights_dir)(decoded, images)
    assert torch.equal(value, lpips_distance(decoded.repeat(1, 3, 1, 1), images.repeat(1, 3, 1, 1)))
    value.backward()
    assert decoded.grad.norm() > 0


def test_transparency_is_not_compared(lpips_distance, weights_dir, random_images):
    decoded, images = random_images(2, 4, SIZE), random_images(3, 4, SIZE)[:2]
    value = build_perceptual(LPIPSConfig(), 4, SIZE, weights_dir)(decoded, images)
    assert torch.equal(value, lpips_distance(decoded[:, :3], images[:, :3]))


def test_other_channels_are_refused(weights_dir):
    with refuses("loss.perceptual", "1, 3 or 4", "data.channels", "got 2"):
        build_perceptual(LPIPSConfig(), 2, SIZE, weights_dir)


def test_the_smallest_image(weights_dir, random_images):
    build_perceptual(LPIPSConfig(), 3, (16, 16), weights_dir)(random_images(1, 3, (16, 16)), torch.zeros(1, 3, 16, 16))
    with refuses("loss.perceptual", "16x15", "at least 16", "twostage train-features"):
        build_perceptual(LPIPSConfig(), 3, (16, 15), weights_dir)


def test_without_the_trunk_both_files_and_the_alternatives_are_named(offline, tmp_path):
    with refuses(
        "vgg16-397923af.pth (528 MB)", "https://download.pytorch.org/models/vgg16-397923af.pth", "vgg.pth",
        tmp_path / "mine" / TRUNK, offline / TRUNK, "--weights-dir", "network is unreachable",
        "twostage train-features", "loss.perceptual={type: features, path: runs/features_NAME}",
    ) as refused:  # fmt: skip
        build_perceptual(LPIPSConfig(), 3, SIZE, tmp_path / "mine")
    assert "\n" not in str(refused.value)
    assert not list(offline.iterdir())


def test_the_trunk_is_found_in_torchs_cache(offline, weights_dir, lpips_distance, random_images, tmp_path, capfd):
    offline.mkdir(parents=True)
    (offline / TRUNK).symlink_to(weights_dir / TRUNK)
    decoded, images = random_images(2, 3, SIZE), random_images(3, 3, SIZE)[:2]
    for folder in (None, tmp_path):
        found = build_perceptual(LPIPSConfig(), 3, SIZE, folder)
        assert torch.equal(found(decoded, images), lpips_distance(decoded, images))
    assert capfd.readouterr() == ("", "")


def test_without_the_package(weights_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with refuses("loss.perceptual", "pip install lpips", "twostage train-features"):
        build_perceptual(LPIPSConfig(), 3, SIZE, weights_dir)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda stored: stored.pop("features.28.bias"), ["lacks", "features.28.bias"]),
        (lambda stored: stored.update({"features.29.weight": torch.zeros(1)}), ["unexpected", "features.29.weight"]),
        (lambda stored: stored.update({"features.0.bias": torch.zeros(3)}), ["size mismatch", "slice1.0.bias"]),
    ],
)
def test_a_trunk_of_another_network_is_refused(change, complaint, weights_dir, tmp_path):
    stored = torch.load(weights_dir / TRUNK, weights_only=True)
    change(stored)
    torch.save(stored, tmp_path / TRUNK)
    with refuses(tmp_path / TRUNK, *complaint, "torchvision's VGG-16"):
        build_perceptual(LPIPSConfig(), 3, SIZE, tmp_path)


def test_the_classifier_in_the_file_is_ignored(weights_dir, tmp_path, lpips_distance, random_images):
    stored = torch.load(weights_dir / TRUNK, weights_only=True)
    torch.save(stored | {"classifier.6.bias": torch.zeros(1000)}, tmp_path / TRUNK)
    decoded, images = random_images(2, 3, SIZE), random_images(3, 3, SIZE)[:2]
    whole = build_perceptual(LPIPSConfig(), 3, SIZE, tmp_path)
    assert torch.equal(whole(decoded, images), lpips_distance(decoded, images))


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04 cut short", "a list"])
def test_a_file_that_holds_no_weights_is_refused(content, tmp_path):
    if content == "a list":
        torch.save([torch.zeros(1)], tmp_path / TRUNK)
    else:
        (tmp_path / TRUNK).write_bytes(content)
    with refuses(tmp_path / TRUNK, "list" if content == "a list" else "cannot be read", "torchvision's VGG-16"):
        build_perceptual(LPIPSConfig(), 3, SIZE, tmp_path)


def test_code_in_the_file_is_not_run(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harm",))

    torch.save({"features.0.weight": Harmful()}, tmp_path / TRUNK)
    with refuses(tmp_path / TRUNK, "cannot be read"):
        build_perceptual(LPIPSConfig(), 3, SIZE, tmp_path)
    assert not (tmp_path / "harm").exists()


def test_the_config():
    parse = TypeAdapter(PerceptualConfig).validate_python
    assert parse({"type": "lpips"}) == LPIPSConfig(weight=1.0)
    assert parse({"type": "features", "path": "runs/features", "weight": 0}).weight == 0
    for wrong in (
        {"type": "lpips", "weight": -1},
        {"type": "features"},
        {"type": "vgg"},
        {"type": "lpips", "path": ""},
    ):
        with pytest.raises(ValidationError):
            parse(wrong)
