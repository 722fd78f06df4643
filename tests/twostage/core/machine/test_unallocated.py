"""Modules without memory have the shapes of real ones, whatever their constructors compute."""

import pytest
import torch
from torch import nn

from twostage.core.machine.unallocated import unallocated


class Table(nn.Module):
    """Its constructor computes a table from ranges alone, or from ranges and other tensors."""

    def __init__(self, mixed: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        nn.init.trunc_normal_(self.linear.weight)
        cells = torch.arange(6)
        self.register_buffer("table", cells[:, None] // 2 - (torch.ones(6) if mixed else cells))


@pytest.mark.parametrize("mixed", [False, True])
def test_shapes_without_memory(mixed):
    module, real = unallocated(lambda: Table(mixed)), Table(mixed)
    assert module.linear.weight.is_meta
    assert {name: tensor.shape for name, tensor in module.state_dict().items()} == {
        name: tensor.shape for name, tensor in real.state_dict().items()
    }
