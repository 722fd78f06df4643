"""Matrix products by oneDNN on a CPU. torch offers them as private operators only; no other module calls those.

In float32, `F.linear` calls MKL, which reaches 0.5 to 0.9 of oneDNN's speed on AMD processors and cannot pack weights
that stay the same. Which library is used depends on device, type and shape only and is never measured: a resumed run
must round as before, and an image must not depend on a clock.
"""

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["AVAILABLE", "FLOP_FORMULAS", "add_product", "has_bfloat16", "has_onednn", "pack", "product"]

_ops: Any = torch.ops.mkldnn
AVAILABLE = torch.backends.mkldnn.is_available() and all(
    hasattr(_ops, name) for name in ("_linear_pointwise", "_reorder_linear_weight")
)
"""Whether this torch has oneDNN's products."""
FLOP_FORMULAS: dict[Any, Any] = {}
"""The FLOPs of these operators, for torch's `FlopCounterMode`, which does not know them."""
if AVAILABLE:
    _product, _add_product = _ops._linear_pointwise.default, _ops._linear_pointwise.binary
    FLOP_FORMULAS[_ops._linear_pointwise] = lambda x, *_, out_shape=(), **__: 2 * math.prod(x) * out_shape[-1]


def has_onednn(x: Tensor) -> bool:
    """Whether oneDNN can multiply ``x``: float32 on a CPU."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and AVAILABLE


def has_bfloat16() -> bool:
    """Whether this processor has fast products in bfloat16."""
    return AVAILABLE and _ops._is_mkldnn_bf16_supported()


def pack(weight: Tensor) -> Tensor:
    """A weight (out_features, in_features) in oneDNN's fastest layout, which only the functions below can read."""
    return _ops._reorder_linear_weight(weight)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """``F.linear(x, weight, bias)``, then GELU in its tanh form if asked for."""
    activation, form = ("gelu", "tanh") if gelu else ("none", "")
    return _product(x, weight, bias, activation, [], form)


def add_product(added: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``added + F.linear(x, weight, bias)``."""
    return _add_product(x, added, weight, bias, "add")
