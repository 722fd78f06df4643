"""Every tokenizer config, and what no config uses, trains and draws on a GPU without a mixture of devices, and no
training step makes the host wait. The GPU has no data."""

import copy
from pathlib import Path

import pytest
import torch
from fake_gpu import GPU, different_configs, fake_gpu, gradients, take_one_step
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from stage1_tokenizer import autoencoder, tokenizer_training
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.features import feature_training
from stage1_tokenizer.features.feature_network import FeatureNetwork, FeatureNetworkConfig
from stage1_tokenizer.features.feature_training import FeaturesTrainingConfig
from stage1_tokenizer.losses import perceptual, semantic_term
from stage1_tokenizer.tokenizer_training import TokenizerConfig
from twostage.core.config.sections import parse_config
from twostage.core.data.image_data import ImageData
from twostage.core.training.optimizer import AveragedCopy
from twostage.core.training.running_means import RunningMeans

CONFIGS = different_configs(Path(__file__).parents[2] / "configs" / "tokenizer")
READS_DATA = {
    tokenizer_training: ["load_images", "larger_images", "autoencoder_config", "condition_notices"],
    Autoencoder: ["read_given"],
    perceptual: ["_build_imagenet"],
    semantic_term: ["_imagenet_network"],
    feature_training: ["load_images", "make_network", "check_labels"],
    ImageData: ["contents"],
}
TINY = {"type": "conv", "channels": 8, "channel_mult": [1, 1], "num_res_blocks": [0, 1]}
MORE = {
    "adaptive weight, LeCam, R1": {
        "model": {"backbone": TINY, "bottleneck": {"type": "vector", "gradient": "rotation"}},
        "loss": {"adversarial": {"adaptive": True, "lecam_weight": 0.1, "r1_weight": 1.0, "num_layers": 1},
                 "perturbation": {}},
        "train": {"on_not_finite": "skip", "optimizer": "muon", "max_grad_norm": 1.0},
    },
    "logistic losses, batch statistics": {
        "model": {"backbone": {"type": "vqgan", "channels": 32, "channel_mult": [1, 1], "num_res_blocks": 1}},
        "loss": {"adversarial": {"loss": "non_saturating", "norm": "sync_batch", "num_layers": 1}},
        "train": {"on_not_finite": "skip", "weight_decay": 0.1},
    },
    "noise on the inputs": {
        "model": {"backbone": {"type": "mlp"}, "bottleneck": {"type": "identity"}},
        "loss": {"corruption": {"noise_std": 0.1}},
    },
    "terms on latents": {
        "model": {"backbone": TINY, "bottleneck": {"type": "vector"}},
        "loss": {"equivariance": {"probability": 1.0}, "latents": [{"type": "causal"}, {"type": "semantic"}]},
    },
    **{name: {"model": {"backbone": {"type": "mlp"}, "bottleneck": {"type": "vector", "codebook": name}}}
       for name in ("learned", "simvq")},
}  # fmt: skip


@pytest.fixture
def gpu_training(monkeypatch, new_process):
    """The step of each training, with any perceptual network, and without what comes before the first step."""
    take_one_step(monkeypatch, READS_DATA)
    monkeypatch.setattr(tokenizer_training, "initialize_codebook", lambda *_: None)
    monkeypatch.setattr(autoencoder, "check_range", lambda images: None)
    monkeypatch.setattr(FeatureNetwork, "features_hash", lambda self: "")
    monkeypatch.setattr(tokenizer_training, "other_sources", lambda config: {})
    monkeypatch.setattr(perceptual, "_fetch_trunk", lambda *_, **__: Path())
    monkeypatch.setattr(perceptual, "_fill_trunk", lambda *_: None)
    monkeypatch.setattr(perceptual, "_build_features", lambda config, channels, size: perceptual.FeaturePerceptual(
        FeatureNetwork(FeatureNetworkConfig(image_size=size, channels=channels, class_names=["a", "b"]))))  # fmt: skip
    new_process()


@pytest.mark.parametrize("name", [*CONFIGS, *MORE])
def test_a_tokenizer_trains_and_draws(name, gpu_training):
    if name in MORE:
        document = {"run": {"dir": "runs/none"}, **MORE[name]}
        document["train"] = {"max_steps": 2, "lr": 1e-3} | document.get("train", {})
    else:
        document = copy.deepcopy(CONFIGS[name])
    document["train"] |= {"batch_size": 4, "mixed_precision": "bf16"}
    backbone = document["model"].get("backbone", {})
    if backbone.get("type") == "conv" and "num_res_blocks" in backbone:  # more blocks would be like the first
        backbone["num_res_blocks"] = [min(1, blocks) for blocks in backbone["num_res_blocks"]]
    form = {"image_size": 16, "channels": 3} | document.get("data", {})
    sees_captions = isinstance(document["model"].get("condition"), dict)
    form |= {"source": "captioned_shapes" if sees_captions else "shapes", "num_images": 8}
    document["data"] = form | {"image_size": min(32, form["image_size"])}
    config = parse_config(TokenizerConfig, document, name)
    with fake_gpu():
        run = tokenizer_training.train(config, dry_run=True)
        assert run.step == 1
        model = run._networks[0].final.eval()
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"cuda"}
        given = torch.zeros(2, *[1, 16] * sees_captions, dtype=torch.long, device=GPU)  # labels, or tokens
        rebuilt = model.reconstruct(torch.zeros(2, config.data.channels, *config.data.size, device=GPU), given)
        drawn = []
        if model.codebook_size:
            drawn.append(model.decode_indices(torch.zeros(2, *model.code_grid, dtype=torch.long, device=GPU)))
        if model.variational:
            drawn.append(model.sample_from(torch.zeros(2, *model.latent_shape, device=GPU), given))
        assert {(each.device, each.shape) for each in drawn} <= {(rebuilt.device, rebuilt.shape)}


def test_a_feature_network_trains(gpu_training):
    document = {"run": {"dir": "runs/none"}, "data": {"source": "shapes", "image_size": 16, "num_images": 8},
                "train": {"batch_size": 4, "max_steps": 2, "lr": 1e-3, "mixed_precision": "bf16"}}  # fmt: skip
    with fake_gpu():
        assert feature_training.train(parse_config(FeaturesTrainingConfig, document, "config"), dry_run=True).step == 1


def test_the_average_of_the_weights_needs_no_value_of_the_gpu():
    with fake_gpu():
        model = torch.nn.Linear(2, 2, device=GPU)
        averaged = AveragedCopy(model, 0.9)
        for _ in range(3):
            averaged.update_parameters(model)
        means = RunningMeans()
        means.add({"loss": torch.zeros((), device=GPU)}, 0)


def test_the_gradients_of_the_stand_in_are_those_of_torch(tiny_autoencoder, random_images, whole_batch):
    model = tiny_autoencoder("vector")
    weights = list(model.parameters())
    expected = torch.autograd.grad(model(random_images(2), None, whole_batch(2)).loss, weights)
    for found, one in zip(
        gradients(model(random_images(2), None, whole_batch(2)).loss, weights), expected, strict=True
    ):
        torch.testing.assert_close(found, one)


def test_the_stand_in_refuses_what_a_gpu_refuses_and_what_waits():
    with fake_gpu():
        x = torch.zeros(3, device=GPU)
        with pytest.raises(Exception, match="devices"):
            x + torch.zeros(3)
        for waits in (x.sum().item, x.nonzero, lambda: x[x > 0], lambda: bool(x[0])):
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                waits()
