"""`mixed_precision: auto`: chosen by what the processor and torch support, so that it is the same in every run."""

from typing import Literal

import torch

__all__ = ["MixedPrecision", "reason_for_precision", "state_float32"]

MixedPrecision = Literal["auto", "no", "bf16", "fp16"]


def reason_for_precision(device: torch.device, fully_connected: bool = False) -> tuple[Literal["no", "bf16"], str]:
    """`bf16` if the device is faster with it than with float32, else `no`; and why (measured in docs/scaling.md).

    Args:
        fully_connected: whether the network only has fully connected layers, which do not gain from bf16 on a CPU.
    """
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "the GPU has bf16"
        return "no", "the GPU only emulates bf16"
    if device.type != "cpu":
        return "no", f"bf16 was not measured on {device.type}"
    if not torch.backends.mkldnn.is_available():
        return "no", "this build of torch lacks oneDNN, which bf16 needs"
    if fully_connected:
        return "no", "fully connected networks are not faster in bf16 on a CPU"
    processor = torch.cpu.get_capabilities()
    if processor.get("amx_tile") and processor.get("amx_bf16"):
        return "bf16", "the processor has AMX"
    # On Intel processors, these instructions alone are slower than float32.
    if processor.get("avx512_bf16") and "AMD" in processor.get("cpu_name", ""):
        return "bf16", "the processor is from AMD and has AVX512-BF16"
    return "no", "the processor has no AMX and is not an AMD one with AVX512-BF16"


def state_float32() -> None:
    """On NVIDIA GPUs, float32 matrix products are exact float32, because the nearest codes depend on their last bits;
    convolutions use TF32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = True
