"""A prior sharded over two processes (FSDP2) is the prior that one process trains."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from messages import assert_names, refuses
from PIL import Image
from safetensors.torch import load_file

from pipelines.drawing.rebuilt_images import decode_codes
from stage1_tokenizer.autoencoder import Autoencoder
from stage2_prior.codes import CodeCache
from stage2_prior.networks import autoregressive
from stage2_prior.prior import Prior
from stage2_prior.sample_sheets import draw_samples
from stage2_prior.sampling import image_seeds
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.machine.sharding import units_to_shard

ROOT = Path(__file__).parents[1]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
          str(ROOT / "configs" / "accelerate" / "fsdp_cpu_2.yaml")]  # fmt: skip
STEPS = ["train.max_steps=8", "train.log_every=1", "train.validate_every=4", "train.checkpoint_every=4"]
SHAPE = "hidden_size: 32, depth: 2, num_heads: 2, dropout: 0.0"
PRIORS = {
    "causal": [f"model={{type: causal_transformer, {SHAPE}, tied_head: true}}", "train.ema_decay=0.9",
               "train.max_grad_norm=0.1", "train.weight_decay=0.1"],
    "masked": [f"model={{type: masked_transformer, {SHAPE}, codes: [4, 4]}}", "loss.replace_prob=0.2",
               "train.gradient_accumulation_steps=2", "train.max_grad_norm=0.1", "train.batch_size=24"],
    "bf16": [f"model={{type: causal_transformer, {SHAPE}}}", "train.mixed_precision=bf16", "train.ema_decay=0.9"],
}  # fmt: skip
MAX_LOGITS = 5 * 16 * 16  # five images, so that the processes get different numbers of held-out parts

# Each prior trains twice: to the end, and again from step 4, as if it had been killed there.
TRAIN = f"""
import json, runpy, shutil, sys
from pathlib import Path
from accelerate import PartialState
from accelerate.state import AcceleratorState
from stage2_prior.networks import autoregressive
autoregressive.MAX_LOGITS = {MAX_LOGITS}
PartialState.destroy_process_group = lambda *_: None  # the next training needs it
def train(words):
    AcceleratorState._reset_state()  # another precision
    sys.argv = ["pipelines.train_prior", *words]
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if ended.code:
            raise
    assert PartialState().num_processes == 2
for folder, words in json.loads(sys.argv[1]).items():
    train(words)
    if PartialState().is_main_process:
        shutil.copytree(folder, folder + "_whole")
        shutil.rmtree(Path(folder, "checkpoints", "step_00000008"))
    PartialState().wait_for_everyone()
    train(words)
"""


def launch(*words: object) -> subprocess.CompletedProcess[str]:
    """`accelerate launch --config_file configs/accelerate/fsdp_cpu_2.yaml WORDS`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*LAUNCH, "--main_process_port", str(port), *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def losses(run: Path, split: str) -> torch.Tensor:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line["loss"] for line in lines if line["split"] == split], dtype=torch.float64)


@pytest.fixture(scope="module")
def trained(runs, configs, tmp_path_factory) -> tuple[Path, dict[str, list[str]]]:
    """A folder with NAME (killed and resumed) and NAME_whole for each of the `PRIORS`, and their command lines."""
    folder = tmp_path_factory.mktemp("fsdp")
    words = {name: [str(configs / "prior.yaml"), f"codes={runs.codes}", *STEPS, *each] for name, each in PRIORS.items()}
    (folder / "train.py").write_text(TRAIN, encoding="utf-8")
    commands = {str(folder / name): [*each, f"run.dir={folder / name}"] for name, each in words.items()}
    ended = launch(folder / "train.py", json.dumps(commands))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("FSDP: the weights are sharded over 2 processes") == 2 * len(PRIORS)
    assert ended.stdout.count("Resuming from step 4") == len(PRIORS)
    return folder, words


@pytest.fixture
def alone(twostage, monkeypatch):
    """``alone(*words)``: the same training by one ordinary process."""
    monkeypatch.setattr(autoregressive, "MAX_LOGITS", MAX_LOGITS)

    def alone(*words: object) -> None:
        ended = twostage("train-prior", *words)
        assert ended.code == 0, ended.err

    return alone


def assert_same(ours: Path, theirs: Path, rtol: float, atol: float) -> None:
    """The losses, the model for inference, and the content of the last checkpoint."""
    for split in ("train", "val"):
        torch.testing.assert_close(losses(ours, split), losses(theirs, split), rtol=rtol, atol=0)
    files = [*(theirs / "checkpoints").rglob("*.safetensors"), theirs / "model" / "model.safetensors"]
    for file in files:
        torch.testing.assert_close(load_file(ours / file.relative_to(theirs)), load_file(file), rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("name", "rtol", "atol"), [("causal", 1e-5, 1e-5), ("masked", 1e-5, 1e-5), ("bf16", 5e-3, 0.05)]
)
def test_two_processes_train_what_one_does(trained, runs, alone, tmp_path, name, rtol, atol):
    folder, words = trained
    parts = math.ceil(len(CodeCache(runs.codes).validation) / (5 if name != "masked" else 24))
    assert parts % 2, "one process has a part of the held-out images more than the other"
    alone(*words[name], f"run.dir={tmp_path / 'one'}")
    assert len(losses(tmp_path / "one", "train")) == 8
    assert_same(folder / f"{name}_whole", tmp_path / "one", rtol, atol)


@pytest.mark.parametrize("name", PRIORS)
def test_the_same_command_resumes_bit_for_bit(trained, name):
    folder, _ = trained
    assert_same(folder / name, folder / f"{name}_whole", rtol=0, atol=0)


@pytest.mark.parametrize("name", PRIORS)
def test_the_model_has_whole_tensors(trained, name):
    prior = Prior.from_pretrained(trained[0] / name)
    seeds = image_seeds(seed=0, first=0, count=3)
    codes = prior.sample(torch.tensor([0, 1, 2]), SamplingConfig(), seeds)
    assert codes.shape == (3, 4, 4)
    assert ((codes >= 0) & (codes < 16)).all()


@pytest.mark.parametrize("name", PRIORS)
def test_samples_are_drawn_from_the_whole_weights(trained, runs, name):
    run = trained[0] / name
    prior, tokenizer = Prior.from_pretrained(run), Autoencoder.from_pretrained(runs.tokenizer)
    expected = draw_samples(prior, lambda codes: decode_codes(tokenizer, codes), seed=0)
    best = 4 * (1 + int(losses(run, "val").argmin()))
    with Image.open(run / "samples" / f"step_{best:08d}.png") as drawn:
        assert drawn.tobytes() == expected.tobytes()


def test_one_process_resumes_where_two_stopped(trained, alone, tmp_path):
    """Checkpoints hold whole tensors, so the number of processes does not matter."""
    folder, words = trained
    run = shutil.copytree(folder / "causal_whole", tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step_00000008")
    config = run / "config.yaml"
    config.write_text(config.read_text(encoding="utf-8").replace(str(folder / "causal"), str(run)), encoding="utf-8")
    alone(*words["causal"], f"run.dir={run}")
    assert_same(run, folder / "causal_whole", rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("verb", ["train-tokenizer", "train-prior"])
def test_unshardable_trainings_are_refused(runs, configs, twostage, monkeypatch, tmp_path, verb):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    pixelcnn = [configs / "prior.yaml", f"codes={runs.codes}", "model={type: pixelcnn, channels: 8, depth: 3}"]
    words = pixelcnn if verb == "train-prior" else [configs / "tokenizer.yaml"]
    ended = twostage(verb, *words, f"run.dir={tmp_path / 'run'}")
    assert ended.code == 2
    assert_names(ended.err, "distributed_type FSDP", "gpu_8.yaml")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("variable", "value", "wanted"), [
    ("FSDP_VERSION", "1", "fsdp_version must be 2"),
    ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params must be false"),
    ("FSDP_ACTIVATION_CHECKPOINTING", "true", "fsdp_activation_checkpointing must be false"),
    ("FSDP_RESHARD_AFTER_FORWARD", "false", "fsdp_reshard_after_forward must be true"),
    ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "fsdp_auto_wrap_policy must be TRANSFORMER_BASED_WRAP"),
])  # fmt: skip
def test_unsupported_settings_are_named(monkeypatch, variable, value, wanted):
    launched = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true",
                "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block"}  # fmt: skip
    for key, setting in launched.items():
        monkeypatch.setenv(key, setting)
    assert units_to_shard(shardable=True) == ["Block"]
    if variable == "FSDP_VERSION":  # what version 1 calls the same
        monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "FULL_SHARD")
    monkeypatch.setenv(variable, value)
    with refuses("fsdp_config", wanted):
        units_to_shard(shardable=True)
