"""Random numbers depend on their purpose and on a sample's place in the global batch."""

import pytest
import torch

from twostage.core.training.random import BatchRandom, seed_for

CPU = torch.device("cpu")


def test_seeds_do_not_change_between_versions():
    # A resumed run draws the same numbers as an uninterrupted one, even after an update of this library.
    assert seed_for(0, "order", 3) == 386106667988085106


def test_different_parts_give_different_seeds():
    parts = [
        (0, "order", 1),
        (0, "order", 11),
        (0, "order1", 1),
        (1, "order", 0),
        (0, "order"),
        ("0", "order", 1),
        (1, 1),
        (11,),
    ]
    seeds = {seed_for(*p) for p in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("draw", ["uniform", "normal"])
@pytest.mark.parametrize("cut", [4, 1, 7])
def test_parts_of_a_batch_add_up_to_the_whole(draw, cut):
    def drawn(rows: slice) -> torch.Tensor:
        return getattr(BatchRandom(5, rows, 8), draw)("noise", (3, 2), CPU)

    whole = drawn(slice(0, 8))
    assert whole.shape == (8, 3, 2)
    assert torch.equal(torch.cat([drawn(slice(0, cut)), drawn(slice(cut, 8))]), whole)


def test_draws_depend_on_seed_and_purpose_but_not_on_order():
    random = BatchRandom(5, slice(0, 8), 8)
    noise = random.normal("noise", (4,), CPU)
    assert torch.equal(random.normal("noise", (4,), CPU), noise)
    assert not torch.equal(random.normal("mask", (4,), CPU), noise)
    assert not torch.equal(BatchRandom(6, slice(0, 8), 8).normal("noise", (4,), CPU), noise)


def test_draws_leave_the_global_stream_alone():
    before = torch.get_rng_state()
    BatchRandom(0, slice(0, 2), 2).uniform("noise", (2,), CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_have_their_distributions():
    random = BatchRandom(0, slice(0, 10_000), 10_000)
    uniform, normal = random.uniform("noise", (), CPU), random.normal("noise", (), CPU)
    assert ((uniform >= 0) & (uniform < 1)).all()
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.02)
    assert (normal.mean().item(), normal.std().item()) == pytest.approx((0, 1), abs=0.04)
