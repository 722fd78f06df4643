"""Two processes do what one does: the same losses, codebook, codes and images."""

import gc
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stage1_tokenizer.features.feature_network import FeatureNetwork, FeatureNetworkConfig
from twostage.core.data.shapes import CLASS_NAMES

ROOT = Path(__file__).parents[1]
# `--cpu` always starts one process; `--multi_gpu` starts several, and ACCELERATE_USE_CPU keeps them on the CPU.
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
          "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
STEPS = ["train.max_steps=20", "train.log_every=1", "train.validate_every=10", "train.checkpoint_every=20"]

EMA = ["data.horizontal_flip=true", "data.random_crop=0.8", "train.ema_decay=0.9", "loss.perturbation={neighbours: 3}"]
LEARNED = ["model.bottleneck={type: vector, codebook_size: 16, codebook: learned}", "train.max_grad_norm=0.1"]
ACCUMULATED = ["train.gradient_accumulation_steps=2"]
SIMVQ = ["model.bottleneck={type: vector, codebook_size: 16, codebook: simvq, gradient: rotation}"]
L2 = ["model.bottleneck={type: vector, codebook_size: 16, l2_normalize: true}"]
RESIDUAL = ["model.bottleneck={type: residual, codebook_size: 16, depth: 2}"]
MULTI_SCALE = ["model.bottleneck={type: multi_scale, scales: [1, 2, 4], codes: {type: vector, codebook_size: 16}}"]
FINITE_SCALAR = ["model.bottleneck={type: finite_scalar, levels: [4, 3, 3, 3]}"]
LOOKUP_FREE = ["model.bottleneck={type: lookup_free}"]
LATER = {
    "gumbel_softmax": ["model.bottleneck={type: gumbel_softmax, codebook_size: 16}"],
    "binary_spherical": ["model.bottleneck={type: binary_spherical, group_bits: 2}"],
    "index_backpropagation": ["model.bottleneck={type: index_backpropagation, codebook_size: 16}", "train.lr=1e-4"],
    "diveq": ["model.bottleneck={type: diveq, codebook_size: 16}"],
    "projected": ["model.bottleneck={type: projected, codebook_size: 16, width: 8, heads: 2}"],
    "latent terms": ["loss={equivariance: {}, latents: [{type: causal, width: 8, heads: 2}]}", "train.lr=1e-3"],
    "product": ["model.bottleneck={type: product, groups: 2, each: {type: vector, codebook_size: 16}}"],
}
ADVERSARIAL = "{channels: 8, num_layers: 2, start: 0.5, adaptive: true, lecam_weight: 0.01, r1_weight: 0.1}"
VQGAN = [f"loss={{reconstruction: l1, adversarial: {ADVERSARIAL}}}"]
CLASS_GAUSSIAN = ["model.bottleneck={type: class_gaussian}", "train.lr=1e-4", "loss.corruption={masked_share: 0.2}"]
GAUSSIAN = ["model.bottleneck={type: gaussian}", "train.lr=1e-4"]
CAPTIONED = [*GAUSSIAN, "data.source=captioned_shapes", "model.condition={type: text, units: words, depth: 1}"]
PRIOR = ["loss={replace_prob: {start: 0.4, end: 0.2}, class_dropout_prob: 0.1}", "train.ema_decay=0.9"]
PRIORS = {
    "causal": ["train.optimizer=muon"],
    "masked": ["model={type: masked_transformer, hidden_size: 16, num_heads: 2, dropout: 0, predict_replaced: true}"],
    "parallel": ["model={type: parallel_transformer, hidden_size: 16, num_heads: 2, dropout: 0}"],
    "pixelcnn": ["model={type: pixelcnn, channels: 8, depth: 3}"],
    "captioned": ["condition={type: text, units: words, max_length: 20}"],
}

# Train once for each list of overrides; each process writes the hash of its final codebook.
WATCH = """
import hashlib, json, os, sys
from pathlib import Path
from accelerate import PartialState
from twostage.core.config.sections import load_config
from stage1_tokenizer import tokenizer_training
from stage1_tokenizer.autoencoder import Autoencoder

def watched(*args):
    trained.append(Autoencoder(*args))
    return trained[-1]

tokenizer_training.Autoencoder = watched
PartialState.destroy_process_group = lambda *_: None  # the next training needs it
config, out, runs = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
hashes = {}
for name, overrides in runs.items():
    trained = []
    tokenizer_training.train(load_config(tokenizer_training.TokenizerConfig, config, overrides))
    assert PartialState().num_processes == 2
    digest = hashlib.sha256()
    # The last model: an earlier one only counts the weights. Codebooks and their statistics:
    for key, tensor in trained[-1].bottleneck.state_dict().items():
        digest.update(tensor.numpy().tobytes())
    hashes[name] = digest.hexdigest()
(out / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(hashes))
"""

# Runs one module after another, as `-m` does.
EACH = """
import json, runpy, sys
from accelerate import PartialState
PartialState.destroy_process_group = lambda *_: None  # the next command needs it
for sys.argv in json.loads(sys.argv[1]):
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if ended.code:
            raise
    assert PartialState().num_processes == 2
"""


def launch(*words: object) -> None:
    """Start ``words`` (a script or -m MODULE, and its arguments) as two processes, and wait."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*LAUNCH, "--main_process_port", str(port), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr


def losses(run: Path, split: str = "train") -> torch.Tensor:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line["loss"] for line in lines if line["split"] == split], dtype=torch.float64)


def codebook(run: Path) -> torch.Tensor:
    return load_file(run / "checkpoints" / "step_00000020" / "model.safetensors")["bottleneck.codebook"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_losses(two: Path, one: Path) -> None:
    assert len(losses(one)) == 20
    assert not torch.equal(losses(two), losses(one)), "bit for bit: both came from one process"
    torch.testing.assert_close(losses(two), losses(one), rtol=1e-4, atol=0)
    torch.testing.assert_close(losses(two, "val"), losses(one, "val"), rtol=1e-4, atol=0)


@pytest.fixture
def alone(twostage) -> Callable[..., None]:
    """``alone("train-tokenizer", config, *overrides)``: the same command on one process."""

    def alone(*words: object) -> None:
        ended = twostage(*words)
        assert ended.code == 0, ended.err

    return alone


def test_the_tokenizer_command(configs, alone, tmp_path):
    config, one, two = configs / "tokenizer.yaml", tmp_path / "one", tmp_path / "two"
    launch("-m", "stage1_tokenizer.train_tokenizer", config, f"run.dir={two}", *STEPS, *EMA)
    alone("train-tokenizer", config, f"run.dir={one}", *STEPS, *EMA)
    assert_same_losses(two, one)
    torch.testing.assert_close(codebook(two), codebook(one), rtol=1e-3, atol=1e-5)


def test_both_processes_have_one_codebook(configs, alone, tmp_path):
    (tmp_path / "watch.py").write_text(WATCH, encoding="utf-8")
    families = {
        **{"ema": EMA, "learned": LEARNED, "accumulated": ACCUMULATED, "gaussian": GAUSSIAN, "simvq": SIMVQ, "l2": L2},
        **{"residual": RESIDUAL, "finite_scalar": FINITE_SCALAR, "lookup_free": LOOKUP_FREE, "vqgan": VQGAN},
        "multi_scale": MULTI_SCALE,
        "two_level": ["model.bottleneck={type: two_level, codebook_size: 16}"],
        **{"class_gaussian": CLASS_GAUSSIAN, "captioned": CAPTIONED},
        **LATER,
    }
    overrides = {name: [f"run.dir={tmp_path / name}", *STEPS, *words] for name, words in families.items()}
    launch(tmp_path / "watch.py", configs / "tokenizer.yaml", tmp_path, json.dumps(overrides))
    first, second = (json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in (0, 1))
    assert first.keys() == families.keys()
    assert first == second
    for name, words in families.items():
        one = tmp_path / f"{name}_alone"
        alone("train-tokenizer", configs / "tokenizer.yaml", f"run.dir={one}", *STEPS, *words)
        assert_same_losses(tmp_path / name, one)


def test_the_prior_command(runs, configs, alone, twostage, tmp_path):
    (tmp_path / "each.py").write_text(EACH, encoding="utf-8")
    captioned = ["data.source=captioned_shapes", f"run.dir={tmp_path / 'tokenizer'}", "train.max_steps=20"]
    alone("train-tokenizer", configs / "tokenizer.yaml", *captioned)
    alone("encode", tmp_path / "tokenizer", "--out", tmp_path / "captioned_codes")
    codes = dict.fromkeys(PRIORS, runs.codes) | {"captioned": tmp_path / "captioned_codes"}
    words = {name: [configs / "prior.yaml", f"codes={codes[name]}", *STEPS, *PRIOR, *model]
             for name, model in PRIORS.items()}  # fmt: skip
    commands = [["pipelines.train_prior", *each, f"run.dir={tmp_path / name}"] for name, each in words.items()]
    launch(tmp_path / "each.py", json.dumps(commands, default=str))
    for name, each in words.items():
        one = tmp_path / f"{name}_alone"
        alone("train-prior", *each, f"run.dir={one}")
        assert_same_losses(tmp_path / name, one)
        sheets = contents(one / "samples").keys()
        assert sheets == contents(tmp_path / name / "samples").keys() == {"step_00000010.png", "step_00000020.png"}
    stopped = [*words["captioned"], f"run.dir={tmp_path / 'stopped'}"]
    assert twostage("train-prior", *stopped, "--time-limit", "0").code == 75
    gc.collect()  # what stopped it still refers to the run, which locks its folder until it is collected
    alone("train-prior", *stopped)
    for file in ("metrics.jsonl", "model/model.safetensors", "checkpoints/step_00000020/optimizer.safetensors"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "captioned_alone" / file).read_bytes()


def test_codes_images_and_figures(runs, alone, tmp_path):
    options = ["--num-images", "20", "--seed", "5", "--temperature", "0.9", "--guidance-scale", "1.5"]
    encode = ["pipelines.encode_dataset", runs.tokenizer, "--out", tmp_path / "codes"]
    generate = ["pipelines.generate", runs.prior, "--batch-size", "3", "--out", tmp_path / "two", *options]
    config = FeatureNetworkConfig(image_size=(16, 16), channels=3, class_names=list(CLASS_NAMES), widths=[8])
    FeatureNetwork(config).save_pretrained(tmp_path / "features")
    judge = ["--features", tmp_path / "features", "--num-samples", "20", "--batch-size", "3", "--json"]
    prior = shutil.copytree(runs.prior, tmp_path / "prior")
    evaluate = ["pipelines.evaluate", prior, *judge, tmp_path / "two.json"]
    (tmp_path / "each.py").write_text(EACH, encoding="utf-8")
    launch(tmp_path / "each.py", json.dumps([encode, generate, evaluate], default=str))
    assert contents(tmp_path / "codes") == contents(runs.codes)
    alone("generate", runs.prior, "--out", tmp_path / "one", *options)
    assert len(contents(tmp_path / "two" / "images")) == 20
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    alone("evaluate", prior, *judge, tmp_path / "one.json")
    two, one = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("two", "one"))
    for document, processes in ((two, 2), (one, 1)):
        assert document["protocol"].pop("processes") == processes
        assert document["figures"].pop("codes_per_s") > 0
    assert two["figures"] == pytest.approx(one["figures"], rel=1e-9)
    assert two["protocol"] == one["protocol"]
