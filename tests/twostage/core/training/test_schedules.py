"""The learning rate is a function of the step, with these values."""

import math

import pytest

from twostage.core.training.train_config import TrainConfig


def test_constant():
    assert {TrainConfig(max_steps=10).lr_share(step, 10) for step in range(12)} == {1.0}


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_warmup_rises_in_equal_steps_to_the_full_rate(schedule):
    config = TrainConfig(max_steps=100, warmup_steps=4, lr_schedule=schedule)
    assert [config.lr_share(step, 100) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_cosine_falls_from_the_full_rate_to_zero():
    config = TrainConfig(max_steps=110, warmup_steps=10, lr_schedule="cosine")
    shares = [config.lr_share(step, 110) for step in (10, 35, 60, 85, 110)]
    assert shares == pytest.approx([1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0.0])


def test_cosine_stays_at_zero_after_the_end():
    assert TrainConfig(max_steps=100, lr_schedule="cosine").lr_share(150, 100) == pytest.approx(0.0)


def test_warmup_longer_than_the_run():
    for step, warmup_steps, share in ((4, 10, 0.5), (5, 5, 1.0)):
        config = TrainConfig(max_steps=5, warmup_steps=warmup_steps, lr_schedule="cosine")
        assert config.lr_share(step, 5) == pytest.approx(share)
