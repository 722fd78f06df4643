"""AdamW without torch's compiler, whose import took 2 of the 5 seconds before a first step.

torch's optimizers import it at the first call of each method, to exclude that method from compiled code; twostage
compiles none.
"""

import inspect

import torch
from torch.optim import AdamW, Optimizer

__all__ = ["EagerAdamW"]


class EagerAdamW(AdamW):
    """torch's AdamW with the same updates; they cannot be differentiated."""

    step = torch.no_grad()(inspect.unwrap(AdamW.step))


for _method in (Optimizer.add_param_group, Optimizer.zero_grad, Optimizer.state_dict, Optimizer.load_state_dict):
    if _plain := getattr(_method, "__wrapped__", None):
        vars(_plain).setdefault("__dynamo_disable", _plain)
