"""Every prior config and every kind of condition trains and samples on a GPU without a mixture of devices, and no
training step makes the host wait. The GPU has no data."""

import copy
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_gpu import GPU, different_configs, fake_gpu, outside, take_one_step, without_waiting

from stage2_prior import prior_training
from stage2_prior.codes import CodeCache, Manifest
from stage2_prior.networks import masked_transformer
from stage2_prior.networks.autoregressive import sample_in_order
from stage2_prior.networks.captured_step import sample_with_fixed_shapes
from stage2_prior.prior import Prior, prior_config
from stage2_prior.prior_training import PriorTrainingConfig
from stage2_prior.sampling import Branches, CodeNoise
from stage2_prior.sampling_config import SamplingConfig
from stage2_prior.stored_captions import StoredCaptions
from twostage.core.conditions.conditions import Conditions
from twostage.core.conditions.context import join_contexts
from twostage.core.conditions.text_condition import TextConditionConfig
from twostage.core.config.sections import parse_config

CONFIGS = different_configs(Path(__file__).parents[2] / "configs" / "prior")
OUTSIDE = {
    prior_training: ["CodeCache", "check_entropy", "describe_codes", "prior_config"],
    CodeCache: ["check_codes", "contents"],
    TextConditionConfig: ["notices"],
    Conditions: ["complete"],
    masked_transformer: ["_num_masked", "_plan"],
}
"""What reads data, on the CPU."""
EVERY_CONDITION = ["class", "text", "map", "vector"]
SMALL = {"hidden_size": 32, "depth": 2, "num_heads": 2}
MORE = {
    "masked, replaced codes": {
        "model": {"type": "masked_transformer", **SMALL, "predict_replaced": True, "code_dropout": 0.1},
        "loss": {"replace_prob": {"start": 0.5, "end": 0.1}},
    },
    "GPT of every condition": {
        "model": {"type": "causal_transformer", **SMALL, "order": "spiral", "code_dropout": 0.1},
        "condition": EVERY_CONDITION,
        "train": {"on_not_finite": "skip"},
    },
    "masked of every condition": {
        "model": {"type": "masked_transformer", **SMALL, "positions": "relative"},
        "condition": EVERY_CONDITION,
        "train": {"on_not_finite": "skip", "optimizer": "muon"},
    },
    "parallel of every condition": {
        "model": {"type": "parallel_transformer", **SMALL, "order": "spiral", "code_dropout": 0.1},
        "condition": EVERY_CONDITION,
        "train": {"on_not_finite": "skip", "optimizer": "muon"},
    },
    "GPT of digits": {
        "model": {"type": "causal_transformer", **SMALL, "codes": [2, 2, 4]},
        "condition": EVERY_CONDITION,
        "train": {"on_not_finite": "skip", "optimizer": "muon"},
    },
    "masked of digits": {"model": {"type": "masked_transformer", **SMALL, "codes": [4, 4], "predict_replaced": True}},
    "parallel of digits": {"model": {"type": "parallel_transformer", **SMALL, "codes": [4, 4]}},
    "PixelCNN of digits": {"model": {"type": "pixelcnn", "depth": 2, "codes": [2, 8]}},
    "scale transformer of every condition": {
        "model": {"type": "scale_transformer", **SMALL, "code_dropout": 0.1}, "condition": EVERY_CONDITION,
    },
    "scale by scale of every condition": {
        "model": {"type": "scale_by_scale", "networks": [
            {"type": "causal_transformer", **SMALL}, {"type": "pixelcnn", "channels": 8, "depth": 2,
                                                      "context_channels": 32}]},
        "condition": EVERY_CONDITION,
    },
    "PixelCNN of every condition": {"model": {"type": "pixelcnn", "depth": 2}, "condition": EVERY_CONDITION},
}  # fmt: skip


@pytest.fixture(scope="module")
def codes(tmp_path_factory, write_codes) -> Path:
    """Codes with every kind of condition."""
    folder, random = tmp_path_factory.mktemp("codes"), np.random.default_rng(0)
    grids = {name: random.integers(16, size=(8, 4, 4)) for name in ("train", "val")}
    labels = {name: np.arange(8) % 2 for name in grids}
    captions = StoredCaptions.pack([("a red star", "a star")] * 8)
    arrays = {"captions": captions.text, "caption_starts": captions.starts}
    arrays["maps"] = random.integers(3, size=(8, 16, 16)).astype(np.uint8)
    arrays["vectors"] = random.normal(size=(8, 3)).astype(np.float32)
    for name in grids:
        for kind, array in arrays.items():
            np.save(folder / f"{name}.{kind}.npy", array)
    maps = {"kind": "labels", "channels": None, "classes": [0, 1, 2]}
    manifest = write_codes(folder, grids, 16, ["cat", "dog"], labels, vector_length=3, image_size=(16, 16), maps=maps,
                           digits=[2] * 4)  # fmt: skip
    for name, files in manifest.splits.items():
        manifest.splits[name] = files.model_copy(update={kind: f"{name}.{kind}.npy" for kind in arrays})
    (folder / "manifest.json").write_text(manifest.model_dump_json(), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def scaled_codes(codes, tmp_path_factory) -> Path:
    """The same images as codes of two scales."""
    folder, random = tmp_path_factory.mktemp("scaled") / "codes", np.random.default_rng(0)
    shutil.copytree(codes, folder)
    for name in ("train", "val"):
        np.save(folder / f"{name}.codes.npy", random.integers(16, size=(8, 1, 20)).astype(np.uint16))
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest = manifest.model_copy(update={"grid": (1, 20), "scales": ((2, 2), (4, 4))})
    (folder / "manifest.json").write_text(manifest.model_dump_json(), encoding="utf-8")
    return folder


def more(name: str, codes: Path) -> dict[str, Any]:
    document = {"run": {"dir": "runs/none"}, **copy.deepcopy(MORE[name]), "codes": str(codes)}
    return document | {"train": {"max_steps": 2, "lr": 1e-3} | document.get("train", {})}


@pytest.mark.parametrize("name", [*CONFIGS, *MORE])
def test_a_prior_trains(name, codes, scaled_codes, new_process, monkeypatch):
    document = MORE.get(name) or CONFIGS[name]
    codes = scaled_codes if document["model"]["type"].startswith("scale_") else codes
    document = more(name, codes) if name in MORE else {**copy.deepcopy(CONFIGS[name]), "codes": str(codes)}
    document["train"] |= {"batch_size": 4, "mixed_precision": "bf16"}
    for network in document["model"].get("networks", [document["model"]]):
        network["depth"] = 2
    take_one_step(monkeypatch, OUTSIDE)
    new_process()
    config = parse_config(PriorTrainingConfig, document, name)
    with fake_gpu():
        run = prior_training.train(config, dry_run=True)
    assert run.step == 1
    assert {weight.device.type for weight in run._networks[0].module.parameters()} == {"cuda"}


@pytest.mark.parametrize("known", [0, 5])
@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("GPT of every condition", "float32"),
        ("GPT of every condition", "bfloat16"),
        ("PixelCNN of every condition", "float32"),
        ("GPT of digits", "bfloat16"),
        ("PixelCNN of digits", "float32"),
    ],
)
def test_an_autoregressive_prior_samples_without_waiting(name, weights, known, codes):
    settings = parse_config(PriorTrainingConfig, more(name, codes), name)
    form = prior_config(settings.model, settings.condition, settings.loss, CodeCache(codes))
    top_k = 5 if form.model.ranks_codes else None
    sampling = SamplingConfig(guidance_scale=2.0, guidance_schedule="cosine", top_k=top_k, top_p=0.9, weights=weights)
    with fake_gpu():
        prior = Prior(form).to(GPU).eval()
        values = {key: value.to(GPU) for key, value in outside(prior.conditions.nothing)(2).items()}
        contexts = [prior.conditions(values, 2).in_order(prior.network.order)] * 2
        branches = Branches(join_contexts(contexts), (2.0,))
        prior.check_sampling(sampling)
        head = prior.network.code_head
        grids = torch.zeros(2, 16, dtype=torch.long, device=GPU)
        start = branches.context, weights, branches.repeat(grids[:, :known])
        with torch.no_grad():
            rest = head, branches, CodeNoise([0, 1], sum(head.choices), GPU), sampling, grids, None
            drawn = sample_in_order(prior.network.continued(*start), *rest, known)
            fixed = sample_with_fixed_shapes(prior.network.fixed_decoder(*start), *rest)
        assert (fixed.device, fixed.shape) == (drawn.device, drawn.shape)
        assert (drawn.device.type, drawn.dtype, drawn.shape) == ("cuda", torch.long, (2, 16))


@pytest.mark.parametrize("settings", [{"weights": "bfloat16", "top_k": 5}, {"num_steps": 3, "cell_choice": "halton"}])
@pytest.mark.parametrize("name", [name for name in MORE if name != "masked, replaced codes"])
def test_the_sampler_of_a_prior_never_waits(name, settings, codes, scaled_codes, monkeypatch):
    monkeypatch.setattr(masked_transformer, "_plan", outside(masked_transformer._plan))
    codes = scaled_codes if MORE[name]["model"]["type"].startswith("scale_") else codes
    training = parse_config(PriorTrainingConfig, more(name, codes), name)
    form = prior_config(training.model, training.condition, training.loss, CodeCache(codes))
    known = form.model.sampling_settings - (set() if form.model.ranks_codes else {"top_k"})
    settings = {"guidance_scale": 2.0, "guidance_schedule": "cosine", "top_p": 0.9} | settings
    sampling = SamplingConfig(**{key: value for key, value in settings.items() if key in known})
    with fake_gpu():
        prior = Prior(form).to(GPU).eval()
        values = {key: value.to(GPU) for key, value in outside(prior.conditions.nothing)(2).items()}
        branches = Branches(join_contexts([prior.conditions(values, 2)] * 2), (2.0,))
        with without_waiting():
            drawn = prior.network.sample(branches, sampling, [0, 1], None, None)
        assert (drawn.device.type, drawn.dtype, drawn.shape) == ("cuda", torch.long, (2, math.prod(form.grid)))
