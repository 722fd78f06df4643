"""Matrix products by the faster of two libraries, in sampling and in training.

torch's float32 `F.linear` takes MKL, which on AMD processors was measured at 0.5 to 0.9 of oneDNN's speed and has no
notion of weights that stay the same; oneDNN takes them packed once. Which one is taken follows from device, type and
shape alone and is never measured: a restarted run has to round as the first one did, and image i of a seed must not
hang on a clock.
"""

import warnings
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stage2_prior.sampling import Weights
from twostage.core.errors import InputError

__all__ = ["Linear", "TrainedLinear", "check_weights", "fast_linear", "linear"]

WORTH_PACKING = 2**16  # weights; a call of oneDNN costs 10 us more, which products with fewer do not win back
LEVELS = 63  # of an int8 product's inputs on each side of 0: with 127, processors without VNNI overflow int16 sums


class Linear(Protocol):
    """A product with constant weights, (R, in_features) -> (R, out_features)."""

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """The product of ``x``, plus ``added`` of the result's shape."""
        ...


# --- sampling --------------------------------------------------------------------------------------------------------


def fast_linear(weight: Tensor, bias: Tensor | None, weights: Weights = "float32", *, gelu: bool = False) -> Linear:
    """``F.linear`` for inference, its weights read now.

    Args:
        weights: what (out_features, in_features) weights are rounded to. `float32`: not at all, the result is equal to
            that of ``F.linear`` but for rounding. `bfloat16`: as are the inputs. `int8`: one scale for each output, and
            the inputs to 7 bits with one scale for each row, so that no row depends on another. Inputs and results
            are float32 always.
        gelu: whether the result goes through GELU (its tanh form).

    Raises:
        InputError: this torch has no products with such weights.
    """
    check_weights(weights)
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    match weights:
        case "float32" if has_onednn(weight) and weight.numel() >= WORTH_PACKING:
            return _packed(weight, bias, gelu)
        case "float32":
            return _plain(weight, bias, gelu)
        case "bfloat16":
            return _bfloat16(weight, bias, gelu)
        case "int8":
            return _int8(weight, bias, gelu)


def check_weights(weights: Weights) -> None:
    """Refuses weights that this torch or this processor has no products with.

    Raises:
        InputError: it says what there is instead.
    """
    if weights == "bfloat16" and not (_has_pointwise() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        raise InputError(
            "weights 'bfloat16': this torch or this processor has no fast products in bfloat16; use float32 or int8"
        )
    if weights == "int8" and (
        "fbgemm" not in torch.backends.quantized.supported_engines
        or not hasattr(torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32")
    ):
        raise InputError("weights 'int8': this torch has no products with int8 weights; use float32 or bfloat16")


def has_onednn(weight: Tensor) -> bool:
    """Whether oneDNN's products can be taken for ``weight``: in float32, on a CPU."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and _has_pointwise()


def _has_pointwise() -> bool:
    names = ("_linear_pointwise", "_reorder_linear_weight")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


def _activated(y: Tensor, gelu: bool) -> Tensor:
    return F.gelu(y, approximate="tanh") if gelu else y


def _plain(weight: Tensor, bias: Tensor | None, gelu: bool) -> Linear:
    def product(x: Tensor, added: Tensor | None = None) -> Tensor:
        y = _activated(F.linear(x, weight, bias), gelu)
        return y if added is None else added + y

    return product


def _packed(weight: Tensor, bias: Tensor | None, gelu: bool) -> Linear:
    unary, binary = torch.ops.mkldnn._linear_pointwise.default, torch.ops.mkldnn._linear_pointwise.binary
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    attribute, algorithm = ("gelu", "tanh") if gelu else ("none", "")

    def product(x: Tensor, added: Tensor | None = None) -> Tensor:
        if added is None:
            return unary(x, packed, bias, attribute, [], algorithm)
        return binary(x, added, packed, bias, "add")

    return product


def _bfloat16(weight: Tensor, bias: Tensor | None, gelu: bool) -> Linear:
    packed = _packed(weight.bfloat16(), None if bias is None else bias.bfloat16(), gelu)

    def product(x: Tensor, added: Tensor | None = None) -> Tensor:
        y = packed(x.bfloat16())
        return y.float() if added is None else added + y

    return product


def _int8(weight: Tensor, bias: Tensor | None, gelu: bool) -> Linear:
    # torch's own dynamic product (`quantized.linear_dynamic`) has one scale for all rows: an image would depend on the
    # others of its batch. With rows of largest magnitude 1 the scale is a constant, and sums are exact whole numbers.
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
    scales = weight.abs().amax(1).double().clamp_(min=torch.finfo(torch.float32).tiny) / 127
    with warnings.catch_warnings():  # quantized tensors will leave torch, and the InputError above will say so
        warnings.simplefilter("ignore", UserWarning)
        quantized = torch.quantize_per_channel(weight, scales, torch.zeros(len(scales)).long(), 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(quantized, None)
    offset = weight.new_zeros(()) if bias is None else bias

    def product(x: Tensor, added: Tensor | None = None) -> Tensor:
        largest = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True).clamp_(min=1e-30)  # (R, 1)
        y = torch.addcmul(offset, multiply(x / largest, 1 / LEVELS, LEVELS + 1, packed), largest)
        y = _activated(y, gelu)
        return y if added is None else added + y

    return product


# --- training --------------------------------------------------------------------------------------------------------


class TrainedLinear(nn.Linear):
    """``nn.Linear`` by :func:`linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``, (..., in_features) -> (..., out_features); forward and backward in oneDNN in float32 on a CPU.

    `F.conv2d` with 1x1 kernels is another way to oneDNN, but torch leaves it for small batches on a single thread.
    """
    if has_onednn(x) and weight.numel() >= WORTH_PACKING and not torch.is_autocast_enabled("cpu"):
        return cast(Tensor, _OneDNNLinear.apply(x, weight, bias))
    return F.linear(x, weight, bias)


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        rows, inputs = (
            gradient.reshape(-1, len(weight)),
            x.reshape(-1, weight.shape[1]),
        )  # (R, out_features), (R, in_features)
        wanted_x, wanted_weight, wanted_bias = ctx.needs_input_grad
        return (
            _product(gradient, weight.T, None) if wanted_x else None,
            _product(rows.T, inputs.T, None) if wanted_weight else None,
            rows.sum(0) if wanted_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
