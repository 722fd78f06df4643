"""A loss or a gradient that is not finite stops the run, or costs one update and is counted."""

import json
import re
from pathlib import Path

import pytest
import torch
from messages import assert_names
from safetensors.torch import load_file

from stage1_tokenizer import tokenizer_training
from stage1_tokenizer.bottlenecks.vector_quantizer import VectorConfig, VectorQuantizer
from twostage.core.training.random import BatchRandom
from twostage.core.training.training_run import TrainingRun

BROKEN = 5  # the step, counted from 0
WORDS = ["run.dir=run", "train.max_steps=12", "train.checkpoint_every=1", "train.keep_checkpoints=20",
         "train.validate_every=12", "train.log_every=4"]  # fmt: skip
ADVERSARIAL = "loss.adversarial={channels: 8, num_layers: 2, start: 0}"


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def broken_gradient(monkeypatch) -> list[str]:
    """Makes one gradient value infinite at the step BROKEN, in the networks in this list; losses stay finite."""
    check, nets = TrainingRun.check_gradient, ["Autoencoder"]

    def spoil_and_check(run, net, optimizer):
        if run.step == BROKEN and type(net).__name__ in nets:
            next(p for p in net.parameters() if p.grad is not None).grad.view(-1)[0] = torch.inf
        return check(run, net, optimizer)

    monkeypatch.setattr(TrainingRun, "check_gradient", spoil_and_check)
    return nets


@pytest.fixture
def broken_images(monkeypatch) -> None:
    """Puts a NaN into the batch of the step BROKEN, as an overflow in the encoder would."""
    to_float, seen = tokenizer_training.to_float, []
    begin = TrainingRun.begin_step

    def spoil(pixels):
        images = to_float(pixels)
        if seen and seen[-1] == BROKEN:
            images[0, 0, 0, 0] = torch.nan
            seen.clear()
        return images

    monkeypatch.setattr(TrainingRun, "begin_step", lambda run: (seen.append(run.step), begin(run))[1])
    monkeypatch.setattr(tokenizer_training, "to_float", spoil)


def tensors(step: int, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(f"run/checkpoints/step_{step:08d}/{name}.safetensors")


def facts(step: int = 12) -> dict:
    return json.loads(Path(f"run/checkpoints/step_{step:08d}/state.json").read_text())["facts"]


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in first if not torch.equal(first[name], second[name])}


def test_a_gradient_that_is_not_finite_stops_the_run(twostage, configs, broken_gradient):
    ended = twostage("train-tokenizer", configs / "tokenizer.yaml", *WORDS, "train.checkpoint_every=3")
    assert ended.code == 2
    error = ended.err[ended.err.index("error: ") :]
    assert_names(error, "step 6: grad_norm is not finite", "13 more", "last good checkpoint in run/checkpoints")
    assert_names(error, "train.on_not_finite=skip")
    assert re.search(r"batch of \w+ \d+, \w+ \d+, \w+ \d+ ", error)
    assert [path.name for path in sorted(Path("run/checkpoints").iterdir())] == ["step_00000003"]
    assert re.match(r"step 6: grad_norm\n\w+ \d+\n", Path("run/not_finite.txt").read_text())


def test_skip_skips_only_that_update(twostage, configs, broken_gradient):
    words = [*WORDS, "train.on_not_finite=skip", "train.max_grad_norm=1", ADVERSARIAL]
    ended = twostage("train-tokenizer", configs / "tokenizer.yaml", *words)
    assert ended.code == 0, ended.err
    assert re.search(r"step 6: grad_norm is not finite for the batch of .*; updates skipped so far: 1\n", ended.out)
    assert facts()["skipped_updates"] == 1
    trained = {name for name in differing(tensors(BROKEN - 1), tensors(BROKEN)) if "bottleneck" not in name}
    assert trained, "other updates change weights"
    assert not trained & differing(tensors(BROKEN), tensors(BROKEN + 1)), "this one does not"
    assert not differing(tensors(BROKEN, "optimizer"), tensors(BROKEN + 1, "optimizer")), "nor Adam's moments and steps"
    assert differing(tensors(BROKEN, "discriminator"), tensors(BROKEN + 1, "discriminator")), "the other network learns"
    assert trained == trained & differing(tensors(BROKEN + 1), tensors(BROKEN + 2)), "and training continues"
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert all(
        torch.isfinite(torch.tensor(list(v for v in line.values() if isinstance(v, float)))).all() for line in lines
    )


def test_only_the_update_of_the_discriminator_is_skipped(twostage, configs, broken_gradient):
    broken_gradient[:] = ["Discriminator"]
    words = [*WORDS, "train.on_not_finite=skip", ADVERSARIAL]
    ended = twostage("train-tokenizer", configs / "tokenizer.yaml", *words)
    assert ended.code == 0, ended.err
    assert "step 6: discriminator_grad_norm is not finite" in ended.out
    assert not differing(tensors(BROKEN, "discriminator_optimizer"), tensors(BROKEN + 1, "discriminator_optimizer"))
    assert differing(tensors(BROKEN), tensors(BROKEN + 1))


@pytest.mark.parametrize(
    "bottleneck",
    [
        "{type: vector, codebook_size: 16}",
        "{type: vector, codebook_size: 16, codebook: learned}",
        "{type: residual, codebook_size: 16}",
        "{type: finite_scalar, levels: [4, 3, 3, 3]}",
        "{type: multi_scale, scales: [1, 4], codes: {type: vector, codebook_size: 16}}",
        "{type: lookup_free}",
        "{type: binary_spherical}",
        "{type: gumbel_softmax, codebook_size: 16}",
        "{type: index_backpropagation, codebook_size: 16}",
        "{type: diveq, codebook_size: 16}",
        "{type: projected, codebook_size: 16}",
        "{type: product, groups: 2, each: {type: vector, codebook_size: 16}}",
    ],
)
def test_a_broken_batch_leaves_no_trace(twostage, configs, broken_images, bottleneck):
    words = [*WORDS, "train.on_not_finite=skip", "train.ema_decay=0.9", ADVERSARIAL, f"model.bottleneck={bottleneck}"]
    ended = twostage("train-tokenizer", configs / "tokenizer.yaml", *words)
    assert ended.code == 0, ended.err
    assert "step 6: " in ended.out
    assert "updates skipped so far: " in ended.out
    for name in ("model", "ema", "optimizer", "discriminator", "discriminator_optimizer"):
        assert all(tensor.isfinite().all() for tensor in tensors(12, name).values() if tensor.is_floating_point()), name


def test_a_run_that_skipped_resumes_as_if_uninterrupted(twostage, configs, broken_gradient, tmp_path):
    words = ["train-tokenizer", configs / "tokenizer.yaml", *WORDS, "train.on_not_finite=skip"]
    assert twostage(*words, "run.dir=whole").code == 0
    assert twostage(*words, "--time-limit", 0).code == 75
    while (ended := twostage(*words, "--time-limit", 0)).code == 75:
        pass
    assert ended.code == 0, ended.err
    Path("run").rename("stopped")
    Path("whole").rename("run")
    whole, log = tensors(12), Path("run/metrics.jsonl").read_text()
    assert facts()["skipped_updates"] == 1
    Path("run").rename("whole")
    Path("stopped").rename("run")
    assert not differing(whole, tensors(12))
    assert facts()["skipped_updates"] == 1
    assert Path("run/metrics.jsonl").read_text() == log


def test_a_prior_skips_too(twostage, configs, runs, broken_gradient):
    broken_gradient[:] = ["Prior"]
    words = ["train-prior", configs / "prior.yaml", f"codes={runs.codes}", *WORDS]
    ended = twostage(*words, "train.on_not_finite=skip")
    assert ended.code == 0, ended.err
    assert re.search(r"step 6: grad_norm is not finite for the batch of row \d+, ", ended.out)
    assert not differing(tensors(BROKEN), tensors(BROKEN + 1))
    ended = twostage(*words, "run.dir=stopped")
    assert ended.code == 2
    assert_names(ended.err, "step 6: grad_norm is not finite for the batch of row ")


def test_vectors_that_are_not_finite_do_not_change_a_codebook():
    quantizer = VectorQuantizer(VectorConfig(codebook_size=8), 4).train()
    encoded = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    before = quantizer.codebook.clone()
    for spoilt in (True, False):
        encoded[0, 0, 0, 0] = torch.nan if spoilt else 0.0
        quantizer(encoded, None, BatchRandom(0, slice(0, 2), 2))
        quantizer.update_codebook(lambda tensor: tensor)
        assert torch.allclose(quantizer.codebook, before, rtol=1e-4) == spoilt
