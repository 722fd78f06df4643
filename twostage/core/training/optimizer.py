"""A network together with its optimizer and the average of its weights; its gradients are checked and clipped."""

from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from twostage.core.errors import InputError
from twostage.core.machine.sharding import is_sharded, shard
from twostage.core.training.eager_adamw import EagerAdamW
from twostage.core.training.muon import Muon, hidden_matrices
from twostage.core.training.train_config import TrainConfig

__all__ = ["FUSED_DEVICES", "AveragedCopy", "Restarting", "TrainedNetwork", "check_gradient", "make_optimizer"]

FUSED_DEVICES = ("cpu", "cuda")
"""Devices whose optimizer updates all weights at once, and can skip an update by a flag on the device."""
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def make_optimizer(
    model: nn.Module,
    train: TrainConfig,
    *,
    lr: float | None = None,
    betas: tuple[float, float] | None = None,
    muon: bool = False,
) -> Optimizer:
    """AdamW over the trainable weights of ``model``; those with one dimension, such as biases and gains, do not decay.

    Args:
        lr: for a second network; None: `train.lr`. Both follow the same schedule.
        betas: for a second network; None: `train.betas`.
        muon: whether Muon updates the matrices, see `hidden_matrices`.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    decay = train.weight_decay
    if decay:
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": decay},
            {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
        ]
    else:
        groups = [{"params": trainable, "weight_decay": 0.0}]
    fused = trainable[0].device.type in FUSED_DEVICES
    settings: dict[str, Any] = {"lr": lr or train.lr, "betas": betas or train.betas, "fused": fused}
    if muon:
        matrices = hidden_matrices(model)
        of_muon = set(matrices)
        groups = [group | {"params": [p for p in group["params"] if p not in of_muon]} for group in groups]
        groups.append({"params": matrices, "weight_decay": decay, "matrices": True})
        dtype = torch.bfloat16 if train.mixed_precision == "bf16" else torch.float32
        optimizer: Optimizer = Muon(groups, dtype, **settings)
    else:
        optimizer = EagerAdamW(groups, **settings)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def check_gradient(net: nn.Module, optimizer: Optimizer, accelerator: Accelerator, train: TrainConfig) -> Tensor:
    """The norm of the gradient of ``net``, which is then clipped to `train.max_grad_norm`; called before each update.

    If the norm is not finite and `train.on_not_finite` is `skip`, ``optimizer`` skips the update.
    """
    # Accelerate's own clipping would also remove fp16's scale from the gradients of other optimizers.
    accelerator.unscale_gradients(optimizer)
    norm = get_total_norm([p.grad for p in net.parameters() if p.grad is not None])
    if train.max_grad_norm:
        clip_grads_with_norm_(net.parameters(), train.max_grad_norm, norm)
    norm = norm.full_tensor() if is_sharded(norm) else norm
    if accelerator.scaler is not None:  # it skips such updates by itself, and lowers fp16's scale
        return norm.nan_to_num(0.0, 0.0, 0.0)
    if train.on_not_finite == "skip":
        # torch's GradScaler sets the same flag on a fused optimizer. The gradient is the same in all processes.
        inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
        inner.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
    return norm


@runtime_checkable
class Restarting(Protocol):
    """A module that sometimes replaces weights by unrelated ones, so that an average of both would be neither."""

    def restart_like(self, current: Any) -> None:
        """Replaces the weights that the last update of ``current``, the same module, has replaced."""


class AveragedCopy(AveragedModel, Generic[ModuleT]):
    """A copy of a model, ``module``, with the moving average (EMA) of its weights. Call ``update_parameters(model)``
    after each update; buffers are copied, and a :class:`Restarting` module restarts with the model's.

    The decay warms up as (1 + t) / (10 + t) until it reaches ``decay`` (as TensorFlow's ExponentialMovingAverage does),
    so that the first weights do not hold back a short run.
    """

    module: ModuleT

    def __init__(self, model: ModuleT, decay: float) -> None:
        super().__init__(model, multi_avg_fn=self._average)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Averages in the weights of ``model``."""
        for averaged, current in zip(self.module.modules(), model.modules(), strict=True):
            if isinstance(averaged, Restarting):
                averaged.restart_like(current)
        super().update_parameters(model)

    @torch.no_grad()
    def _average(self, weights: Any, current: Any, num_averaged: Tensor | int) -> None:
        # This number is on the CPU; `num_averaged` is a copy of it on a GPU, which would have to be awaited.
        count = int(self.n_averaged)
        get_ema_multi_avg_fn(min(self.decay, (1 + count) / (10 + count)))(weights, current, num_averaged)


class TrainedNetwork(Generic[ModuleT]):
    """A network, the average of its weights, and its optimizer, as Accelerate or FSDP wraps them.

    Args:
        name: `model`, or the name of a second network, which prefixes its optimizer's checkpoint and its metrics.
        muon: whether Muon updates the matrices if `train.optimizer` is `muon`; otherwise AdamW updates all weights.
        ema_decay: None: no average.
        units_to_shard: class names for FSDP; none: no FSDP.
        sharded_methods: see :func:`twostage.core.machine.sharding.shard`.
        lr: None: `train.lr`.
        betas: None: `train.betas`.

    Raises:
        InputError: Muon with FSDP.
    """

    def __init__(
        self,
        module: ModuleT,
        train: TrainConfig,
        accelerator: Accelerator,
        *,
        name: str = "model",
        muon: bool = True,
        ema_decay: float | None = None,
        units_to_shard: Sequence[str] = (),
        sharded_methods: Sequence[str] = (),
        lr: float | None = None,
        betas: tuple[float, float] | None = None,
    ) -> None:
        self.module, self.name = module, name
        self.prefix = "" if name == "model" else f"{name}_"
        self.averaged = AveragedCopy(module, ema_decay) if ema_decay else None
        self.final: ModuleT = self.averaged.module if self.averaged else module
        """The averaged weights, if there are any: validation measures them, and inference loads them."""
        muon = muon and train.optimizer == "muon"
        if units_to_shard:
            if muon:
                raise InputError(
                    "train.optimizer 'muon': needs whole matrices, and FSDP shares them out among the processes. Set "
                    "train.optimizer=adamw and a lower train.lr, such as 1e-3, or launch with "
                    "configs/accelerate/gpu_8.yaml"
                )
            for each in dict.fromkeys((module, self.final)):
                shard(each, units_to_shard, train.mixed_precision, *sharded_methods)
        self.optimizer = make_optimizer(module, train, lr=lr, betas=betas, muon=muon)
        # Without `device_placement`, Accelerate imports torch's DTensor, which takes 0.7 seconds.
        self.wrapped: nn.Module = module if units_to_shard else accelerator.prepare(module, device_placement=[True])
        """The module that training calls."""
        self.wrapped_optimizer: Optimizer = accelerator.prepare(self.optimizer)

    def update_average(self) -> None:
        """Averages in the weights of a finished update."""
        if self.averaged:
            self.averaged.update_parameters(self.module)

    def restart_average(self) -> None:
        """Sets the average to the current weights."""
        if self.averaged:
            self.averaged.module.load_state_dict(self.module.state_dict())
