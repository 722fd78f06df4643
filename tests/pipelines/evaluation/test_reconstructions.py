"""What is measured of each family, against the equations."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from messages import refuses
from scipy.ndimage import gaussian_filter

from pipelines.evaluation.evaluate_tokenizer import evaluate_tokenizer
from pipelines.evaluation.reconstructions import ssim, ssim_window
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.autoencoder_config import AutoencoderConfig
from stage1_tokenizer.validation import psnr
from twostage.core.config.sections import parse_config
from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images
from twostage.core.images.conversion import to_float, to_uint8
from twostage.core.training.random import seed_for


def save_model(folder: Path, size: tuple[int, int] = (16, 16), channels: int = 3, **groups: Any) -> Path:
    """A model folder of an untrained autoencoder."""
    model = {"latent_channels": 3, "backbone": {"type": "mlp", "hidden_sizes": [16]}} | groups.get("model", {})
    document = {"image_size": size, "channels": channels, "loss": {}, **groups, "model": model}
    torch.manual_seed(0)
    Autoencoder(parse_config(AutoencoderConfig, document, "")).save_pretrained(folder)
    return folder


# --- each image -------------------------------------------------------------------------------------------------------


def reference_ssim(x: np.ndarray, y: np.ndarray, sigma: float) -> float:
    """Wang et al. 2004, equation 13, of one channel (H, W) float64."""

    def blur(image: np.ndarray) -> np.ndarray:
        return gaussian_filter(image, sigma, mode="mirror", truncate=3.5)

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, cov = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    numerator = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    return (numerator / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean()


@pytest.mark.parametrize(
    ("size", "window"), [((64, 48), 11), ((11, 40), 11), ((10, 10), 9), ((8, 9), 7), ((2, 3), 1), ((1, 1), 1)]
)
def test_ssim_is_that_of_the_paper_and_its_window_fits(size, window):
    assert ssim_window(size) == window
    x, y = torch.randint(0, 256, (2, 5, 1, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    # As wide as the images: no side is padded by more than it has.
    expected = [reference_ssim(*pair.double().numpy(), 1.5 * window / 11) for pair in torch.cat([x, y], 1)]
    torch.testing.assert_close(ssim(x, y).double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ssim(x, x), torch.ones(5))


# --- the families -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    """Of whose four latent units two hardly move."""
    folder = save_model(
        tmp_path_factory.mktemp("vae"), model={"latent_channels": 4, "bottleneck": {"type": "gaussian"}}
    )
    model = Autoencoder.from_pretrained(folder)
    with torch.no_grad():
        last = [module for module in model.encoder.modules() if isinstance(module, torch.nn.Linear)][-1]
        last.weight[:2] *= 10
        last.weight[2:4] *= 0.01
    model.save_pretrained(folder)
    return folder


def test_the_evidence_lower_bound_is_that_of_the_equations(vae):
    figures = evaluate_tokenizer(vae, "shapes", num_images=20).figures
    split = load_images(DataConfig(image_size=16)).validation
    rows = torch.arange(20) * len(split) // 20
    images, model = to_float(split.read(rows)), Autoencoder.from_pretrained(vae)
    with torch.no_grad():
        mean, log_variance = model.encoder(images).chunk(2, dim=1)
        noise = [torch.Generator().manual_seed(seed_for(0, "posterior", row)) for row in rows.tolist()]
        noise = torch.stack([torch.randn(4, 1, 1, generator=generator) for generator in noise])
        decoded = model.decoder(mean + torch.exp(log_variance / 2) * noise).double().numpy()
    mean, log_variance = mean.flatten(1).double().numpy(), log_variance.flatten(1).double().numpy()
    kl = (mean**2 + np.exp(log_variance) - 1 - log_variance).sum(1).mean() / 2
    density = (decoded - images.numpy()) ** 2 / (2 * 0.1**2) + np.log(0.1 * np.sqrt(2 * np.pi))
    nats = density.reshape(20, -1).sum(1).mean() + kl
    assert figures["kl"] == pytest.approx(kl, rel=1e-4)
    assert figures["nats_per_image"] == pytest.approx(nats, rel=1e-5)
    assert figures["bits_per_dim"] == pytest.approx(nats / 768 / np.log(2) + np.log2(127.5), rel=1e-5)
    active = (mean.var(0) > 0.01).sum()
    assert (figures["active_units"], figures["latent_units"]) == (active, 4)
    assert active == 2


def test_the_batch_size_does_not_change_the_bound(vae):
    first, second = (evaluate_tokenizer(vae, "shapes", num_images=30, batch_size=size).figures for size in (7, 30))
    for name in ("psnr", "nats_per_image", "kl", "active_units"):
        assert first[name] == pytest.approx(second[name], rel=1e-5)


def test_a_plain_autoencoder_has_neither_codes_nor_a_bound(tmp_path):
    model = save_model(tmp_path / "ae", channels=1, size=(8, 12), model={"bottleneck": {"type": "identity"}})
    found = evaluate_tokenizer(model, "shapes", num_images=10)
    assert found.figures.keys() == {"images", "psnr", "ssim", "lpips", "rfid"}
    assert "continuous" in found.verdict.sentences[1]
    assert "Gaussian window 7x7" in found.protocol["ssim"]


def test_each_code_of_a_cell_has_its_own_codebook(tmp_path):
    bottleneck = {"type": "residual", "codebook_size": 8, "depth": 3}
    model = save_model(tmp_path / "rq", model={"bottleneck": bottleneck})
    figures = evaluate_tokenizer(model, "shapes", num_images=30).figures
    rows = torch.arange(30) * 2000 // 30
    images = to_float(load_images(DataConfig(image_size=16)).validation.read(rows))
    codes = Autoencoder.from_pretrained(model).encode(images).indices.numpy()
    assert codes.shape == (30, 1, 3)
    counts = [np.bincount(codes[..., level].flatten(), minlength=8) for level in range(3)]
    entropy = np.mean([-(c[c > 0] / 30 * np.log(c[c > 0] / 30)).sum() for c in counts])
    expected = {"codebook_size": 8, "codebooks": 3, "codes_used": sum((c > 0).sum() for c in counts), "cells": 3}
    expected |= {"entropy_nats_per_code": entropy, "perplexity": np.exp(entropy), "code_bits_per_pixel": 9 / 256}
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-9)


def test_a_class_conditional_family_gets_the_classes(tmp_path):
    data = load_images(DataConfig(image_size=16))
    model = save_model(
        tmp_path / "cvae", class_names=data.class_names, model={"bottleneck": {"type": "class_gaussian"}}
    )
    autoencoder = Autoencoder.from_pretrained(model)
    with torch.no_grad():
        autoencoder.bottleneck.class_means.copy_(torch.randn(len(data.class_names), 3, 1, 1))
    autoencoder.save_pretrained(model)
    rows = torch.arange(20) * 100
    with torch.no_grad():
        moments = autoencoder.encoder(to_float(data.validation.read(rows))).flatten(1).double().numpy()
    means = autoencoder.bottleneck.class_means.detach()[data.validation.labels[rows]].flatten(1).numpy()
    kl = ((moments[:, :3] - means) ** 2 + np.exp(moments[:, 3:]) - 1 - moments[:, 3:]).sum(1).mean() / 2
    assert evaluate_tokenizer(model, "shapes", num_images=20).figures["kl"] == pytest.approx(kl, rel=1e-4)
    other = save_model(tmp_path / "other", class_names=["cat", "dog"], model={"bottleneck": {"type": "class_gaussian"}})
    with refuses(other, "['cat', 'dog']", "circle", "--data"):
        evaluate_tokenizer(other, "shapes", num_images=20)


def test_a_denoising_one_is_measured_on_corrupted_images_too(tmp_path):
    model = save_model(
        tmp_path / "dae", model={"bottleneck": {"type": "identity"}}, loss={"corruption": {"noise_std": 0.5}}
    )
    first, second = (evaluate_tokenizer(model, "shapes", num_images=20, batch_size=n) for n in (3, 20))
    rows = torch.arange(20) * 100
    pixels = load_images(DataConfig(image_size=16)).validation.read(rows)
    seeds = [seed_for(0, "corruption noise", row) for row in rows.tolist()]
    noise = torch.stack([torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    pictures = to_uint8(Autoencoder.from_pretrained(model).reconstruct(to_float(pixels) + 0.5 * noise))
    expected = psnr(pictures, pixels).mean().item()
    for evaluation in (first, second):
        assert evaluation.figures["psnr_corrupted"] == pytest.approx(expected, rel=1e-5)
        assert evaluation.figures["psnr"] != evaluation.figures["psnr_corrupted"]
