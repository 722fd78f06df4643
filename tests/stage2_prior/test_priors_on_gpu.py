"""Every prior config and every kind of condition trains and samples on a GPU without a mixture of devices, and no
training step makes the host wait. The GPU has no data."""

import copy
from pathlib import Path

import numpy as np
import pytest
from fake_gpu import different_configs, fake_gpu, take_one_step

from stage2_prior import masked_transformer, train_prior
from stage2_prior.codes import CodeCache
from stage2_prior.conditions.conditions import Conditions
from stage2_prior.conditions.text_condition import TextConditionConfig
from stage2_prior.stored_captions import StoredCaptions
from stage2_prior.train_prior import PriorTrainingConfig
from twostage.core.config.sections import parse_config

CONFIGS = different_configs(Path(__file__).parents[2] / "configs" / "prior")
OUTSIDE = {
    train_prior: ["CodeCache", "check_entropy", "describe_codes", "prior_config"],
    CodeCache: ["check_codes", "contents"],
    TextConditionConfig: ["notices"],
    Conditions: ["complete"],
    masked_transformer: ["_num_masked"],
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
    manifest = write_codes(folder, grids, 16, ["cat", "dog"], labels, vector_length=3, image_size=(16, 16),
                           maps={"kind": "labels", "channels": None, "classes": [0, 1, 2]})  # fmt: skip
    for name, files in manifest.splits.items():
        manifest.splits[name] = files.model_copy(update={kind: f"{name}.{kind}.npy" for kind in arrays})
    (folder / "manifest.json").write_text(manifest.model_dump_json(), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", [*CONFIGS, *MORE])
def test_a_prior_trains(name, codes, new_process, monkeypatch):
    if name in MORE:
        document = {"run": {"dir": "runs/none"}, **MORE[name]}
        document["train"] = {"max_steps": 2, "lr": 1e-3} | document.get("train", {})
    else:
        document = copy.deepcopy(CONFIGS[name])
    document["codes"] = str(codes)
    document["train"] |= {"batch_size": 4, "mixed_precision": "bf16"}
    document["model"]["depth"] = 2
    take_one_step(monkeypatch, OUTSIDE)
    new_process()
    config = parse_config(PriorTrainingConfig, document, name)
    with fake_gpu():
        run = train_prior.train(config, dry_run=True)
    assert run.step == 1
    assert {weight.device.type for weight in run._networks[0].module.parameters()} == {"cuda"}
