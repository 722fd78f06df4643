"""Kernels with their channels last, as a GPU keeps them, change how fast a network is and nothing else."""

import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.tokenizer_training import TokenizerConfig, train
from twostage.core.config.sections import parse_config
from twostage.core.machine import placement

CPU = torch.device("cpu")


@pytest.fixture
def as_on_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(placement, "CHANNELS_LAST_DEVICES", ("cpu",))


def last(network: torch.nn.Module) -> set[bool]:
    """Whether kernels of several channels and places have them last."""
    kernels = [each for each in network.parameters() if each.ndim == 4 and each.shape[1] > 1 and each.shape[2] > 1]
    return {each.is_contiguous(memory_format=torch.channels_last) for each in kernels}


@torch.no_grad()
def test_a_network_on_a_gpu_computes_the_same(tiny_autoencoder, random_images, monkeypatch):
    model, images = tiny_autoencoder("identity"), random_images(4)
    expected, digest = model.reconstruct(images), model.content_hash()
    assert last(model.to(CPU)) == {False}
    monkeypatch.setattr(placement, "CHANNELS_LAST_DEVICES", ("cpu",))
    assert last(model.to(CPU)) == {True}
    torch.testing.assert_close(model.reconstruct(images), expected, rtol=0, atol=1e-5)
    assert model.content_hash() == digest


def test_it_is_saved_and_loaded_as_ever(tiny_autoencoder, tmp_path, as_on_a_gpu):
    model = tiny_autoencoder("vector").to(CPU)
    model.save_pretrained(tmp_path)
    loaded = Autoencoder.from_pretrained(tmp_path)
    assert loaded.content_hash() == model.content_hash()
    assert last(loaded) == {False}


def steps(folder: Any, optimizer: str) -> TokenizerConfig:
    document = {
        "run": {"dir": str(folder), "trackers": []},
        "data": {"source": "shapes", "image_size": 16, "num_images": 64},
        "model": {
            "latent_channels": 4,
            "backbone": {"type": "conv", "channels": 8, "channel_mult": [1, 1], "num_res_blocks": [0, 1]},
            "bottleneck": {"type": "vector", "codebook_size": 8},
        },
        "loss": {"adversarial": {"channels": 8, "num_layers": 2, "start": 0.0, "ramp": 0.0}},
        "train": {"batch_size": 12, "max_steps": 4, "lr": 1e-3, "validate_every": 4, "checkpoint_every": 2,
                  "optimizer": optimizer, "mixed_precision": "no"},
    }  # fmt: skip
    return parse_config(TokenizerConfig, document, "test")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(optimizer, tmp_path, new_process, monkeypatch):
    def trained(folder: Any) -> dict[str, torch.Tensor]:
        new_process()
        train(steps(folder, optimizer))
        return load_file(folder / "model" / "model.safetensors")

    plain = trained(tmp_path / "plain")
    monkeypatch.setattr(placement, "CHANNELS_LAST_DEVICES", ("cpu",))
    at_once = trained(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    shutil.rmtree(tmp_path / "run" / "model")
    resumed = trained(tmp_path / "run")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in at_once.items())
    for name, tensor in at_once.items():  # sums in another order
        torch.testing.assert_close(tensor, plain[name], rtol=0.02, atol=2e-3)
