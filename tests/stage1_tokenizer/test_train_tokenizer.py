import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from messages import assert_names, refuses
from PIL import Image
from safetensors.torch import load_file

from stage1_tokenizer import tokenizer_training
from stage1_tokenizer.augmentation import crop
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.tokenizer_training import TokenizerConfig, train
from stage1_tokenizer.train_tokenizer import command
from twostage.core.config.sections import parse_config
from twostage.core.data import decoded_cache
from twostage.core.data.dataset import load_images
from twostage.core.images.conversion import to_float, to_uint8

VAE = {"backbone": {"type": "mlp", "hidden_sizes": [16]}, "bottleneck": {"type": "gaussian"}}

TRAINING = (train, TokenizerConfig)  # what `start` starts


@pytest.fixture
def document(tmp_path) -> Callable[..., dict]:
    """``document(model, **train)``: a config of six small steps."""

    def document(model: dict | None = None, **train: object) -> dict:
        vector = {
            "backbone": {"type": "conv", "channels": 8, "channel_mult": [1, 1], "num_res_blocks": [0, 1]},
            "bottleneck": {"type": "vector", "codebook_size": 8},
        }
        return {
            "run": {"dir": str(tmp_path / "run"), "seed": 3, "trackers": []},
            "data": {"source": "shapes", "image_size": 8, "num_images": 64},
            "model": {"latent_channels": 4} | (model or vector),
            "train": {"batch_size": 16, "max_steps": 6, "lr": 1e-3, "validate_every": 2, "checkpoint_every": 3,
                      "log_every": 2, "keep_checkpoints": 9} | train,
        }  # fmt: skip

    return document


def read_metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_writes_its_folder(document, tmp_path, new_process):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(document(max_steps=99)))
    command(tmp_path / "config.yaml", ["train.max_steps=6", "train.keep_checkpoints=1"])
    run = tmp_path / "run"
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["max_steps"] == 6
    lines = read_metrics(run)
    assert [line["step"] for line in lines if line["split"] == "train"] == [2, 3, 4, 6]
    assert [line["step"] for line in lines if line["split"] == "val"] == [2, 4, 6]
    assert lines[-1].keys() >= {"loss", "reconstruction", "commitment", "psnr", "codebook_usage", "perplexity"}
    assert sorted(path.name for path in (run / "samples").iterdir()) == [f"step_{s:08d}.png" for s in (2, 4, 6)]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000006"]
    assert Autoencoder.from_pretrained(run).codebook_size == 8
    assert (run / "losses.png").is_file()


def test_a_vae_reports_nats_and_bits_and_shows_samples(document, start, capsys):
    run = start(document(VAE, max_steps=2))
    lines = [line for line in capsys.readouterr().out.splitlines() if "nats_per_image" in line]
    assert len(lines) == 2, "training and validation"
    assert not any("loss" in line for line in lines), "the same number twice"
    for line in read_metrics(run):
        assert line.keys() >= {"loss", "nats_per_image", "bits_per_dim", "kl"}
        assert line["loss"] == line["nats_per_image"]
    with Image.open(run / "samples" / "step_00000002.png") as image:
        assert image.height > 3 * 88  # originals, reconstructions, samples
        assert image.width > 12 * 88


def test_the_loss_falls(document, start):
    run = start(document(max_steps=40, lr=3e-3, validate_every=20, checkpoint_every=40))
    first, last = (line["reconstruction"] for line in read_metrics(run) if line["split"] == "val")
    assert last < 0.8 * first


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_the_last_validation_measures_the_stored_model(ema_decay, document, start):
    config = document(lr=1e-2, ema_decay=ema_decay)
    config["model"]["bottleneck"]["codebook_size"] = 128
    run = start(config)
    model, line = Autoencoder.from_pretrained(run), read_metrics(run)[-1]
    split = load_images(parse_config(TokenizerConfig, config, "config").data).validation
    pixels = split.read(torch.arange(len(split)))
    restored, indices = model.reconstruct(to_float(pixels)), model.encode(to_float(pixels)).indices
    error = (to_uint8(restored).double() - pixels).square().flatten(1).mean(1)
    assert line["psnr"] == pytest.approx((10 * (255**2 / error).log10()).mean().item(), rel=1e-5)
    assert line["codebook_usage"] == len(indices.unique()) / 128 < 1
    shares = indices.flatten().bincount() / indices.numel()
    assert line["perplexity"] == pytest.approx(torch.special.entr(shares).sum().exp().item(), rel=1e-5)
    decoded = model.decoder(model.encode(to_float(pixels)).z)
    assert line["reconstruction"] == pytest.approx((decoded - to_float(pixels)).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("max_grad_norm", [None, 1e-12])
def test_gradients_are_clipped(max_grad_norm, document, start):
    run = start(document(max_steps=2, checkpoint_every=1, max_grad_norm=max_grad_norm))
    first, second = (run / "checkpoints" / f"step_{step:08d}" / "model.safetensors" for step in (1, 2))
    moved = (load_file(second)["encoder.layers.0.bias"] - load_file(first)["encoder.layers.0.bias"]).abs().max()
    assert moved < 1e-5 if max_grad_norm else moved > 1e-4  # far below Adam's epsilon a gradient does nothing


def test_the_average_follows_the_weights(document, start):
    run = start(document(max_steps=2, validate_every=1, checkpoint_every=1, ema_decay=0.9))
    first, second = (run / "checkpoints" / f"step_{step:08d}" for step in (1, 2))
    weights = [load_file(folder / "model.safetensors")["encoder.layers.0.bias"] for folder in (first, second)]
    averages = [load_file(folder / "ema.safetensors")["module.encoder.layers.0.bias"] for folder in (first, second)]
    assert torch.equal(averages[0], weights[0])
    torch.testing.assert_close(averages[1], weights[0] * 2 / 11 + weights[1] * 9 / 11)  # the decay warms up
    assert not torch.equal(averages[1], weights[1])
    assert torch.equal(load_file(run / "model" / "model.safetensors")["encoder.layers.0.bias"], averages[1])


@pytest.mark.parametrize("family", ["ema", "learned", "vae"])
def test_a_killed_run_ends_as_if_uninterrupted(family, document, start):
    config = document(VAE if family == "vae" else None, ema_decay=0.9, gradient_accumulation_steps=2,
                      lr_schedule="cosine", warmup_steps=2, max_grad_norm=0.1, checkpoint_every=2)  # fmt: skip
    config["data"] |= {"horizontal_flip": True, "random_crop": 0.7}
    if family != "vae":
        config["loss"] = {"perturbation": {"neighbours": 3}}
    if family == "learned":
        config["model"]["bottleneck"]["codebook"] = "learned"
    run = start(config)
    uninterrupted = contents(run)
    for step in (4, 6):
        shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "split": "tr')  # the kill came in the middle of a line
    start(config)
    assert contents(run) == uninterrupted


def test_accumulation_does_not_change_the_loss(document, start, tmp_path):
    losses = []
    for parts in (1, 2, 4):
        config = document(gradient_accumulation_steps=parts)
        config["run"]["dir"] = str(tmp_path / f"run_{parts}")
        losses.append(torch.tensor([line["loss"] for line in read_metrics(start(config))]))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-4, atol=0)


def test_a_finished_run_has_nothing_left_to_do(document, start, capsys):
    run = start(document(max_steps=2))
    before, checkpoint = contents(run), (run / "checkpoints" / "step_00000002").stat().st_mtime_ns
    start(document(max_steps=2))
    assert_names(capsys.readouterr().out, "finished at step 2 (all steps done)", "nothing left to do")
    assert contents(run) == before
    assert (run / "checkpoints" / "step_00000002").stat().st_mtime_ns == checkpoint


def test_an_extended_run_equals_one_of_that_length(document, start, tmp_path):
    config = document(max_steps=4, checkpoint_every=4, ema_decay=0.8)
    start(config)
    config["train"] |= {"max_steps": 8, "keep_checkpoints": 3}
    extended = start(config)
    config["run"]["dir"] = str(tmp_path / "meant")
    meant = start(config)
    for folder in ("checkpoints/step_00000008", "model", "samples"):
        for path in [path for path in (meant / folder).iterdir() if path.suffix in (".safetensors", ".png")]:
            assert path.read_bytes() == (extended / folder / path.name).read_bytes(), path
    assert read_metrics(extended) == read_metrics(meant)


def test_an_extended_run_keeps_its_discriminator(document, start, capsys):
    config = document(max_steps=2, log_every=1)
    config["loss"] = {"adversarial": {"start": 0.5, "ramp": 0.0, "channels": 8, "num_layers": 1}}
    start(config)
    config["train"]["max_steps"] = 4
    lines = [line for line in read_metrics(start(config)) if line["split"] == "train"]
    assert ["adversarial" in line for line in lines] == [False, True, True, True]
    assert_names(capsys.readouterr().out, "4 steps instead of 2", "loss.adversarial.start and ramp", "the 2 steps")


def test_a_resumed_run_may_keep_decoded_images_in_another_folder(document, start, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decoded_cache, "MIN_IMAGES", 1)
    (tmp_path / "images").mkdir()
    for i in range(20):
        Image.new("RGB", (12, 12), (12 * i, 40, 80)).save(tmp_path / "images" / f"{i:02}.png")
    config = document(max_steps=2, batch_size=4, checkpoint_every=2)
    config["data"] = {"source": str(tmp_path / "images"), "image_size": 8, "cache": str(tmp_path / "first")}
    config["data"]["random_crop"] = 0.8
    start(config)
    config["train"]["max_steps"] = 4
    config["data"] |= {"cache": str(tmp_path / "second"), "cache_gb": 5e-6}  # has room for the plain images alone
    resumed = start(config)
    assert len(list((tmp_path / "first" / "decoded").iterdir())) == 3
    assert len(list((tmp_path / "second" / "decoded").iterdir())) == 2
    assert_names(capsys.readouterr().out, "19 decoded images (5.7e-06 GB) are not kept", "data.cache_gb")
    config["run"]["dir"] = str(tmp_path / "whole")
    whole = start(config)
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (resumed, whole)]
    assert weights[0] == weights[1]
    assert read_metrics(whole) == read_metrics(resumed)


def test_a_different_config_is_refused_and_changes_nothing(document, start):
    run = start(document(max_steps=2))
    before = contents(run)
    with refuses("run.dir", "train.lr", "0.001", "0.01", "run.dir="):
        start(document(max_steps=2, lr=1e-2))
    assert contents(run) == before


def test_the_codebook_starts_on_the_data(document, start):
    config = document(lr=1e-9, max_steps=1)
    config["model"]["bottleneck"] |= {"codebook_size": 4, "revive_below": 0.0, "ema_decay": 1.0}
    line = read_metrics(start(config))[-1]
    assert line["codebook_usage"] == 1.0
    assert line["perplexity"] > 2


@pytest.mark.parametrize(
    ("group", "setting"),
    [
        ("data", {"horizontal_flip": True}),
        ("data", {"random_crop": 0.5}),
        ("loss", {"perturbation": {"image_share": 1.0, "neighbours": 7}}),
    ],
)
def test_only_training_images_are_changed(group, setting, document, start, tmp_path):
    losses = []
    for changed in (True, False):
        config = document(lr=1e-9, max_steps=1, ema_decay=0.9)
        config["run"]["dir"] = str(tmp_path / f"run_{changed}")
        config[group] = config.get(group, {}) | (setting if changed else {})
        losses.append({line["split"]: line["loss"] for line in read_metrics(start(config))})
    assert losses[0]["train"] != losses[1]["train"]
    assert losses[0]["val"] == pytest.approx(losses[1]["val"], rel=1e-3)


def test_windows_are_cut_out_of_larger_images(document, start, monkeypatch):
    seen = []
    monkeypatch.setattr(
        tokenizer_training, "crop", lambda images, *rest: seen.append(images.shape) or crop(images, *rest)
    )
    config = document(max_steps=1)
    config["data"] |= {"image_size": [8, 12], "random_crop": 0.8}
    run = start(config)
    assert seen == [(16, 3, 10, 15)]
    assert Autoencoder.from_pretrained(run).config.image_size == (8, 12)


def test_a_robust_decoder_keeps_the_codes_valid(document, start, tmp_path):
    source = start(document())
    config = document(parts="decoder") | {"init_from": str(source), "loss": {"perturbation": {"neighbours": 3}}}
    config["run"]["dir"] = str(tmp_path / "robust")
    before, after = Autoencoder.from_pretrained(source), Autoencoder.from_pretrained(start(config))
    assert after.content_hash() == before.content_hash()
    assert not torch.equal(after.last_layer, before.last_layer)


def test_perturbed_codes_need_a_codebook(document, start):
    with refuses("loss.perturbation", "gaussian", "Remove"):
        start(document(VAE) | {"loss": {"perturbation": {}}})
