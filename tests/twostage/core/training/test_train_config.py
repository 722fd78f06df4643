import pytest
from messages import refuses

from twostage.core.config.sections import load_config, parse_config
from twostage.core.training.train_config import TrainConfig


@pytest.mark.parametrize(
    ("train", "parts"),
    [
        ({}, ["max_steps", "epochs", "None"]),
        ({"max_steps": 1, "epochs": 2}, ["max_steps=1", "epochs=2"]),
        ({"max_steps": 0}, ["max_steps", "greater than 0", "got 0"]),
        ({"max_steps": 1, "lr": 0}, ["lr", "greater than 0", "got 0"]),
        ({"max_steps": 1, "betas": [0.9]}, ["betas.1", "required"]),
        ({"max_steps": 1, "betas": [0.9, 1.0]}, ["betas.1", "less than 1", "got 1.0"]),
        ({"max_steps": 1, "ema_decay": 1.0}, ["ema_decay", "less than 1", "got 1.0"]),
        ({"max_steps": 1, "mixed_precision": "bf32"}, ["mixed_precision", "'auto'", "'bf16'", "'bf32'"]),
        ({"max_steps": 1, "batchsize": 1}, ["batchsize", "'batch_size'"]),
    ],
)
def test_wrong_settings_are_refused(train, parts):
    with refuses("train", *parts):
        parse_config(TrainConfig, train, "train")


@pytest.mark.parametrize("word", ["no", "bf16", "auto"])
def test_a_bare_no_is_a_precision_not_a_boolean(word, tmp_path):
    (tmp_path / "config.yaml").write_text(f"max_steps: 1\nmixed_precision: {word}\n")
    assert load_config(TrainConfig, tmp_path / "config.yaml").mixed_precision == word
    assert load_config(TrainConfig, tmp_path / "config.yaml", [f"mixed_precision={word}"]).mixed_precision == word
