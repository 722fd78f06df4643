import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from messages import refuses
from PIL import Image

from stage1_tokenizer.features.feature_network import FeatureNetwork
from stage1_tokenizer.features.feature_training import FeaturesTrainingConfig, features_config, train
from stage1_tokenizer.train_features import command
from twostage.core.config.sections import parse_config
from twostage.core.data.dataset import load_images
from twostage.core.images.conversion import to_float

TRAINING = (train, FeaturesTrainingConfig)  # what `start` starts


@pytest.fixture
def document(tmp_path) -> Callable[..., dict]:
    """``document(**train)``: a config of six small steps."""

    def document(**train: object) -> dict:
        return {
            "run": {"dir": str(tmp_path / "run"), "seed": 3, "trackers": []},
            "data": {"source": "shapes", "image_size": 8, "num_images": 96, "horizontal_flip": True},
            "widths": [4, 8],
            "train": {"batch_size": 16, "max_steps": 6, "lr": 1e-3, "validate_every": 2, "checkpoint_every": 3,
                      "log_every": 2, "keep_checkpoints": 9} | train,
        }  # fmt: skip

    return document


@pytest.fixture
def write_images(tmp_path) -> Callable[..., str]:
    """``write_images(*folders, mode, size)``: a source with four images in each folder."""

    def write(*folders: str, mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> str:
        for folder in folders:
            (tmp_path / "images" / folder).mkdir(parents=True)
            for i in range(4):
                Image.new(mode, size).save(tmp_path / "images" / folder / f"{i}.png")
        return str(tmp_path / "images")

    return write


def read_metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_writes_its_folder(document, start, capsys):
    run = start(document())
    lines = read_metrics(run)
    assert [line["step"] for line in lines if line["split"] == "val"] == [2, 4, 6]
    assert all(0 <= line["accuracy"] <= 1 and line["loss"] > 0 for line in lines)
    assert f"held-out accuracy {lines[-1]['accuracy']:.2%} (64 images of `test`)" in capsys.readouterr().out
    assert (run / "losses.png").is_file()
    assert FeatureNetwork.from_pretrained(run).config.model_dump() == {
        "image_size": (8, 8), "channels": 3, "widths": [4, 8],
        "class_names": ["circle", "ring", "square", "triangle", "star", "cross", "heart", "crescent"],
    }  # fmt: skip


def test_the_last_validation_measures_the_stored_network(document, start):
    config = document(lr=1e-2)
    run = start(config)
    network, line = FeatureNetwork.from_pretrained(run), read_metrics(run)[-1]
    split = load_images(parse_config(FeaturesTrainingConfig, config, "config").data).validation
    logits, labels = network(to_float(split.read(torch.arange(len(split))))), split.labels
    assert line["accuracy"] == pytest.approx((logits.argmax(dim=1) == labels).float().mean().item())
    assert line["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_it_learns_the_classes(document, start):
    config = document(max_steps=150, lr=1e-2, lr_schedule="cosine", batch_size=32, validate_every=150,
                      checkpoint_every=150, weight_decay=0.05)  # fmt: skip
    config["data"] |= {"image_size": 16, "num_images": 1024}
    config |= {"widths": [8, 16], "max_shift": 1}
    accuracy = read_metrics(start(config))[-1]["accuracy"]
    assert accuracy > 0.6  # chance is 1/8


def test_digits_are_learned_within_a_hundred_steps(document, start, data_folder):
    config = document(max_steps=100, lr=3e-3, lr_schedule="cosine", batch_size=64, validate_every=100,
                      checkpoint_every=100, weight_decay=0.05, max_grad_norm=1.0)  # fmt: skip
    config["data"] = {"source": str(data_folder / "mnist"), "image_size": 28, "channels": 1, "num_images": 6400}
    config["widths"] = [16, 32, 64]
    assert read_metrics(start(config))[-1]["accuracy"] > 0.9


def test_a_killed_run_ends_as_if_uninterrupted(document, start):
    config = document(gradient_accumulation_steps=2, lr_schedule="cosine", max_grad_norm=0.1)
    run = start(config)
    uninterrupted = contents(run)
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "split": "tr')  # the kill came in the middle of a line
    start(config)
    assert contents(run) == uninterrupted


def test_a_finished_run_has_nothing_left_to_do(document, start, capsys):
    run = start(document(max_steps=2))
    before, printed = contents(run), capsys.readouterr().out.splitlines()[-1]
    start(document(max_steps=2))
    out = capsys.readouterr().out
    assert "nothing left to do" in out
    assert out.splitlines()[-1] == printed
    assert contents(run) == before


def test_the_command_takes_the_form_of_the_images(write_images, new_process, tmp_path, monkeypatch):
    source = write_images("cat", "dog", mode="L", size=(10, 6))
    monkeypatch.chdir(tmp_path)
    new_process()
    command(source, epochs=2, batch_size=4, seed=5)
    run = tmp_path / "runs" / "features_images"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["image_size"] == [6, 10]
    assert config["data"]["channels"] == 1
    assert config["run"]["seed"] == 5
    assert config["train"]["epochs"] == 2
    assert config["train"]["mixed_precision"] in ("no", "bf16")
    network = FeatureNetwork.from_pretrained(run)
    assert (network.config.channels, network.config.class_names) == (1, ["cat", "dog"])
    before = contents(run / "model")
    new_process()
    command(source, epochs=2, batch_size=4, seed=5)  # the same command again
    assert contents(run / "model") == before


def test_the_command_takes_a_given_form(new_process, tmp_path, write_images):
    new_process()
    source = write_images("cat", "dog")
    command(source, out=tmp_path / "run", image_size=4, channels=4, epochs=1, batch_size=4, horizontal_flip=True)
    assert FeatureNetwork.from_pretrained(tmp_path / "run").config.image_size == (4, 4)
    assert FeatureNetwork.from_pretrained(tmp_path / "run").config.channels == 4
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["horizontal_flip"] is True


def test_the_usual_form_is_the_default(write_images, tmp_path):
    source = write_images("cat", "dog", size=(512, 256))
    config = features_config(source, tmp_path / "run")
    assert (config.data.size, config.data.channels) == ((128, 256), 3)


def test_images_without_labels_are_refused(write_images, document, start, tmp_path):
    source = write_images(".")
    config = document() | {"data": {"source": source, "image_size": 8}}
    with refuses("data.source", source, "no labels", "--label-column"):
        start(config)
    assert not (tmp_path / "run").exists()


def test_images_of_one_class_are_refused(write_images, document, start):
    config = document() | {"data": {"source": write_images("cat"), "image_size": 8}}
    with refuses("data.source", "class 'cat'", "at least 2 classes"):
        start(config)
