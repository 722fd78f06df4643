"""Linear layers by the fastest products that a CPU has, in sampling and in training."""

import warnings
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stage2_prior.sampling_config import Weights
from twostage.core.errors import InputError
from twostage.core.machine.onednn import add_product, has_bfloat16, has_onednn, pack, product

__all__ = ["Linear", "TrainedLinear", "check_weights", "fast_linear", "linear"]

MIN_PACKED = 2**16
"""Minimum number of a layer's weights: below it, calling oneDNN (10 us) costs more time than it saves."""
LEVELS = 63
"""The largest magnitude of an int8 product's inputs. With 127, processors without VNNI overflow their int16 sums."""


class Linear(Protocol):
    """A product with constant weights, (R, in_features) -> (R, out_features)."""

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """The product of ``x``, plus ``added`` of the result's shape."""
        ...


# --- sampling --------------------------------------------------------------------------------------------------------


def fast_linear(weight: Tensor, bias: Tensor | None, weights: Weights = "float32", *, gelu: bool = False) -> Linear:
    """``F.linear`` for inference. The weights are read now, so later changes to them have no effect.

    Args:
        weights: the precision of the weights (out_features, in_features). `float32`: unchanged; the result equals that
            of ``F.linear`` up to rounding. `bfloat16`: weights and inputs are rounded. `int8`: one scale for each
            output, and inputs of 7 bits with one scale for each row, so that no row depends on another. Inputs and
            results are always float32.
        gelu: whether to apply GELU (its tanh form) to the result.

    Raises:
        InputError: see :func:`check_weights`.
    """
    check_weights(weights, weight.device)
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    match weights:
        case "float32" if has_onednn(weight) and weight.numel() >= MIN_PACKED:
            return _packed(weight, bias, gelu)
        case "float32":
            return _plain(weight, bias, gelu)
        case "bfloat16":
            return _bfloat16(weight, bias, gelu)
        case "int8":
            return _int8(weight, bias, gelu)


def check_weights(weights: Weights, device: torch.device) -> None:
    """Refuses a precision for which this torch or this device has no products.

    Raises:
        InputError: names what to use instead.
    """
    if device.type == "cuda":
        if weights == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise InputError("weights 'bfloat16': this GPU only emulates bfloat16. Use float32")
        if weights == "int8":
            raise InputError("weights 'int8': only works on a CPU. Use bfloat16 or float32")
        return
    if weights != "float32" and device.type != "cpu":
        raise InputError(
            f"weights {weights!r}: needs a CPU or a CUDA device, but this prior is on {device.type}. Use float32"
        )
    if weights == "bfloat16" and not has_bfloat16():
        raise InputError(
            "weights 'bfloat16': this torch or this processor has no fast products in bfloat16. Use float32 or int8"
        )
    if weights == "int8" and (
        "fbgemm" not in torch.backends.quantized.supported_engines
        or not hasattr(torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32")
    ):
        raise InputError("weights 'int8': this torch has no products with int8 weights. Use float32 or bfloat16")


def _activated(y: Tensor, gelu: bool) -> Tensor:
    return F.gelu(y, approximate="tanh") if gelu else y


def _plain(weight: Tensor, bias: Tensor | None, gelu: bool) -> Linear:
    def multiply(x: Tensor, added: Tensor | None = None) -> Tensor:
        y = _activated(F.linear(x, weight, bias), gelu)
        return y if added is None else added + y

    return multiply


def _packed(weight: Tensor, bias: Tensor | None, gelu: bool) -> Linear:
    packed = pack(weight)

    def multiply(x: Tensor, added: Tensor | None = None) -> Tensor:
        return product(x, packed, bias, gelu) if added is None else add_product(added, x, packed, bias)

    return multiply


def _bfloat16(weight: Tensor, bias: Tensor | None, gelu: bool) -> Linear:
    form = _packed if weight.device.type == "cpu" else _plain
    packed = form(weight.bfloat16(), None if bias is None else bias.bfloat16(), gelu)

    def multiply(x: Tensor, added: Tensor | None = None) -> Tensor:
        y = packed(x.bfloat16())
        return y.float() if added is None else added + y

    return multiply


def _int8(weight: Tensor, bias: Tensor | None, gelu: bool) -> Linear:
    # torch's own dynamic product (`quantized.linear_dynamic`) has one scale for all rows, so an image would depend on
    # the others in its batch. For rows whose largest magnitude is 1 the scale is a constant, and sums are exact.
    quantized_product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
    scales = weight.abs().amax(1).double().clamp_(min=torch.finfo(torch.float32).tiny) / 127
    with warnings.catch_warnings():  # torch will remove quantized tensors; then `check_weights` refuses int8
        warnings.simplefilter("ignore", UserWarning)
        quantized = torch.quantize_per_channel(weight, scales, torch.zeros(len(scales)).long(), 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(quantized, None)

    def multiply(x: Tensor, added: Tensor | None = None) -> Tensor:
        # For many rows, `vector_norm` and `addcmul` would take several times as long. A row of zeros becomes NaN here,
        # which is some integer in the product, and then zero again.
        largest = x.abs().amax(1, keepdim=True)  # (R, 1)
        y = quantized_product(x / largest, 1 / LEVELS, LEVELS + 1, packed).mul_(largest)
        y = _activated(y if bias is None else y.add_(bias), gelu)
        return y if added is None else y.add_(added)

    return multiply


# --- training --------------------------------------------------------------------------------------------------------


class TrainedLinear(nn.Linear):
    """``nn.Linear`` by :func:`linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``, (..., in_features) -> (..., out_features), by oneDNN in float32 on a CPU, forward and backward.

    `F.conv2d` with 1x1 kernels also calls oneDNN, but torch computes small batches of it in a single thread.
    """
    if has_onednn(x) and weight.numel() >= MIN_PACKED and not torch.is_autocast_enabled("cpu"):
        return cast(Tensor, _OneDNNLinear.apply(x, weight, bias))
    return F.linear(x, weight, bias)


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, len(weight))  # (R, out_features)
        inputs = x.reshape(-1, weight.shape[1])  # (R, in_features)
        wanted_x, wanted_weight, wanted_bias = ctx.needs_input_grad
        return (
            product(gradient, weight.T, None) if wanted_x else None,
            product(rows.T, inputs.T, None) if wanted_weight else None,
            rows.sum(0) if wanted_bias else None,
        )
