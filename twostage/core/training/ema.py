"""Exponential moving average of the weights, which validation measures and inference loads."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

__all__ = ["averaged_copy"]


def averaged_copy(model: nn.Module, decay: float) -> AveragedModel:
    """An :class:`AveragedModel` whose ``update_parameters(model)`` keeps the average; buffers are copied.

    The decay warms up as (1 + t) / (10 + t) until it reaches ``decay`` (as TensorFlow's ExponentialMovingAverage does),
    so that the first weights do not hold back a short run.
    """

    @torch.no_grad()
    def update(averaged: Any, current: Any, num_averaged: Tensor | int) -> None:
        count = float(num_averaged)
        get_ema_multi_avg_fn(min(decay, (1 + count) / (10 + count)))(averaged, current, num_averaged)

    return AveragedModel(model, multi_avg_fn=update)
