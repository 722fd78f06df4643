"""What the tests of stage one share: tiny autoencoders of every family, and random numbers for a whole batch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.autoencoder_config import AutoencoderConfig, ModelConfig
from stage1_tokenizer.training_losses import LossConfig
from twostage.core.training.random import BatchRandom

BACKBONES = {
    "conv": {"type": "conv", "channels": 8, "channel_mult": [1, 1], "num_res_blocks": [0, 1]},
    "mlp": {"type": "mlp", "hidden_sizes": [16]},
}
BOTTLENECKS = {
    "identity": {"type": "identity"},
    "gaussian": {"type": "gaussian"},
    "vector": {"type": "vector", "codebook_size": 8},
    "class_gaussian": {"type": "class_gaussian"},
    "learned": {"type": "vector", "codebook_size": 8, "codebook": "learned"},
    "simvq": {"type": "vector", "codebook_size": 8, "codebook": "simvq", "ema_decay": 0.9},
    "l2": {"type": "vector", "codebook_size": 8, "l2_normalize": True},
    "finite_scalar": {"type": "finite_scalar", "levels": [4, 3, 3, 5]},
    "lookup_free": {"type": "lookup_free"},
    "residual": {"type": "residual", "codebook_size": 8, "depth": 2},
    "gumbel_softmax": {"type": "gumbel_softmax", "codebook_size": 8},
    "binary_spherical": {"type": "binary_spherical", "group_bits": 2},
    "index_backpropagation": {"type": "index_backpropagation", "codebook_size": 8},
    "diveq": {"type": "diveq", "codebook_size": 8},
    "projected": {"type": "projected", "codebook_size": 8, "width": 8, "heads": 2},
    "product": {"type": "product", "groups": 2, "each": {"type": "vector", "codebook_size": 8}},
    "two_level": {"type": "two_level", "codebook_size": 8},
    "multi_scale": {"type": "multi_scale", "scales": [1, 3, 4], "codes": {"type": "vector", "codebook_size": 8}},
}


def _whole_batch(size: int, seed: int = 0) -> BatchRandom:
    return BatchRandom(seed, slice(0, size), size)


def _tiny_autoencoder(bottleneck: str = "vector", backbone: str = "conv", size: tuple[int, int] = (8, 8),
                      channels: int = 3, **loss: object) -> Autoencoder:  # fmt: skip
    torch.manual_seed(0)
    model = {"latent_channels": 4, "backbone": BACKBONES[backbone], "bottleneck": BOTTLENECKS[bottleneck]}
    return Autoencoder(
        AutoencoderConfig(
            image_size=size,
            channels=channels,
            class_names=["a", "b", "c"],
            model=ModelConfig.model_validate(model),
            loss=LossConfig(**loss).objective(),
        )
    )


def _random_images(count: int, channels: int = 3, size: tuple[int, int] = (8, 8)) -> Tensor:
    return torch.rand(count, channels, *size, generator=torch.Generator().manual_seed(count)) * 2 - 1


@pytest.fixture(scope="session")
def whole_batch() -> Callable[..., BatchRandom]:
    """``whole_batch(size, seed=0)``: the random numbers of a batch that one process works on."""
    return _whole_batch


@pytest.fixture(scope="session")
def tiny_autoencoder() -> Callable[..., Autoencoder]:
    """``tiny_autoencoder(bottleneck, backbone, size, channels, **loss)``: always from the same initial weights."""
    return _tiny_autoencoder


@pytest.fixture(scope="session")
def random_images() -> Callable[..., Tensor]:
    """``random_images(count, channels, size)``: float (count, channels, H, W) in [-1, 1], the same every time."""
    return _random_images
