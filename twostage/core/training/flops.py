"""Count the floating-point operations of real steps; a file of its own because torch's counter imports Triton."""

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.module_tracker import ModuleTracker

from twostage.core.machine.onednn import FLOP_FORMULAS

__all__ = ["count_flops"]

aten = torch.ops.aten
# Operators that torch counts on a GPU, but not yet on a CPU.
CPU_FLOPS = FLOP_FORMULAS | {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v)
    ),
}


class _NoModules(ModuleTracker):
    """Replaces the hooks that count FLOPs by module: they cannot follow a step that calls autograd.grad."""

    def __enter__(self) -> "_NoModules":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def count_flops() -> FlopCounterMode:
    """A context whose `get_total_flops()` counts its matrix products, convolutions and attention."""
    counter = FlopCounterMode(display=False, custom_mapping=CPU_FLOPS)
    counter.mod_tracker = _NoModules()
    return counter
