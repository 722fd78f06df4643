"""Matrix products of sampling, by whichever of this machine's libraries is faster.

torch's float32 `F.linear` takes MKL, which runs at half the speed of oneDNN on AMD processors and has no notion of
weights that stay the same; oneDNN takes them packed once. Which one wins is measured, not guessed.
"""

import time
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Linear", "fast_linear"]

Linear = Callable[[Tensor], Tensor]
WORTH_IT = 1.2  # packing costs a copy of the weights


def fast_linear(layer: nn.Linear, rows: int) -> Linear:
    """A function equal to ``layer`` (to float32 rounding) for inputs of (rows, in_features) at inference."""
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    if _packing_wins(*weight.shape, rows, weight.dtype, weight.device, torch.get_num_threads()):
        return _packed(weight, bias)
    return lambda x: F.linear(x, weight, bias)


def _packed(weight: Tensor, bias: Tensor | None) -> Linear:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    product = torch.ops.mkldnn._linear_pointwise
    return lambda x: product(x, packed, bias, "none", [], "")


@lru_cache
def _packing_wins(outputs: int, inputs: int, rows: int, dtype: torch.dtype, device: torch.device, threads: int) -> bool:
    available = hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    if device.type != "cpu" or dtype != torch.float32 or not torch.backends.mkldnn.is_available() or not available:
        return False
    weight, x = torch.ones(outputs, inputs), torch.ones(rows, inputs)
    return _seconds(lambda x: F.linear(x, weight), x) > WORTH_IT * _seconds(_packed(weight, None), x)


def _seconds(product: Linear, x: Tensor) -> float:
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        product(x)
        best = min(best, time.perf_counter() - start)
    return best
