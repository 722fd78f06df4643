"""A dry run measures the real steps and changes nothing."""

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from messages import assert_names

from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.tokenizer_training import TokenizerConfig, train
from twostage.core.config.sections import parse_config
from twostage.core.machine.memory import peak_memory
from twostage.core.training.dry_run import DryRun
from twostage.core.training.flops import count_flops

ROOT = Path(__file__).parents[4]
PIXELS, HIDDEN, LATENT, BATCH = 8 * 8 * 3, 16, 4, 16


@pytest.fixture
def measured(tmp_path, new_process) -> Callable[..., dict]:
    """``measured(loss, bottleneck, **train)``: the figures of a dry run of a tiny fully connected autoencoder."""

    def measured(loss: dict | None = None, bottleneck: str = "identity", **settings: object) -> dict:
        new_process()
        document = {
            "run": {"dir": str(tmp_path / "run")},
            "data": {"source": "shapes", "image_size": 8, "num_images": 640},
            "model": {
                "latent_channels": LATENT,
                "backbone": {"type": "mlp", "hidden_sizes": [HIDDEN]},
                "bottleneck": {"type": bottleneck},
            },
            "loss": loss or {},
            "train": {"batch_size": BATCH, "max_steps": 50} | settings,
        }
        run = train(parse_config(TokenizerConfig, document, "config"), dry_run=True)
        assert not (tmp_path / "run").exists()
        assert isinstance(run, DryRun)
        return run.figures

    return measured


def test_flops_match_a_count_by_hand(measured):
    layers = [(PIXELS, HIDDEN), (HIDDEN, LATENT), (LATENT, HIDDEN), (HIDDEN, PIXELS)]
    forward = sum(2 * BATCH * inputs * outputs for inputs, outputs in layers)
    # Backward each layer has two such products, for its weights and its inputs; pixels need no gradient.
    assert measured()["flops_per_step"] == 3 * forward - 2 * BATCH * PIXELS * HIDDEN


def test_all_accumulation_steps_are_counted(measured):
    whole = measured()
    parts = measured(gradient_accumulation_steps=4)
    assert parts["flops_per_step"] == whole["flops_per_step"]
    assert parts["peak_memory_bytes"] < whole["peak_memory_bytes"]


def test_the_discriminator_is_counted_even_if_it_starts_late(measured):
    alone = measured()
    adversarial = {"channels": 8, "num_layers": 1, "start": 0.9}
    both = measured({"adversarial": adversarial})
    assert alone["parameters"].keys() == {"model"}
    assert both["parameters"].keys() == {"model", "discriminator"}
    assert both["flops_per_step"] > 2 * alone["flops_per_step"]


def test_the_figures_describe_the_run(measured, capsys):
    figures = measured(ema_decay=0.9)
    both = PIXELS * HIDDEN + HIDDEN * LATENT
    assert figures["parameters"]["model"]["all"] == 2 * both + HIDDEN + LATENT + HIDDEN + PIXELS
    assert figures["parameters"]["model"]["trainable"] == figures["parameters"]["model"]["all"]
    assert (figures["steps_per_epoch"], figures["steps"]) == (40, 50)
    assert (figures["num_train"], figures["num_held_out"]) == (640, 64)
    assert figures["seconds_estimated"] == pytest.approx(50 * figures["seconds_per_step"])
    assert figures["seconds_first_step"] > 0
    assert figures["seconds_per_step"] > 0
    assert figures["mixed_precision"] == "no"
    assert figures["threads"] == 1
    out = capsys.readouterr().out
    assert_names(
        out,
        "CPU threads: 1 (",
        "parameters ",
        "FLOPs per step ",
        "peak memory ",
        "50 (40 per epoch)",
        "640 for training, 64 held",
    )
    assert "nothing was written" in out


def test_memory_grows_linearly_with_the_batch(measured):
    small, large, larger = (measured(batch_size=size)["peak_memory_bytes"] for size in (64, 128, 256))
    assert large - small > 64 * PIXELS * 4  # at least the float32 images
    assert larger - large == pytest.approx(2 * (large - small), rel=0.02)


def test_peak_memory_of_known_tensors():
    megabyte = 1 << 18  # float32 numbers
    kept = torch.ones(megabyte)
    with peak_memory(torch.device("cpu")) as peak:
        doubled = kept * 2
        view = doubled[5:]
        del doubled
        tripled = kept * 3  # three alive: `view` keeps all of the second
        del view, tripled
        kept.add_(1)
        kept * 4
    assert peak() == 3 << 20


def test_peak_memory_counts_what_backward_needs():
    weight = torch.ones(256, 256, requires_grad=True)  # 256 KiB
    with peak_memory(torch.device("cpu")) as peak:
        y = (weight * 2).exp().exp()  # each exp saves its result
        y.sum().backward()
    # weight, both results, and of the gradients at most two beside that of the weight
    assert 4 * 256 <= peak() / 1024 <= 7 * 256


@pytest.mark.parametrize("causal", [False, True])
def test_attention_on_a_cpu_is_counted(causal):
    batch, heads, cells, width = 2, 3, 16, 8
    q, k, v = (torch.randn(batch, heads, cells, width, requires_grad=True) for _ in range(3))
    with count_flops() as counter:
        F.scaled_dot_product_attention(q, k, v, is_causal=causal).sum().backward()
    product = 2 * batch * heads * cells * cells * width
    assert counter.get_total_flops() == 2 * product + 5 * product  # backward recomputes the scores


def test_the_search_for_the_nearest_code_is_counted(measured):
    found = measured(bottleneck="vector")["flops_per_step"] - measured()["flops_per_step"]
    codes = 512  # the default of TokenizerConfig
    assert found >= 2 * BATCH * codes * LATENT


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_an_existing_run_is_neither_read_nor_changed(runs, twostage, configs, tmp_path):
    root = runs.tokenizer.parents[1]
    before = contents(root)
    ended = twostage("train-tokenizer", configs / "tokenizer.yaml", f"run.dir={runs.tokenizer}", "train.lr=0.5",
                     "--dry-run", "--json", tmp_path / "tokenizer.json")  # fmt: skip
    assert ended.code == 0, ended.err
    ended = twostage("train-prior", configs / "prior.yaml", f"run.dir={runs.prior}", f"codes={runs.codes}",
                     "--dry-run", "--json", tmp_path / "prior.json")  # fmt: skip
    assert ended.code == 0, ended.err
    assert contents(root) == before
    assert f"nothing was written to {runs.prior}" in ended.out
    assert "best" not in ended.out
    tokenizer, prior = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("tokenizer", "prior"))
    model = Autoencoder.from_pretrained(runs.tokenizer)
    assert tokenizer["parameters"]["model"]["all"] == sum(p.numel() for p in model.parameters())
    assert prior["flops_per_step"] > 6 * 16 * math.prod(model.grid) * prior["parameters"]["model"]["all"] * 0.5


def test_train_features_has_a_dry_run(twostage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = twostage("train-features", "shapes", "--image-size", "8", "--width", "4", "--dry-run", "--json", "f.json")
    assert ended.code == 0, ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["f.json"]
    assert json.loads((tmp_path / "f.json").read_text())["flops_per_step"] > 0


def test_bad_options_are_refused(twostage, configs, tmp_path):
    config = configs / "tokenizer.yaml"
    ended = twostage("train-tokenizer", config, f"run.dir={tmp_path / 'run'}", "--json", tmp_path / "a.json")
    assert ended.code == 2
    assert_names(ended.err, "--json", "a.json", "--dry-run")
    ended = twostage("train-tokenizer", config, f"run.dir={tmp_path / 'run'}", "--dry-run", "--json", tmp_path)
    assert ended.code == 2
    assert_names(ended.err, "--json", tmp_path, "expected a file")
    broken = tmp_path / "broken.yaml"
    broken.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"loss": {"nothing": 1}}))
    ended = twostage("train-tokenizer", broken, f"run.dir={tmp_path / 'run'}", "--dry-run")
    assert ended.code == 2
    assert_names(ended.err, "loss.nothing", "unknown key")
    assert not (tmp_path / "run").exists()


def test_each_of_two_processes_does_half_of_the_work(measured, configs, tmp_path):
    """Only the main process prints, and nothing is written."""
    backbone = f"{{type: mlp, hidden_sizes: [{HIDDEN}]}}"
    model = f"model={{latent_channels: {LATENT}, backbone: {backbone}, bottleneck: {{type: identity}}}}"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
               "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
               "-m", "stage1_tokenizer.train_tokenizer", str(configs / "tokenizer.yaml"),
               f"run.dir={tmp_path / 'run'}", "data.image_size=8", "data.num_images=640", f"train.batch_size={BATCH}",
               model, "--dry-run", "--json", str(tmp_path / "two.json")]  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "MASTER_PORT": str(port)}
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("FLOPs per step") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["two.json"]
    two, one = json.loads((tmp_path / "two.json").read_text()), measured()
    assert two["processes"] == 2
    assert 2 * two["flops_per_step"] == one["flops_per_step"]
    assert two["parameters"] == one["parameters"]
