"""A network's optimizer, and what Accelerate makes of the two."""

from typing import Generic, TypeVar

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from twostage.core.training.train_config import TrainConfig

__all__ = ["FUSED_DEVICES", "TrainedNetwork", "make_optimizer"]

FUSED_DEVICES = ("cpu", "cuda")
"""Devices whose optimizer updates all weights at once, and can skip an update by a flag on the device."""
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def make_optimizer(
    model: nn.Module, train: TrainConfig, *, lr: float | None = None, betas: tuple[float, float] | None = None
) -> Optimizer:
    """AdamW over the trainable weights of ``model``; biases, gains and one-dimensional embeddings do not decay.

    Args:
        lr: for a second network; None: `train.lr`. Both follow the same schedule.
        betas: for a second network; None: `train.betas`.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if train.weight_decay:
        groups = [
            {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": train.weight_decay},
            {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
        ]
    else:
        groups = [{"params": trainable, "weight_decay": 0.0}]
    for group in groups:
        group["initial_lr"] = lr or train.lr
    fused = trainable[0].device.type in FUSED_DEVICES
    return torch.optim.AdamW(groups, lr=lr or train.lr, betas=betas or train.betas, fused=fused)


class TrainedNetwork(Generic[ModuleT]):
    """A network and its optimizer, each also as Accelerate wraps it.

    Args:
        name: `model`, or a second network's name, which then prefixes its optimizer's checkpoint and its metrics.
        is_sharded: FSDP has wrapped the module already.
        lr: None: `train.lr`.
        betas: None: `train.betas`.
    """

    def __init__(
        self,
        module: ModuleT,
        train: TrainConfig,
        accelerator: Accelerator,
        *,
        name: str = "model",
        is_sharded: bool = False,
        lr: float | None = None,
        betas: tuple[float, float] | None = None,
    ) -> None:
        self.module, self.name = module, name
        self.prefix = "" if name == "model" else f"{name}_"
        self.optimizer = make_optimizer(module, train, lr=lr, betas=betas)
        self.wrapped: nn.Module = module if is_sharded else accelerator.prepare(module)
        self.wrapped_optimizer: Optimizer = accelerator.prepare(self.optimizer)
