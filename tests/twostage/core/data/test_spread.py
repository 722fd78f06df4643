"""Rows that are shown are spread over the split and its classes."""

import pytest
import torch

from twostage.core.data.spread import spread, spread_over_classes


def test_rows_at_equal_distances():
    assert spread(10, 4).tolist() == [0, 2, 5, 7]
    assert spread(3, 12).tolist() == [0, 1, 2]
    assert spread(3, None).tolist() == [0, 1, 2]


@pytest.mark.parametrize("count", [1, 2, 5, 7, 12, 33, 59, 60, 100])
@pytest.mark.parametrize("sizes", [[60], [20] * 3, [1] * 60, [1, 59], [57, 1, 1, 1], [5, 10, 15, 30], [0, 30, 0, 30]])
@pytest.mark.parametrize("order", ["sorted", "mixed", "in turn", "backwards"])
def test_every_class_has_its_share(sizes, order, count):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    if order == "mixed":
        labels = labels[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    if order == "in turn":
        labels = labels.view(-1, 2).t().flatten()
    labels = labels.flip(0) if order == "backwards" else labels
    rows = spread_over_classes(labels, 60, count)
    assert len(rows) == len(rows.unique()) == min(count, 60)
    found = torch.bincount(labels[rows], minlength=len(sizes)).tolist()
    if count >= sum(size > 0 for size in sizes):
        full = max(found)  # a class has fewer than another only where it has no more, or it is not its turn yet
        assert all(got >= min(size, full - 1) for got, size in zip(found, sizes, strict=True))
    else:
        assert max(found) == 1
    first = labels[rows][: len(labels[rows].unique())]
    assert len(first.unique()) == len(first), "the classes in turn"
    assert torch.equal(rows, spread_over_classes(labels, 60, count))


def test_twelve_images_of_a_sorted_folder():
    labels = torch.arange(3).repeat_interleave(100)
    assert spread_over_classes(labels, 300, 6).tolist() == [0, 100, 200, 50, 150, 250]
    assert labels[spread_over_classes(labels, 300, 12)].tolist() == [0, 1, 2] * 4
    many = torch.arange(1000).repeat_interleave(3)
    assert many[spread_over_classes(many, 3000, 4)].tolist() == [0, 250, 500, 750], "not the first classes"


def test_without_labels_rows_are_spread_and_nothing_is_nothing():
    assert spread_over_classes(None, 100, 4).tolist() == [0, 25, 50, 75]
    assert spread_over_classes(None, 3, 12).tolist() == [0, 1, 2]
    assert spread_over_classes(torch.tensor([], dtype=torch.long), 0, 12).tolist() == []
    assert spread_over_classes(torch.tensor([-1, -1]), 2, 1).tolist() == [0]


def test_another_choice_within_a_class():
    labels = torch.tensor([0, 0, 0, 1, 1])
    last = spread_over_classes(labels, 5, 3, lambda rows, wanted: rows.flip(0)[:wanted])
    assert last.tolist() == [2, 4, 1]
