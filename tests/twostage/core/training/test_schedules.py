"""The learning rate is a function of the step, with these values."""

import math

import pytest

from twostage.core.training.schedules import lr_at


def test_constant():
    assert {lr_at(step, lr=0.5, max_steps=10) for step in range(12)} == {0.5}


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_warmup_rises_in_equal_steps_to_the_full_rate(schedule):
    rates = [lr_at(step, lr=0.8, max_steps=100, warmup_steps=4, schedule=schedule) for step in range(5)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])


def test_cosine_falls_from_the_full_rate_to_zero():
    rates = [lr_at(step, lr=2.0, max_steps=110, warmup_steps=10, schedule="cosine") for step in (10, 35, 60, 85, 110)]
    assert rates == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5), 0.0])


def test_cosine_stays_at_zero_after_the_end():
    assert lr_at(150, lr=1.0, max_steps=100, schedule="cosine") == pytest.approx(0.0)


def test_warmup_longer_than_the_run():
    assert lr_at(4, lr=1.0, max_steps=5, warmup_steps=10, schedule="cosine") == pytest.approx(0.5)
    assert lr_at(5, lr=1.0, max_steps=5, warmup_steps=5, schedule="cosine") == pytest.approx(1.0)
