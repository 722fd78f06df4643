"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): the update of a matrix is its gradient with
momentum, made orthogonal, so that all its directions are learned equally fast. Other weights are updated by AdamW.

torch's own Muon (`torch.optim.Muon`) takes one matrix at a time and no convolutions. Here matrices of the same shape
are made orthogonal together, which takes a fraction of the time, and a convolution's kernel is a matrix (out, in x
height x width), that of a transposed convolution (in, out x height x width).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from twostage.core.training.eager_adamw import EagerAdamW

__all__ = ["Muon", "hidden_matrices", "orthogonalized"]

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""A step of the iteration maps each singular value s to a s + b s^3 + c s^5 (Jordan's choice)."""
ITERATIONS = 5
RMS = 0.2
"""The root mean square of an update of AdamW, which updates are scaled to, so that both share a learning rate and a
weight decay (Liu et al. 2025, arXiv 2502.16982)."""
MIN_CHANNELS = 8
"""Layers with fewer input or output channels are left to AdamW. Most of them read or write an image."""


class Muon(EagerAdamW):
    """Muon for the parameter groups that have ``matrices=True``, AdamW for the others.

    Args:
        groups: parameter groups as for AdamW.
        dtype: the precision in which matrices are made orthogonal. bfloat16 is precise enough.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], dtype: torch.dtype, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates all weights that have a gradient. Matrices have none afterwards."""
        for group in self.param_groups:
            if not group.get("matrices"):
                continue
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                self._update(group, weights, getattr(self, "found_inf", None))
            for weight in weights:
                weight.grad = None  # AdamW passes over weights without a gradient
        return super().step(closure)

    def _update(self, group: dict[str, Any], weights: list[Tensor], found_inf: Tensor | None) -> None:
        """Updates ``weights``, unless ``found_inf`` is 1, see `check_gradient`; then it changes nothing. The device
        decides that by itself, so that nothing waits for it."""
        share: Tensor | float = 1.0 if found_inf is None else 1 - found_inf
        ahead = []
        for weight in weights:
            gradient, state = weight.grad, self.state[weight]
            assert gradient is not None
            if found_inf is not None:
                gradient = torch.where(found_inf > 0, 0.0, gradient)
            if not state:
                state["momentum"] = torch.zeros_like(weight)
            momentum = state["momentum"].lerp_(gradient, (1 - MOMENTUM) * share)
            ahead.append(gradient.lerp(momentum, MOMENTUM).flatten(1))  # Nesterov's
        for weight, update in zip(weights, orthogonalized(ahead, self.dtype), strict=True):
            weight.mul_(1 - share * group["lr"] * group["weight_decay"])
            weight.sub_(update.view_as(weight) * (share * group["lr"] * RMS * max(update.shape) ** 0.5))


def orthogonalized(matrices: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The matrices with their singular values set to about 1, by a Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, matrix in enumerate(matrices):
        by_shape.setdefault(tuple(sorted(matrix.shape)), []).append(i)
    results = list(matrices)
    for members in by_shape.values():
        is_tall = [matrices[i].shape[0] > matrices[i].shape[1] for i in members]
        wide = [matrices[i].T if tall else matrices[i] for i, tall in zip(members, is_tall, strict=True)]
        x = torch.stack(wide)  # (matrices, short side, long side)
        x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
        for _ in range(ITERATIONS):
            square = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
        for i, tall, result in zip(members, is_tall, x.float(), strict=True):
            results[i] = result.T if tall else result
    return results


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """The weights that Muon updates: those of linear layers and convolutions with at least `MIN_CHANNELS` inputs and
    outputs.

    A module names other layers that it wants to leave to AdamW, such as its head, in ``adamw_layers``.
    """
    left_out = {getattr(module, name) for module in model.modules() for name in getattr(module, "adamw_layers", ())}
    weights: list[Tensor] = [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d) and module not in left_out
    ]
    inner = [weight for weight in weights if weight.requires_grad and min(weight.shape[:2]) >= MIN_CHANNELS]
    return list(dict.fromkeys(inner))
