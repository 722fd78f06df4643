import json

import pytest
import torch
from messages import refuses
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from stage1_tokenizer.features.feature_network import FeatureNetwork, FeatureNetworkConfig


def tiny_network(size: tuple[int, int] = (8, 8), channels: int = 3, widths: tuple[int, ...] = (4, 6, 8), seed: int = 0):
    torch.manual_seed(seed)
    config = FeatureNetworkConfig(
        image_size=size, channels=channels, class_names=["cat", "dog", "owl"], widths=list(widths)
    )
    return FeatureNetwork(config).eval()


@pytest.mark.parametrize("size", [(8, 8), (9, 14), (1, 1)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_shapes(size, channels, random_images):
    network, images = tiny_network(size, channels), random_images(5, channels, size)
    shapes = [(5, width, -(-size[0] // 2**i), -(-size[1] // 2**i)) for i, width in enumerate((4, 6, 8))]
    assert [tuple(features.shape) for features in network.stages(images)] == shapes
    assert network.num_features == 8
    assert network.features(images).shape == (5, 8)
    assert network(images).shape == (5, 3)


def test_the_logits_follow_from_the_features(random_images):
    network, images = tiny_network(), random_images(4)
    torch.testing.assert_close(network.features(images), network.stages(images)[-1].amax(dim=(2, 3)))
    torch.testing.assert_close(network(images), network.head(network.features(images)))


def test_features_depend_on_one_image_alone(random_images):
    network, images = tiny_network().train(), random_images(6)
    together = network.features(images)
    alone = torch.cat([network.features(image[None]) for image in images])
    torch.testing.assert_close(together, alone)
    assert together.std(dim=0).min() > 0
    assert not list(network.buffers())


def test_gradients_reach_every_weight_and_the_images(random_images):
    network, images = tiny_network(), random_images(4).requires_grad_()
    torch.nn.functional.cross_entropy(network(images), torch.tensor([0, 1, 2, 0])).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in [*network.parameters(), images])


@pytest.mark.parametrize("method", ["__call__", "features", "stages"])
def test_images_of_another_size_are_refused(method, random_images):
    look = getattr(tiny_network((8, 12)), method)
    with refuses("3 channels and 12x8 pixels", "3 channels and 8x12 pixels", "twostage train-features"):
        look(random_images(2, 3, (12, 8)))
    with refuses("1 channel and 8x12 pixels", "3 channels and 8x12 pixels", "twostage train-features"):
        look(random_images(2, 1, (8, 12)))


def test_saved_and_loaded_it_is_the_same(tmp_path, random_images):
    network, images = tiny_network((8, 12)).train(), random_images(3, 3, (8, 12))
    network.save_pretrained(tmp_path / "run" / "model")
    loaded = FeatureNetwork.from_pretrained(tmp_path / "run")
    assert loaded.config == network.config
    assert not loaded.training
    assert torch.equal(loaded(images), network(images))
    assert loaded.content_hash() == network.content_hash()
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["kind"] == "features"


def test_the_hash_changes_with_the_weights_and_the_form():
    hashes = [tiny_network(), tiny_network(seed=1), tiny_network((8, 12))]
    renamed = FeatureNetwork(hashes[0].config.model_copy(update={"class_names": ["a", "b", "c"]}))
    renamed.load_state_dict(hashes[0].state_dict())
    assert len({network.content_hash() for network in [*hashes, renamed]}) == 4
    assert tiny_network().content_hash() == tiny_network().content_hash()


def test_another_kind_of_model_is_refused(tmp_path, tiny_autoencoder):
    tiny_autoencoder().save_pretrained(tmp_path / "tokenizer")
    with refuses(tmp_path / "tokenizer", "tokenizer", "features"):
        FeatureNetwork.from_pretrained(tmp_path / "tokenizer")
    with refuses("nowhere", "no such folder"):
        FeatureNetwork.from_pretrained(tmp_path / "nowhere")


def test_weights_of_another_network_are_refused(tmp_path):
    tiny_network().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"head.bias": torch.zeros(4)}, tmp_path / "model.safetensors")
    with refuses("config.json", "head.bias"):
        FeatureNetwork.from_pretrained(tmp_path)


@pytest.mark.parametrize("wrong", [{"widths": []}, {"widths": [0]}, {"class_names": []}, {"channels": 0}, {"depth": 3}])
def test_a_wrong_config_is_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        FeatureNetworkConfig.model_validate({"image_size": [8, 8], "channels": 3, "class_names": ["a", "b"]} | wrong)
