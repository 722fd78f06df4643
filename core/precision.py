"""`mixed_precision: auto`: decided by measuring this machine, because processor names do not tell."""

import time
from typing import Literal

import torch

__all__ = ["MixedPrecision", "fastest_precision"]

MixedPrecision = Literal["auto", "no", "bf16", "fp16"]


def fastest_precision(device: torch.device) -> Literal["no", "bf16"]:
    """`bf16` where a matrix product in it takes less than two thirds of float32's time, else `no` (about 50 ms)."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    if device.type != "cpu":
        return "no"
    return "bf16" if _seconds(torch.bfloat16) < _seconds(torch.float32) * 2 / 3 else "no"


def _seconds(dtype: torch.dtype) -> float:
    x, weight = torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - start)
    return best
