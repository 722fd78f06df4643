"""Fully sharded data parallel (torch's FSDP2): each process keeps a share of every weight, gradient, optimizer state
and average, and holds full weights only for the block that it is working on. Files on disk hold full tensors.

An accelerate file asks for it (`configs/accelerate/fsdp_8.yaml`). Accelerate's own FSDP is not used: it takes only one
model (not its average), and silently does something else on CPUs (accelerate 1.15).
"""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from accelerate import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import Tensor, nn

from twostage.core.errors import InputError
from twostage.core.machine.launch import check_flags
from twostage.core.machine.precision import MixedPrecision

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["full_tensors", "is_sharded", "shard", "share_like", "units_to_shard"]

UNSUPPORTED = ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
"""Accelerate's other engines: with these variables it would fail, or train only one of two models."""


def units_to_shard(shardable: bool) -> list[str]:
    """The class names of the modules that FSDP gathers one at a time, from the launch file; [] without FSDP.

    Args:
        shardable: whether this training supports FSDP.

    Raises:
        InputError: DeepSpeed or another engine, FSDP for a training that does not support it, or unsupported settings.
    """
    check_flags()
    for kind in UNSUPPORTED:
        if parse_flag_from_env(f"ACCELERATE_USE_{kind}"):
            raise InputError(
                f"ACCELERATE_USE_{kind}: twostage does not support {kind}. Launch with configs/accelerate/gpu_8.yaml, "
                "or with fsdp_8.yaml for a prior that does not fit on one GPU"
            )
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return []
    if not shardable:
        raise InputError(
            "distributed_type FSDP: only works for transformer priors. Launch this training with "
            "configs/accelerate/gpu_8.yaml, which keeps a full model on each GPU"
        )
    plugin = FullyShardedDataParallelPlugin()
    names = plugin.transformer_cls_names_to_wrap or []
    wrong = {
        "fsdp_version must be 2": plugin.fsdp_version != 2,
        "fsdp_auto_wrap_policy must be TRANSFORMER_BASED_WRAP with fsdp_transformer_layer_cls_to_wrap": not names,
        "fsdp_reshard_after_forward must be true": plugin.reshard_after_forward is not True,
        "fsdp_offload_params must be false": parse_flag_from_env("FSDP_OFFLOAD_PARAMS"),
        "fsdp_activation_checkpointing must be false": plugin.activation_checkpointing,
    }
    if any(wrong.values()):
        settings = "; ".join(setting for setting, is_wrong in wrong.items() if is_wrong)
        raise InputError(f"fsdp_config in the accelerate file: {settings}. See configs/accelerate/fsdp_8.yaml")
    return names


def shard(model: nn.Module, units: Sequence[str], precision: MixedPrecision, *methods: str) -> None:
    """Shards the weights of ``model`` over the processes, in place; call it before making the optimizer.

    With bf16, everything is computed in bfloat16, but shares and sums of gradients stay float32. (Autocast would keep a
    bfloat16 copy of all weights until the end of the backward pass.)

    Args:
        units: class names of the modules that are gathered one at a time.
        methods: methods besides ``forward`` that other code calls; every process must call them equally often.

    Raises:
        InputError: ``model`` has no such module.
    """
    from torch.distributed.device_mesh import init_device_mesh  # these three are slow to import
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    state = PartialState()
    assert state.device is not None
    mesh = init_device_mesh(state.device.type, (state.num_processes,))
    policy = MixedPrecisionPolicy(torch.bfloat16 if precision == "bf16" else None, reduce_dtype=torch.float32)
    parts = [module for module in model.modules() if type(module).__name__ in units]
    if not parts:
        raise InputError(f"fsdp_transformer_layer_cls_to_wrap: this model has no {' or '.join(units)}. Set it to Block")
    for module in [*parts, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for method in methods:
        register_fsdp_forward_method(model, method)


def is_sharded(tensor: Any) -> "TypeGuard[DTensor]":
    """Whether ``tensor`` is this process's share of a larger one."""
    module = sys.modules.get("torch.distributed.tensor")  # importing it takes half a second
    return module is not None and isinstance(tensor, module.DTensor)


def full_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with shards gathered on the CPU of the main process; {} in other processes.

    Every process calls it with the same names; only one tensor at a time is gathered on a device.
    """
    full, is_main = {}, PartialState().is_main_process
    for name, tensor in tensors.items():
        gathered = tensor.full_tensor().cpu() if is_sharded(tensor) else tensor
        if is_main:
            full[name] = gathered
    return full


def share_like(tensor: Tensor, own: Tensor) -> Tensor:
    """This process's share of a full ``tensor`` if ``own`` is sharded, else ``tensor`` itself."""
    if not is_sharded(own):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
