"""Fully sharded data parallel (torch's FSDP2): each process keeps a share of every weight, gradient, optimizer state
and average, and has whole weights only of the block that it works on. What is written to disk is whole all the same.

An accelerate file asks for it (`configs/accelerate/fsdp_8.yaml`); Accelerate's own FSDP is left out, because it takes
one model only (not its average) and on CPUs silently does something else (accelerate 1.15).
"""

from collections.abc import Mapping

import torch
from accelerate import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from twostage.core.errors import InputError
from twostage.core.machine.launch import check_flags
from twostage.core.machine.precision import MixedPrecision

__all__ = ["shard", "share_like", "units_to_shard", "whole"]


UNSUPPORTED = ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
"""What Accelerate can be asked for by a variable, and would fail at, or train one model of two with."""


def units_to_shard(shardable: bool) -> list[str]:
    """The names of the classes whose modules the launch file wants to be worked on one at a time; [] without FSDP.

    Args:
        shardable: whether this training can be done with FSDP.

    Raises:
        InputError: DeepSpeed and its like; FSDP for a training that is not shardable, or with settings that are not
            supported.
    """
    check_flags()
    for kind in UNSUPPORTED:
        if parse_flag_from_env(f"ACCELERATE_USE_{kind}"):
            raise InputError(
                f"the launch asks for {kind} (ACCELERATE_USE_{kind}), which no training here supports; launch with "
                "configs/accelerate/gpu_8.yaml, or fsdp_8.yaml for a prior that does not fit one GPU"
            )
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return []
    if not shardable:
        raise InputError(
            "distributed_type FSDP: only priors that are transformers can be trained with it; launch this training "
            "with configs/accelerate/gpu_8.yaml, which keeps a whole model on each GPU"
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
        asked = "; ".join(setting for setting, is_wrong in wrong.items() if is_wrong)
        raise InputError(f"fsdp_config of the accelerate file: {asked}; see configs/accelerate/fsdp_8.yaml")
    return names


def shard(model: nn.Module, units: list[str], precision: MixedPrecision, *methods: str) -> None:
    """Shares the weights of ``model`` out among the processes, in place; before its optimizer is made.

    Under bf16 the shares stay float32, as do sums of gradients; all that is computed is computed in bfloat16.
    (Autocast would keep a bfloat16 copy of all the weights until the backward pass is over.)

    Args:
        units: names of the classes whose modules are gathered one at a time.
        methods: that may be called from outside beside ``forward``. Every process must call them equally often.

    Raises:
        InputError: no such module in ``model``.
    """
    state = PartialState()
    assert state.device is not None
    mesh = init_device_mesh(state.device.type, (state.num_processes,))
    policy = MixedPrecisionPolicy(torch.bfloat16 if precision == "bf16" else None, reduce_dtype=torch.float32)
    parts = [module for module in model.modules() if type(module).__name__ in units]
    if not parts:
        raise InputError(f"fsdp_transformer_layer_cls_to_wrap: no {' or '.join(units)} in this model; use Block")
    for module in [*parts, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for method in methods:
        register_fsdp_forward_method(model, method)


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with those that are shared out gathered on the CPU of the main process; {} in the others.

    Called by every process, with the same names; one tensor at a time is whole on a device.
    """
    kept, is_main = {}, PartialState().is_main_process
    for name, tensor in tensors.items():
        gathered = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
        if is_main:
            kept[name] = gathered
    return kept


def share_like(tensor: Tensor, own: Tensor) -> Tensor:
    """This process's share of a whole ``tensor``, which every process has, where ``own`` is shared out; else itself."""
    if not isinstance(own, DTensor):
        return tensor
    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
