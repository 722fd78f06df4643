import math

import pytest
import torch

from stage2_prior.shares import MEAN_MASKED_SHARE, MaskSchedule, ReplaceSchedule, masked_share, replace_prob_at
from twostage.core.config.sections import parse_config
from twostage.core.errors import InputError

MASK_SCHEDULES: list[MaskSchedule] = ["cosine", "arccos"]


@pytest.mark.parametrize("schedule", MASK_SCHEDULES)
def test_the_masked_share_falls_from_all_to_none_and_is_concave(schedule):
    share = masked_share(torch.linspace(0, 1, 101, dtype=torch.double), schedule)
    torch.testing.assert_close(share[[0, -1]], torch.tensor([1.0, 0.0], dtype=torch.double), atol=1e-12, rtol=0)
    steps = share.diff()
    assert (steps < 0).all()
    assert (steps.diff() < 0).all()  # what filling an image in its last step and not before rests on


@pytest.mark.parametrize("schedule", MASK_SCHEDULES)
def test_the_mean_masked_share_is_two_over_pi(schedule):
    middles = (torch.arange(100_000, dtype=torch.double) + 0.5) / 100_000
    assert masked_share(middles, schedule).mean().item() == pytest.approx(MEAN_MASKED_SHARE, abs=1e-6)
    assert pytest.approx(2 / math.pi) == MEAN_MASKED_SHARE


def test_the_two_mask_schedules_are_each_others_mirror_image():
    progress = torch.linspace(0, 1, 11, dtype=torch.double)
    back = masked_share(masked_share(progress, "cosine"), "arccos")
    torch.testing.assert_close(back, progress)
    assert masked_share(progress, "cosine")[5].item() == pytest.approx(math.sqrt(0.5))
    assert masked_share(progress, "arccos")[5].item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_a_constant_replacement_stays(progress):
    assert replace_prob_at(progress, 0.2) == 0.2


@pytest.mark.parametrize(
    ("shape", "shares"), [("linear", [0.4, 0.3, 0.2, 0.1, 0.0]), ("cosine", [0.4, 0.341421, 0.2, 0.058579, 0.0])]
)
def test_a_replacement_schedule_goes_from_start_to_end(shape, shares):
    schedule = ReplaceSchedule(start=0.4, end=0.0, shape=shape)
    assert [replace_prob_at(i / 4, schedule) for i in range(5)] == pytest.approx(shares, abs=1e-6)


def test_a_replacement_schedule_may_rise():
    assert replace_prob_at(0.5, ReplaceSchedule(start=0.0, end=0.5)) == 0.25


def test_a_share_above_1_is_refused():
    with pytest.raises(InputError, match="start"):
        parse_config(ReplaceSchedule, {"start": 1.5, "end": 0.0}, "replace_prob")
