import pytest

from twostage.core.config.sections import load_config, parse_config
from twostage.core.errors import InputError
from twostage.core.training.train_config import TrainConfig


@pytest.mark.parametrize(
    ("train", "mistake"),
    [
        ({}, "give either max_steps or epochs, got max_steps=None, epochs=None"),
        ({"max_steps": 1, "epochs": 2}, "give either max_steps or epochs, got max_steps=1, epochs=2"),
        ({"max_steps": 0}, "max_steps: expected greater than 0, got 0"),
        ({"max_steps": 1, "lr": 0}, "lr: expected greater than 0, got 0"),
        ({"max_steps": 1, "betas": [0.9]}, "betas.1: required but missing"),
        ({"max_steps": 1, "betas": [0.9, 1.0]}, "betas.1: expected less than 1, got 1.0"),
        ({"max_steps": 1, "ema_decay": 1.0}, "ema_decay: expected less than 1, got 1.0"),
        ({"max_steps": 1, "mixed_precision": "bf32"},
         "mixed_precision: expected 'auto', 'no', 'bf16' or 'fp16', got 'bf32'"),
        ({"max_steps": 1, "batchsize": 1}, "batchsize: unknown key; did you mean 'batch_size'?"),
    ],
)  # fmt: skip
def test_wrong_settings_are_told(train, mistake):
    with pytest.raises(InputError) as error:
        parse_config(TrainConfig, train, "train")
    assert str(error.value) == f"train has 1 mistake:\n  {mistake}"


@pytest.mark.parametrize("word", ["no", "bf16", "auto"])
def test_a_bare_no_is_a_precision_and_no_truth_value(word, tmp_path):
    (tmp_path / "config.yaml").write_text(f"max_steps: 1\nmixed_precision: {word}\n")
    assert load_config(TrainConfig, tmp_path / "config.yaml").mixed_precision == word
    assert load_config(TrainConfig, tmp_path / "config.yaml", [f"mixed_precision={word}"]).mixed_precision == word
