"""The optimizer of both trainings."""

import torch
from torch import nn
from torch.optim import Optimizer

from twostage.core.training.train_config import TrainConfig

__all__ = ["FUSED", "make_optimizer"]

FUSED = ("cpu", "cuda")
"""Devices whose optimizer updates all weights at once, and can be told on the device to leave an update out."""


def make_optimizer(
    model: nn.Module, train: TrainConfig, *, lr: float | None = None, betas: tuple[float, float] | None = None
) -> Optimizer:
    """AdamW over the trainable weights of ``model``; biases, gains and embeddings of one dimension are not decayed.

    Args:
        lr: of a second network; None: `train.lr`. Both follow the same schedule.
        betas: likewise.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if train.weight_decay:
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": train.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
    else:
        groups = [{"params": trained, "weight_decay": 0.0}]
    for group in groups:
        group["initial_lr"] = lr or train.lr
    fused = trained[0].device.type in FUSED
    return torch.optim.AdamW(groups, lr=lr or train.lr, betas=betas or train.betas, fused=fused)
