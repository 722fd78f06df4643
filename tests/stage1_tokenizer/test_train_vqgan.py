"""Trainings with two networks, trainings that start from others, and what they draw and report."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from messages import assert_names, refuses
from PIL import Image
from safetensors.torch import load_file

from stage1_tokenizer import tokenizer_training
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.features.feature_network import FeatureNetwork, FeatureNetworkConfig
from stage1_tokenizer.tokenizer_training import TokenizerConfig, train
from twostage.core.config.sections import parse_config

TRAINING = (train, TokenizerConfig)  # what `start` starts


@pytest.fixture
def document(tmp_path) -> Callable[..., dict]:
    """``document(loss, bottleneck, **train)``: a config of six small steps on drawn shapes of 16 x 16."""

    def document(loss: dict | None = None, bottleneck: dict | None = None, **train: object) -> dict:
        return {
            "run": {"dir": str(tmp_path / "run"), "seed": 3, "trackers": []},
            "data": {"source": "shapes", "image_size": 16, "num_images": 64},
            "model": {
                "latent_channels": 4,
                "backbone": {"type": "conv", "channels": 8, "channel_mult": [1, 1], "num_res_blocks": [0, 1]},
                "bottleneck": bottleneck or {"type": "vector", "codebook_size": 8},
            },
            "loss": loss or {},
            "train": {"batch_size": 12, "max_steps": 6, "lr": 1e-3, "validate_every": 6, "checkpoint_every": 2,
                      "log_every": 2, "keep_checkpoints": 9} | train,
        }  # fmt: skip

    return document


@pytest.fixture
def vqgan(tmp_path) -> Callable[..., dict]:
    """``vqgan(**adversarial)``: L1, a perceptual term, and a discriminator from the third step on."""
    torch.manual_seed(0)
    network = FeatureNetwork(
        FeatureNetworkConfig(image_size=(16, 16), channels=3, class_names=["a", "b"], widths=[4, 8])
    )
    network.save_pretrained(tmp_path / "features")

    def vqgan(**adversarial: object) -> dict:
        return {
            "reconstruction": "l1",
            "perceptual": {"type": "features", "path": str(tmp_path / "features"), "weight": 0.1},
            "adversarial": {"channels": 8, "num_layers": 2, "start": 0.34, "ramp": 0.3} | adversarial,
        }

    return vqgan


def metrics(run: Path, split: str = "train") -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tensors(run: Path, step: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step_{step:08d}" / f"{name}.safetensors")


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_both_networks_change_with_any_accumulation(parts, document, vqgan, start):
    run = start(document(vqgan(), gradient_accumulation_steps=parts))
    for name in ("model", "discriminator"):
        before, after = (tensors(run, step, name) for step in (4, 6))
        moved = [key for key in before if "weight" in key and not torch.equal(before[key], after[key])]
        assert len(moved) == len([key for key in before if "weight" in key]), name
    first, second = tensors(run, 2, "discriminator"), tensors(run, 4, "discriminator")
    assert not torch.equal(first["layers.0.weight"], second["layers.0.weight"])  # it starts after step 2


def test_accumulation_trains_the_same_networks(document, vqgan, start, tmp_path):
    nets = []
    for parts in (1, 2, 3, 4):
        config = document(vqgan(lecam_weight=0.1, r1_weight=0.5), gradient_accumulation_steps=parts)
        config["run"]["dir"] = str(tmp_path / f"run_{parts}")
        nets.append(start(config))
    for run in nets[1:]:
        for step in (4, 6):
            for name in ("model", "discriminator"):
                expected = tensors(nets[0], step, name)
                torch.testing.assert_close(tensors(run, step, name), expected, rtol=1e-2, atol=2e-4)


@pytest.mark.parametrize("adversarial", [
    {"loss": "hinge", "adaptive": True},
    {"loss": "non_saturating", "lecam_weight": 0.01, "r1_weight": 1.0},
    {"loss": "vanilla", "norm": "sync_batch", "lr": 1e-4},
], ids=lambda a: a["loss"])  # fmt: skip
def test_a_killed_vqgan_ends_as_if_uninterrupted(adversarial, document, vqgan, start):
    config = document(vqgan(**adversarial), ema_decay=0.9, max_grad_norm=1.0, lr_schedule="cosine")
    run = start(config)
    uninterrupted = contents(run)
    for step in (4, 6):
        shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")
    start(config)
    assert contents(run) == uninterrupted


def test_metrics_before_and_after_the_discriminator_starts(document, vqgan, start):
    run = start(document(vqgan(adaptive=True), max_steps=9, log_every=2, checkpoint_every=9, validate_every=9))
    before, after = metrics(run)[0], metrics(run)[-1]
    names = {
        "adversarial",
        "adversarial_weight",
        "discriminator",
        "logits_real",
        "logits_fake",
        "discriminator_accuracy",
    }
    assert not names & before.keys()
    assert names <= after.keys()
    assert {"perceptual", "reconstruction", "codebook_usage", "perplexity"} <= before.keys() & after.keys()
    steps = [line["step"] for line in metrics(run)]
    assert len(set(steps)) == len(steps)
    assert {3, 4} & set(steps)  # it starts between two lines, at a third of nine steps
    for line in metrics(run):
        terms = line["reconstruction"] + line["commitment"] + line["perceptual"]
        if line["step"] <= 3:
            assert line["loss"] == pytest.approx(terms, rel=1e-4)


def test_frozen_networks_are_in_no_checkpoint(document, vqgan, start):
    run = start(document(vqgan(), ema_decay=0.9))
    files = {path.name: load_file(path) for path in run.rglob("*.safetensors")}
    assert {"model.safetensors", "ema.safetensors", "discriminator.safetensors"} <= files.keys()
    plain = set(Autoencoder.from_pretrained(run).state_dict())
    assert set(files["model.safetensors"]) == plain
    assert not any("perceptual" in name or "trunk" in name for file in files.values() for name in file)
    assert not any("discriminator" in name for name in load_file(run / "model" / "model.safetensors"))


def test_sync_batch_norm_on_several_cpu_processes_is_refused(document, vqgan):
    class TwoProcesses:
        num_processes, device = 2, torch.device("cpu")

    config = parse_config(TokenizerConfig, document(vqgan(norm="sync_batch")), "config")
    with refuses("loss.adversarial.norm", "'sync_batch'", "2 processes", "loss.adversarial.norm=group"):
        tokenizer_training.make_discriminator(config, TwoProcesses())


# --- starting from others -------------------------------------------------------------------------------------------


@pytest.fixture
def source(document, start, tmp_path) -> str:
    """A trained run to start from."""
    start(document())
    (tmp_path / "run").rename(tmp_path / "source")
    return str(tmp_path / "source")


def test_training_only_the_decoder_keeps_the_codes(source, document, vqgan, start, random_images):
    config = document(vqgan(start=0.0), parts="decoder", lr=1e-2, ema_decay=0.9) | {"init_from": source}
    run = start(config)
    before, after, images = (*map(Autoencoder.from_pretrained, (source, run)), random_images(4, size=(16, 16)))
    assert after.content_hash() == before.content_hash()
    assert torch.equal(after.encode(images).indices, before.encode(images).indices)
    assert (after.reconstruct(images) - before.reconstruct(images)).abs().max() > 1e-3
    one, other = before.state_dict(), after.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one if not name.startswith("decoder"))


def test_the_model_comes_from_init_from_if_none_is_given(source, document, start):
    config = document(max_steps=1, lr=1e-9) | {"init_from": source}
    del config["model"]
    run = start(config)
    one, other = (Autoencoder.from_pretrained(path).decoder.state_dict() for path in (source, run))
    torch.testing.assert_close(one, other)


def test_init_from_another_architecture_is_refused(source, document, start):
    config = document() | {"init_from": source}
    config["model"] = config["model"] | {"latent_channels": 5}
    with refuses("init_from", source, "model.latent_channels", "4", "5"):
        start(config)
    assert not Path(config["run"]["dir"]).exists()


# --- drawings and reports ------------------------------------------------------------------------------------------


def test_a_class_vae_learns_means_and_draws_one_column_per_class(document, start):
    run = start(document(bottleneck={"type": "class_gaussian"}, lr=1e-2))
    model = Autoencoder.from_pretrained(run)
    assert len(model.config.class_names) == 8
    assert model.bottleneck.class_means.abs().max() > 1e-3
    with Image.open(run / "samples" / "step_00000006_classes.png") as image:
        assert image.width > 8 * 80
    assert metrics(run, "val")[-1].keys() >= {"nats_per_image", "kl", "active_share"}
    labels = torch.tensor([3, 3, 5])
    one, other = (model.sample(3, labels, torch.Generator().manual_seed(s)) for s in (0, 0))
    assert torch.equal(one, other)


def test_a_conditional_vae_learns_its_classes_and_resumes_exactly(document, start):
    config = document(bottleneck={"type": "gaussian"}, ema_decay=0.9)
    config["model"] |= {"latent_channels": 2, "backbone": {"type": "mlp", "hidden_sizes": [16]}, "condition": "class"}
    run = start(config)
    uninterrupted = contents(run)
    for name in ("encoder.shifts.weight", "decoder.shifts.weight"):
        before, after = (tensors(run, step, "model")[name] for step in (2, 6))
        assert (before != after).any(1).all(), name
    drawn = {path.name.removeprefix("step_00000006") for path in (run / "samples").iterdir()}
    assert drawn == {".png", "_classes.png", "_scatter.png"}
    for step in (4, 6):
        shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")
    again = contents(start(config))
    assert {name: again[name] for name in uninterrupted if name.startswith("model/")} == {
        name: content for name, content in uninterrupted.items() if name.startswith("model/")
    }
    plain = document(bottleneck={"type": "gaussian"}) | {"init_from": str(run)}
    plain["run"] = {"dir": f"{run}_plain", "trackers": []}
    plain["model"] |= {key: value for key, value in config["model"].items() if key != "condition"}
    with refuses("init_from", run, "model.condition: was 'class', now '(absent)'"):
        start(plain)


def test_the_drawings_of_a_two_dimensional_latent(document, start):
    config = document(bottleneck={"type": "gaussian"})
    config["model"] = {
        "latent_channels": 2,
        "backbone": {"type": "mlp", "hidden_sizes": [16]},
        "bottleneck": {"type": "gaussian"},
    }
    run = start(config)
    names = {path.name for path in (run / "samples").iterdir()}
    assert {"step_00000006.png", "step_00000006_manifold.png", "step_00000006_scatter.png"} <= names
    with Image.open(run / "samples" / "step_00000006_manifold.png") as image:
        assert image.width == image.height


@pytest.mark.parametrize(("loss", "bottleneck", "rows"), [
    ({}, {"type": "identity"}, 4),  # original, reconstruction, two interpolations
    ({"corruption": {"masked_share": 0.5}}, {"type": "identity"}, 5),
    ({}, {"type": "gaussian"}, 5),
    ({}, {"type": "vector", "codebook_size": 8}, 2),
])  # fmt: skip
def test_the_rows_of_a_sheet(loss, bottleneck, rows, document, start):
    run = start(document(loss, bottleneck, max_steps=1))
    with Image.open(run / "samples" / "step_00000001.png") as image:
        cell = 16 * round(88 / 16) + 4
        assert image.height == rows * cell + 4


def test_posterior_collapse_is_reported(document, start, capsys):
    start(document({"kl_weight": 1e4}, {"type": "gaussian"}, max_steps=40, log_every=2, lr=1e-2, checkpoint_every=40))
    assert_names(capsys.readouterr().out, "posterior collapse", "0.0", "loss.kl_weight")


def test_a_loss_that_is_not_finite_names_the_term_step_and_images(document, vqgan, start, monkeypatch, tmp_path):
    def broken(logits_fake, kind):
        return logits_fake.mean() * (float("nan") if train_run.step == 4 else 1.0)

    train_run = None
    original = tokenizer_training.TrainingRun.__init__

    def remember(run, config, **options):
        nonlocal train_run
        train_run = run
        original(run, config, **options)

    monkeypatch.setattr(tokenizer_training.TrainingRun, "__init__", remember)
    monkeypatch.setattr("stage1_tokenizer.training_losses.generator_loss", broken)
    with refuses("step 5: adversarial", "not finite", f"last good checkpoint in {tmp_path / 'run' / 'checkpoints'}"):
        start(document(vqgan(start=0.2), log_every=6, max_steps=12, checkpoint_every=4, validate_every=12))
    note = (tmp_path / "run" / "not_finite.txt").read_text().splitlines()
    assert note[0].startswith("step 5: ")
    rows = [int(line.split()[-1]) for line in note[1:]]
    assert len(set(rows)) == 12
    assert train_run.batches.rows(4).tolist() == rows
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000004"]
