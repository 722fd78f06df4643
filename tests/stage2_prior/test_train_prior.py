import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from messages import assert_names, refuses
from safetensors.torch import load_file

from stage2_prior.codes import Augmentation, CodeCache, TokenizerReference
from stage2_prior.prior import Prior
from stage2_prior.prior_training import PriorTrainingConfig, keep_best, train
from stage2_prior.train_prior import command
from twostage.core.config.sections import parse_config
from twostage.core.training.training_run import TrainingRun

TRANSFORMER = {"hidden_size": 16, "depth": 1, "num_heads": 2}
SIZES = {
    "causal_transformer": TRANSFORMER,
    "masked_transformer": TRANSFORMER,
    "parallel_transformer": TRANSFORMER,
    "pixelcnn": {"channels": 8, "depth": 2, "first_kernel": 3, "head_channels": 16},
}
TRAINING = (train, PriorTrainingConfig)  # what `start` starts


def random_grids(count: int, seed: int) -> np.ndarray:
    """Random grids, which can only be memorized."""
    return np.random.default_rng(seed).integers(0, 4, (count, 2, 2))


def regular_grids(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Grids (count, 2, 2) that their labels determine, and the labels."""
    labels = np.arange(count) % 2
    return np.array([[[0, 1], [2, 3]], [[3, 3], [0, 1]]])[labels], labels


@pytest.fixture
def document(tmp_path) -> Callable[..., dict]:
    """``document(loss, model, **train)``: a config of six small steps on the codes in `codes/`."""

    def document(loss: dict | None = None, model: str = "causal_transformer", **train: object) -> dict:
        return {
            "run": {"dir": str(tmp_path / "run"), "seed": 3, "trackers": []},
            "codes": str(tmp_path / "codes"),
            "model": {"type": model, "dropout": 0.0} | SIZES[model],
            "loss": loss or {},
            "train": {"batch_size": 8, "max_steps": 6, "lr": 1e-2, "validate_every": 2, "checkpoint_every": 3,
                      "log_every": 2, "keep_checkpoints": 9} | train,
        }  # fmt: skip

    return document


@pytest.fixture
def regular(tmp_path, write_codes) -> Path:
    """Learnable codes with classes."""
    (training, labels), (held_out, held_out_labels) = regular_grids(32), regular_grids(10)
    write_codes(tmp_path / "codes", {"train": training, "val": held_out}, 4, ["up", "down"],
                {"train": labels, "val": held_out_labels})  # fmt: skip
    return tmp_path / "codes"


@pytest.fixture
def noise(tmp_path, write_codes) -> Path:
    """A few codes without classes that can only be memorized."""
    write_codes(tmp_path / "codes", {"train": random_grids(8, 0), "val": random_grids(12, 1)}, 4)
    return tmp_path / "codes"


def read_metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def held_out(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run) if line["split"] == "val"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def nats_per_code(model: Prior, codes: Path) -> float:
    split = CodeCache(codes).validation
    rows = torch.arange(len(split))
    return -model.log_likelihood(split.read(rows), split.read_labels(rows)).mean().item() / 4


def test_a_run_writes_its_folder(regular, document, tmp_path, new_process, capsys):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(document(max_steps=99)))
    command(tmp_path / "config.yaml", ["train.max_steps=6", "train.keep_checkpoints=1"])
    run, manifest = tmp_path / "run", CodeCache(regular).manifest
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["max_steps"] == 6
    lines = read_metrics(run)
    assert [line["step"] for line in lines if line["split"] == "train"] == [2, 3, 4, 6]
    assert [line["step"] for line in lines if line["split"] == "val"] == [2, 4, 6]
    validations = [line for line in lines if line["split"] == "val"]
    assert {line["unigram"] for line in validations} == {manifest.unigram_nats_per_code["val"]}
    assert {line["uniform"] for line in validations} == {math.log(4)}
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000006"]
    model = Prior.from_pretrained(run)
    assert (model.config.tokenizer, model.config.class_names) == (manifest.tokenizer, ["up", "down"])
    assert (run / "losses.png").is_file()
    shown = capsys.readouterr().out
    assert f"uniform {math.log(4):.4f}, unigram {manifest.unigram_nats_per_code['val']:.4f}" in shown
    assert "32 train, 10 val; grid 2x2, 4 of 4 codes used, tokenizer 0123456789ab" in shown
    assert f"step 2: held out: loss {validations[0]['loss']:.4g}, unigram " in shown
    assert "bound" not in shown


def test_regular_codes_are_learned_far_below_the_unigram(regular, document, start):
    run = start(document(max_steps=60, validate_every=30, checkpoint_every=60))
    assert held_out(run)[60] < 0.1 < 1 < CodeCache(regular).manifest.unigram_nats_per_code["val"]


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_a_run_stops_when_it_overfits_and_keeps_its_best_model(ema_decay, noise, document, start, capsys):
    config = document(max_steps=60, lr=3e-2, patience=3, checkpoint_every=50, ema_decay=ema_decay)
    run = start(config)
    losses = held_out(run)
    best = min(losses, key=losses.__getitem__)
    assert list(losses) == list(range(2, best + 7, 2))  # the best, then three that are not better
    assert best + 6 < 50
    assert nats_per_code(Prior.from_pretrained(run), noise) == pytest.approx(losses[best], rel=1e-5)
    assert losses[best + 6] > losses[best] + 0.01
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{best + 6:08d}"]
    shown = capsys.readouterr().out
    assert f"best held-out loss {losses[best]:.4f} nats per code at step {best}" in shown
    assert_names(shown, "overfitting", f"step {best} (held-out loss {losses[best]:.4f}", "model.dropout")
    assert_names(shown.splitlines()[-1], f"step {best + 6}", f"model/ holds the weights of step {best}")

    before = contents(run)
    start(config)
    reason = f"the held-out loss has not improved since step {best}"
    assert_names(capsys.readouterr().out, f"finished at step {best + 6} ({reason})", "nothing left to do")
    assert contents(run) == before


def test_the_bound_of_a_masked_transformer_is_named_as_one(noise, document, start, capsys, monkeypatch):
    titles = []
    monkeypatch.setattr("twostage.core.training.journal.draw_curves", lambda *_, title, **__: titles.append(title))
    run = start(document(model="masked_transformer", max_steps=60, lr=3e-2, patience=3, checkpoint_every=60))
    losses = held_out(run)
    best = min(losses, key=losses.__getitem__)
    assert max(losses) == best + 6 < 60
    shown = capsys.readouterr().out
    assert f"step {best}: held out (loss: an upper bound): loss {losses[best]:.4g}, unigram " in shown
    assert f"step {best} (held-out upper bound {losses[best]:.4f}" in shown
    assert f"best held-out upper bound {losses[best]:.4f} nats per code at step {best}" in shown
    assert_names(shown.splitlines()[-1], "held-out upper bound", f"step {best + 6}")
    assert "held-out loss" not in shown
    assert set(titles) == {"run: nats per code (held out: upper bound)"}


@pytest.mark.parametrize("max_grad_norm", [None, 1e-12])
def test_gradients_are_clipped(max_grad_norm, regular, document, start):
    run = start(document(max_steps=2, checkpoint_every=1, max_grad_norm=max_grad_norm))
    first, second = (run / "checkpoints" / f"step_{step:08d}" / "model.safetensors" for step in (1, 2))
    moved = (load_file(second)["network.norm.bias"] - load_file(first)["network.norm.bias"]).abs().max()
    assert moved < 1e-5 if max_grad_norm else moved > 1e-4  # far below Adam's epsilon a gradient does nothing


def test_the_average_follows_the_weights(regular, document, start):
    run = start(document(max_steps=2, validate_every=1, checkpoint_every=1, ema_decay=0.9))
    first, second = (run / "checkpoints" / f"step_{step:08d}" for step in (1, 2))
    weights = [load_file(folder / "model.safetensors")["network.norm.bias"] for folder in (first, second)]
    averages = [load_file(folder / "ema.safetensors")["module.network.norm.bias"] for folder in (first, second)]
    assert torch.equal(averages[0], weights[0])
    torch.testing.assert_close(averages[1], weights[0] * 2 / 11 + weights[1] * 9 / 11)  # the decay warms up
    assert not torch.equal(averages[1], weights[1])
    assert torch.equal(load_file(run / "model" / "model.safetensors")["network.norm.bias"], averages[1])


def test_patience_is_counted_from_the_last_best(document, new_process, tiny_prior):
    run = TrainingRun(parse_config(PriorTrainingConfig, document(patience=2), "config"))
    run.facts = {"best_loss": math.inf, "best_step": 0, "validations_since_best": 0}

    def finished() -> str | None:
        return run.config.train.reason_to_end(run.step, 99, run.facts)

    for loss in (3.0, 4.0, 2.0, 3.0, 1.0, 2.0):
        run.step += 1
        keep_best(run, tiny_prior(), loss)
        assert not finished()
    keep_best(run, tiny_prior(), 1.0)  # equal is not better
    assert finished() == "the held-out loss has not improved since step 5"


@pytest.mark.parametrize("codes", ["regular", "noise"])
@pytest.mark.parametrize("model", SIZES)
def test_a_killed_run_ends_as_if_uninterrupted(model, codes, request, document, start):
    request.getfixturevalue(codes)
    replaced = {"start": 0.4, "end": 0.1, "shape": "cosine"}
    config = document({"replace_prob": replaced, "class_dropout_prob": 0.3}, model, max_steps=12, checkpoint_every=2,
                      patience=2,
                      ema_decay=0.8, gradient_accumulation_steps=2, lr_schedule="cosine", warmup_steps=2,
                      max_grad_norm=0.5, weight_decay=0.1, lr=3e-2)  # fmt: skip
    config["model"]["dropout"] = 0.2
    run = start(config)
    uninterrupted = contents(run)
    checkpoints = sorted((run / "checkpoints").iterdir())
    assert len(checkpoints) >= 3
    for newer in checkpoints[1:]:
        shutil.rmtree(newer)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "split": "va')  # the kill came in the middle of a line
    start(config)
    assert contents(run) == uninterrupted


@pytest.mark.parametrize("model", SIZES)
def test_accumulation_does_not_change_the_loss(model, regular, document, start, tmp_path):
    losses = []
    for parts in (1, 2, 4):
        config = document({"replace_prob": 0.3}, model, gradient_accumulation_steps=parts)
        config["run"]["dir"] = str(tmp_path / f"run_{parts}")
        losses.append(torch.tensor([line["loss"] for line in read_metrics(start(config))]))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-4, atol=0)


def test_a_finished_run_has_nothing_left_to_do(regular, document, start, capsys):
    run = start(document(max_steps=2))
    before, checkpoint = contents(run), (run / "checkpoints" / "step_00000002").stat().st_mtime_ns
    start(document(max_steps=2))
    assert_names(capsys.readouterr().out, "finished at step 2 (all steps done)", "nothing left to do")
    assert contents(run) == before
    assert (run / "checkpoints" / "step_00000002").stat().st_mtime_ns == checkpoint


def test_an_extended_run_equals_one_of_that_length(regular, document, start, tmp_path):
    config = document({"replace_prob": 0.3}, ema_decay=0.8, warmup_steps=2, max_steps=4, checkpoint_every=4)
    config["model"]["dropout"] = 0.2
    start(config)
    config["train"]["max_steps"] = 8
    extended = contents(start(config))
    config["run"]["dir"] = str(tmp_path / "meant")
    meant = contents(start(config))
    del extended["config.yaml"], meant["config.yaml"]  # they name the folder
    del extended["losses.png"], meant["losses.png"]  # its title too
    for files in (extended, meant):  # the planned steps
        state = json.loads(files["checkpoints/step_00000008/state.json"])
        assert state["facts"].pop("planned_steps", 4) == 4
        files["checkpoints/step_00000008/state.json"] = json.dumps(state).encode()
        del files["checkpoints/step_00000008/manifest.json"], files["checkpoints/step_00000004/manifest.json"]
        del files["checkpoints/step_00000004/state.json"]  # whether it was the last
    assert extended == meant


def test_a_run_out_of_patience_trains_on_with_more(noise, document, start, capsys):
    config = document(max_steps=60, lr=3e-2, patience=1)
    stopped = max(held_out(start(config)))
    config["train"] |= {"patience": 3, "log_every": 5}
    assert max(held_out(start(config))) >= stopped + 4
    assert f"Resuming from step {stopped}" in capsys.readouterr().out


def test_a_schedule_keeps_its_planned_length(regular, document, start, capsys):
    replaced = {"start": 0.4, "end": 0.1}
    start(document({"replace_prob": replaced}, max_steps=2, lr_schedule="cosine"))
    run = start(document({"replace_prob": replaced}, max_steps=4, lr_schedule="cosine", log_every=1))
    said = capsys.readouterr().out
    assert_names(said, "4 steps instead of 2", "the cosine over 4 steps: 0.005 here, 0 at the end",
                 "loss.replace_prob still count the 2 steps")  # fmt: skip
    rates = [line["lr"] for line in read_metrics(run) if line["split"] == "train"]
    assert rates == pytest.approx([5e-3, 5e-3, 1e-2 * (1 - math.sqrt(0.5)) / 2])
    with refuses("train.max_steps 3", "step 3", str(run), "4 steps", "larger train.max_steps"):
        start(document({"replace_prob": replaced}, max_steps=3, lr_schedule="cosine"))


def test_a_different_config_is_refused_and_changes_nothing(regular, document, start):
    run = start(document(max_steps=2))
    before = contents(run)
    with refuses("run.dir", "loss.replace_prob", "0.0", "0.5", "run.dir="):
        start(document({"replace_prob": 0.5}, max_steps=2))
    assert contents(run) == before


def test_codes_of_another_tokenizer_are_refused_on_resume(noise, document, start, write_codes):
    run = start(document(max_steps=2))
    before = contents(run)
    other = TokenizerReference(hash="f" * 64, path="runs/other")
    write_codes(noise, {"train": random_grids(8, 0), "val": random_grids(12, 1)}, 4, tokenizer=other)
    with refuses(f"codes {noise}", "tokenizer", "'0123456789ab'", f"'{'f' * 12}'", "run.dir="):
        start(document(max_steps=2))
    assert contents(run) == before


def test_codes_of_another_grid_and_vocabulary_are_refused_on_resume(noise, document, start, write_codes):
    run = start(document(max_steps=2))
    before = contents(run)
    wider = np.arange(8 * 2 * 3).reshape(8, 2, 3) % 5
    write_codes(noise, {"train": wider, "val": wider}, 5)
    with refuses(f"codes {noise}", "grid", "[2, 2]", "[2, 3]", "codebook_size", "4", "5"):
        start(document(max_steps=2))
    assert contents(run) == before


@pytest.mark.parametrize(
    ("changes", "differences"),
    [
        ({"augmentation": Augmentation(crops=3)}, ["augmentation.crops", "0", "3"]),
        ({"augmentation": Augmentation(horizontal_flip=True)}, ["augmentation.horizontal_flip", "False", "True"]),
        ({"tokenizer": TokenizerReference(hash="0123456789ab" + "f" * 52, path="runs/tokenizer")},
         ["tokenizer", "'0123456789ab'"]),
        ({"class_names": ["up", "left"]}, ["classes.1", "'down'", "'left'"]),
        ({"class_names": None}, ["classes.0", "'up'", "classes.1", "'down'", "(absent)"]),
        ({"class_names": [*"abcdef"]},
         ["classes.0", "'up'", "'a'", "classes.1", "'down'", "'b'", "classes.2", "'(absent)'", "'c'", "2 more"]),
    ],
)  # fmt: skip
def test_codes_that_were_encoded_differently_are_refused_on_resume(
    changes, differences, regular, document, start, write_codes, tmp_path
):
    run = start(document(max_steps=2))
    before = contents(run)
    (training, labels), (held_out, held_out_labels) = regular_grids(32), regular_grids(10)
    names = changes.pop("class_names", ["up", "down"])
    write_codes(regular, {"train": training, "val": held_out}, 4, names, {"train": labels, "val": held_out_labels},
                **changes)  # fmt: skip
    with refuses(f"codes {regular}", f"the run in {tmp_path / 'run'}", *differences, "run.dir="):
        start(document(max_steps=2))
    assert contents(run) == before


def test_other_codes_of_the_same_form_are_refused_on_resume(noise, document, start, write_codes):
    run = start(document(max_steps=2))
    write_codes(noise, {"train": random_grids(8, 2), "val": random_grids(12, 1)}, 4)
    with refuses(f"codes {noise}", "sha256", "run.dir="):
        start(document(max_steps=2))
    write_codes(noise, {"train": random_grids(8, 0), "val": random_grids(12, 1)}, 4, source="spelled otherwise")
    assert start(document(max_steps=2)) == run


def test_codes_with_other_numbers_of_rows_are_refused_on_resume(noise, document, start, write_codes):
    start(document(max_steps=2))
    write_codes(noise, {"train": random_grids(16, 0), "val": random_grids(10, 1)}, 4)
    with refuses(f"codes {noise}", "rows.train", "8", "16", "rows.val", "12", "10"):
        start(document(max_steps=2))


def test_a_label_without_a_class_is_refused_before_anything_is_written(regular, document, start, tmp_path):
    labels = np.load(regular / "val.labels.npy")
    labels[7] = 5
    np.save(regular / "val.labels.npy", labels)
    with refuses("val.labels.npy", "row 7", "5", "0 to 1"):
        start(document())
    assert not (tmp_path / "run").exists()


def test_codes_beyond_the_vocabulary_are_refused_before_anything_is_written(noise, document, start, tmp_path):
    codes = np.load(noise / "train.codes.npy")
    codes[5, 1, 0] = 9
    np.save(noise / "train.codes.npy", codes)
    with refuses("train.codes.npy", "row 5", "9", "0 to 3"):
        start(document())
    assert not (tmp_path / "run").exists()


def test_a_collapsed_codebook_stops_before_anything_is_written(tmp_path, write_codes, document, start):
    grids = np.zeros((32, 2, 2), dtype=np.int64)
    grids[0, 0, 0] = 3
    write_codes(tmp_path / "codes", {"train": grids, "val": grids}, 4)
    with refuses("codes", "0.046 nats per code", "2 of 4", "collapsed", "train.lr"):
        start(document())
    assert not (tmp_path / "run").exists()


def test_missing_codes_are_reported_before_anything_is_written(tmp_path, document, start):
    with refuses("codes", "no such folder", "twostage encode"):
        start(document())
    assert not (tmp_path / "run").exists()


def test_fewer_codes_than_a_batch_are_refused(noise, document, start):
    with refuses("train.batch_size 9", "8 code grids"):
        start(document(batch_size=9))


@pytest.mark.parametrize("model", ["causal_transformer", "masked_transformer"])
def test_squared_activations_are_refused_in_float16(document, model):
    config = document(model=model, mixed_precision="fp16")
    assert parse_config(PriorTrainingConfig, config, "config").model.type == model
    config["model"]["mlp"] = "squared_relu"
    with refuses("train.mixed_precision 'fp16'", "squared_relu", "train.mixed_precision=bf16"):
        parse_config(PriorTrainingConfig, config, "config")
