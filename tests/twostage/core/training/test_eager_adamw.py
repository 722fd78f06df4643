"""AdamW without torch's compiler updates as torch's does."""

import pytest
import torch
from torch import nn

from twostage.core.training.eager_adamw import EagerAdamW


@pytest.mark.parametrize("fused", [True, False])
def test_updates_are_those_of_torch(fused):
    results = []
    for kind in (torch.optim.AdamW, EagerAdamW):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.1, fused=fused)
        called = []
        optimizer.register_step_post_hook(lambda *_, called=called: called.append(1))
        for _ in range(3):
            model(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert len(called) == 3, "hooks, such as Accelerate's, are called"
        assert not any(weight.grad_fn for weight in model.parameters())
        results.append(torch.cat([weight.flatten() for weight in model.parameters()]))
    assert torch.equal(*results)
