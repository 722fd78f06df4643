"""`twostage train-prior` draws samples at each validation, and they change nothing that is trained."""

import shutil
from pathlib import Path

import pytest
import torch
from messages import assert_names
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

from pipelines.drawing.two_stage import TwoStagePipeline
from twostage.core.images.sheets import class_sheet

STEPS = ["train.max_steps=8", "train.validate_every=4", "train.checkpoint_every=4", "train.ema_decay=0.5",
         "model.dropout=0.2", "run.seed=3"]  # fmt: skip


@pytest.fixture(scope="module")
def run(runs, configs, works, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("train_prior") / "run"
    words = [f"codes={runs.codes}", f"run.dir={folder}", "run.trackers=[tensorboard]"]
    assert f"samples: {folder / 'samples'}" in works("train-prior", configs / "prior.yaml", *words, *STEPS)
    return folder


def test_the_last_samples_are_those_that_generate_draws(run):
    assert sorted(file.name for file in (run / "samples").iterdir()) == ["step_00000004.png", "step_00000008.png"]
    pipeline = TwoStagePipeline.from_runs(run)
    assert len(pipeline.class_names or []) == 8
    images = pipeline(num_images=16, seed=3, output_type="pt").images
    expected = class_sheet(images, pipeline.class_names, list(range(8)))
    with Image.open(run / "samples" / "step_00000008.png") as drawn:
        assert drawn.tobytes() == expected.tobytes()


def shown_in_tensorboard(run: Path, tag: str) -> list[tuple[int, tuple[int, int]]]:
    """The step and size of each image."""
    events = EventAccumulator(str(run))
    events.Reload()
    return [(image.step, (image.width, image.height)) for image in events.Images(tag)]


def test_tensorboard_shows_the_sheets(run, configs, works, tmp_path):
    with Image.open(run / "samples" / "step_00000008.png") as drawn:
        assert shown_in_tensorboard(run, "samples") == [(4, drawn.size), (8, drawn.size)]
    words = [f"run.dir={tmp_path / 'run'}", "run.trackers=[tensorboard]", "train.max_steps=2"]
    works("train-tokenizer", configs / "tokenizer.yaml", *words)
    with Image.open(tmp_path / "run" / "samples" / "step_00000002.png") as drawn:
        assert shown_in_tensorboard(tmp_path / "run", "reconstructions") == [(2, drawn.size)]
    runs = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    assert list(runs.Runs()) == ["run"], "a run has the name of its folder"
    assert "max_steps: 2" in str(runs.Tensors("run", "config/text_summary")[0].tensor_proto)


def test_wandb_shows_the_run(configs, works, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed (pip install wandb)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    started = []
    begin = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **settings: started.append(begin(**settings)) or started[-1])
    folder = tmp_path / "vqvae"
    words = ["run.trackers=wandb", "run.project=digits", f"run.dir={folder}", "train.validate_every=2"]
    works("train-tokenizer", configs / "tokenizer.yaml", *words, "train.max_steps=2")
    works("train-tokenizer", configs / "tokenizer.yaml", *words, "train.max_steps=4")
    first, second = started
    assert (first.project, first.name, first.id) == ("digits", "vqvae", second.id)
    assert first.config["train"]["max_steps"] == 2
    shown = list(folder.glob("wandb/*/files/media/images/reconstructions_*.png"))
    for file in shown:
        with Image.open(file) as there, Image.open(folder / "samples" / "step_00000002.png") as drawn:
            assert there.size == drawn.size
    assert {path.name.split("_")[1] for path in shown} == {"2", "4"}


def test_without_the_tokenizer_the_same_prior_is_trained_and_a_line_says_why(run, runs, configs, works, tmp_path):
    codes = shutil.copytree(runs.codes, tmp_path / "codes")
    manifest = codes / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(runs.tokenizer), str(tmp_path / "gone")))
    words = [f"codes={codes}", f"run.dir={tmp_path / 'run'}", *STEPS]
    shown = works("train-prior", configs / "prior.yaml", *words)
    assert_names(shown, "No samples are drawn", codes, tmp_path / "gone", "Move it back")
    assert not list((tmp_path / "run" / "samples").iterdir())
    for file in ("model/model.safetensors", "checkpoints/step_00000008/optimizer.safetensors"):
        with_samples, without = load_file(run / file), load_file(tmp_path / "run" / file)
        assert all(torch.equal(without[name], tensor) for name, tensor in with_samples.items()), file


def test_another_tokenizer_draws_nothing(runs, configs, works, changed_tokenizer, tmp_path):
    codes = shutil.copytree(runs.codes, tmp_path / "codes")
    manifest = codes / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(runs.tokenizer), str(changed_tokenizer("encoder"))))
    words = [f"codes={codes}", f"run.dir={tmp_path / 'run'}", "train.max_steps=2"]
    shown = works("train-prior", configs / "prior.yaml", *words)
    assert_names(shown, "No samples are drawn", tmp_path / "changed", "Encode the images again")
    assert not list((tmp_path / "run" / "samples").iterdir())


def test_missing_codes_are_reported_once(twostage, configs, tmp_path):
    ended = twostage("train-prior", configs / "prior.yaml", f"codes={tmp_path / 'nope'}", f"run.dir={tmp_path / 'run'}")
    assert ended.code == 2
    assert_names(ended.err, tmp_path / "nope", "twostage encode")
    assert "No samples are drawn" not in ended.out


def test_a_dry_run_draws_nothing(runs, configs, works, tmp_path):
    shown = works(
        "train-prior", configs / "prior.yaml", f"codes={runs.codes}", f"run.dir={tmp_path / 'run'}", "--dry-run"
    )
    assert "No samples" not in shown
    assert not (tmp_path / "run").exists()
