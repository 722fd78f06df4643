"""The data order is a function of the step, for any number of processes."""

from collections import Counter
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from messages import refuses

from twostage.core.errors import InputError
from twostage.core.training.batches import Batches
from twostage.core.training.train_config import TrainConfig

CPU = torch.device("cpu")


def make_batches(
    num_samples: int = 22, *, process: int = 0, processes: int = 1, seed: int = 0, **train: Any
) -> Batches:
    config = TrainConfig(**{"batch_size": 8, "max_steps": 9} | train)
    accelerator = SimpleNamespace(num_processes=processes, process_index=process)
    return Batches(num_samples, config, seed, accelerator, "images")  # type: ignore[arg-type]


def identity(rows: torch.Tensor) -> torch.Tensor:
    return rows


def test_an_epoch_shows_each_sample_at_most_once():
    batches = make_batches(22)
    assert (batches.steps_per_epoch, batches.max_steps) == (2, 9)
    epochs = [torch.cat([batches.rows(2 * epoch), batches.rows(2 * epoch + 1)]).tolist() for epoch in range(4)]
    for rows in epochs:
        assert len(set(rows)) == 16
        assert set(rows) <= set(range(22))
    assert len({tuple(rows) for rows in epochs}) == 4, "each epoch has its own order"
    assert set().union(*epochs) == set(range(22)), "the samples left over differ from epoch to epoch"


def test_a_full_epoch_is_a_permutation():
    batches = make_batches(24, epochs=2, max_steps=None)
    assert batches.max_steps == 6
    assert Counter(torch.cat([batches.rows(step) for step in range(6)]).tolist()) == dict.fromkeys(range(24), 2)


def test_the_order_is_a_function_of_the_step():
    forwards, backwards = make_batches(), make_batches()
    first = {step: forwards.rows(step).tolist() for step in range(9)}
    assert {step: backwards.rows(step).tolist() for step in reversed(range(9))} == first
    assert make_batches(seed=1).rows(0).tolist() != first[0]


@pytest.mark.parametrize(("processes", "accumulation"), [(2, 1), (4, 1), (1, 4), (2, 2), (8, 1)])
def test_all_processes_together_see_what_one_sees(processes, accumulation):
    (whole, random), = make_batches().at(3, identity)  # fmt: skip
    noise = random.normal("noise", (2,), CPU)
    shares = [
        make_batches(process=process, processes=processes, gradient_accumulation_steps=accumulation).at(3, identity)
        for process in range(processes)
    ]
    assert {len(share) for share in shares} == {accumulation}
    parts = [share[part] for part in range(accumulation) for share in shares]
    assert torch.equal(torch.cat([rows for rows, _ in parts]), whole)
    assert torch.equal(torch.cat([random.normal("noise", (2,), CPU) for _, random in parts]), noise)


def test_random_numbers_change_with_the_step():
    draws = [make_batches().at(step, identity)[0][1].uniform("noise", (), CPU).tolist() for step in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("start", [0, 1, 5, 9])
def test_reading_ahead_yields_the_same_batches_and_no_more(start):
    batches, read = make_batches(), []

    def noted(rows: torch.Tensor) -> torch.Tensor:
        read.append(rows.tolist())
        return rows

    ahead = [part[0][0].tolist() for part in batches.read_ahead(start, noted)]
    assert ahead == [make_batches().rows(step).tolist() for step in range(start, 9)]
    if start < 9:
        assert read == ahead, "no batch after the last is read"


def test_reading_ahead_may_stop_early():
    assert len(list(islice(make_batches().read_ahead(0, identity), 2))) == 2


def test_reading_ahead_passes_on_errors():
    def broken(rows: torch.Tensor) -> torch.Tensor:
        raise InputError("cat.png: cannot be read")

    with refuses("cat.png"):
        next(make_batches().read_ahead(0, broken))


def test_fewer_samples_than_a_batch():
    with refuses("train.batch_size 8", "5 images", "at most 5"):
        make_batches(5)
    assert make_batches(8).steps_per_epoch == 1


def test_a_batch_that_cannot_be_shared():
    with refuses("train.batch_size 8", "3 processes", "train.gradient_accumulation_steps", "multiple of 6"):
        make_batches(processes=3, gradient_accumulation_steps=2)
