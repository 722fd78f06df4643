"""The average equals one computed by hand."""

import pytest
import torch
from torch import nn

from twostage.core.training.optimizer import AveragedCopy


def weights_over_time(decay: float, values: list[float]) -> list[float]:
    model = nn.Linear(1, 1, bias=False)
    averaged = AveragedCopy(model, decay)
    seen = []
    for value in values:
        model.weight.data.fill_(value)
        averaged.update_parameters(model)
        seen.append(averaged.module.weight.item())
    return seen


def test_average_equals_the_one_by_hand():
    values, expected = [1.0, 5.0, -3.0, 2.0, 7.0], [1.0]  # the first update takes the weights as they are
    for count, value in enumerate(values[1:], start=1):
        decay = min(0.3, (1 + count) / (10 + count))  # 2/11, 3/12, then the full 0.3
        expected.append(decay * expected[-1] + (1 - decay) * value)
    assert weights_over_time(0.3, values) == pytest.approx(expected, rel=1e-6)


def test_the_decay_warms_up():
    assert weights_over_time(0.999, [0.0, 11.0])[1] == pytest.approx(9.0)  # 2/11 of the old, 9/11 of the new


def test_the_average_is_separate_from_the_model():
    model = nn.Linear(2, 2)
    averaged = AveragedCopy(model, 0.5)
    averaged.update_parameters(model)
    before = averaged.module.weight.clone()
    model.weight.data.add_(1)
    assert torch.equal(averaged.module.weight, before)


def test_buffers_are_copied():
    model = nn.BatchNorm1d(2)
    averaged = AveragedCopy(model, 0.9)
    for value in (1.0, 5.0):
        model.running_mean.fill_(value)
        averaged.update_parameters(model)
    assert averaged.module.running_mean.tolist() == [5.0, 5.0]


def test_the_count_of_updates_is_part_of_the_state():
    model = nn.Linear(1, 1)
    averaged = AveragedCopy(model, 0.5)
    for _ in range(3):
        averaged.update_parameters(model)
    restored = AveragedCopy(nn.Linear(1, 1), 0.5)
    restored.load_state_dict(averaged.state_dict())
    model.weight.data.fill_(3.0)
    for copy in (averaged, restored):
        copy.update_parameters(model)
    assert torch.equal(restored.module.weight, averaged.module.weight)
