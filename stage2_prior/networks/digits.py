"""Codes as numbers with digits, for codebooks that are products: the bits of lookup-free codes (LFQ), the levels of
finite scalar ones (FSQ).

A table of 2^16 codes has 2^16 rows, and so has a softmax over them. Digits need as many rows as all digits have values
together: 32 for 16 bits. A code's embedding is the sum of its digits' embeddings, which for bits is a linear layer, as
in MaskBit (Weber et al. 2024, arXiv 2409.16211). The head predicts each digit from the network's output and from the
digits before it in the same code, so its likelihood is exact, unlike that of independent bits.

Axes: R codes, J digits, S values of all digits together, D the width of the network's output, K codes.
"""

import math
from typing import Annotated, Literal, Self, cast

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from stage2_prior.networks.code_head import CodeHead, Pick, Softmax
from stage2_prior.networks.fast_linear import TrainedLinear
from stage2_prior.networks.network import NetworkConfig
from stage2_prior.sampling import Branches
from twostage.core.errors import InputError
from twostage.core.scales import Scales

__all__ = ["DigitEmbedding", "DigitHead", "DigitsConfig", "digit_floats", "head_for_codes"]

Base = Annotated[int, Field(strict=True, ge=2)]


class DigitsConfig(NetworkConfig):
    """A network that knows a code by its number or by its digits."""

    codes: Literal["table", "digits"] | list[Base] = "table"
    """`table`: an embedding and a logit for each code. `digits`: the code's bits (lookup_free) or levels
    (finite_scalar), which need as little memory and time for 2^16 or 2^20 codes as a table for a few hundred. A list:
    digits with these bases, the least significant first, for any codebook that is their product: [256, 256] for 2^16
    codes."""

    @field_validator("codes")
    @classmethod
    def _several_digits(cls, value: str | list[int]) -> str | list[int]:
        if isinstance(value, list) and len(value) < 2:
            raise ValueError(f"got {value}, expected at least two bases. Set codes=table for a single one")
        return value

    @property
    def ranks_codes(self) -> bool:
        return self.codes == "table"

    def for_codes(self, codebook_size: int, digits: list[int] | None, scales: Scales = ()) -> Self:
        if self.codes != "digits":
            return self
        if digits is None or len(digits) < 2:
            raise InputError(
                f"model.codes 'digits': these codes have no digits, unlike those of finite_scalar and lookup_free. Set "
                f"model.codes=table, or list bases whose product is {codebook_size}, the size of the codebook"
            )
        return self.model_copy(update={"codes": digits})

    def bases(self, codebook_size: int) -> tuple[int, ...] | None:
        """The number of values of each digit; None: codes have a table.

        Raises:
            InputError: their product is not the size of the codebook.
        """
        if self.codes == "table":
            return None
        if self.codes == "digits" or math.prod(self.codes) != codebook_size:
            product = "" if self.codes == "digits" else f"have the product {math.prod(self.codes)}, but "
            raise InputError(
                f"model.codes {self.codes!r}: {product}expected bases whose product is {codebook_size}, the size of "
                "the codebook. Change the list, or set model.codes=table"
            )
        return tuple(cast(list[int], self.codes))


def digit_floats(bases: tuple[int, ...], width: int) -> int:
    """The numbers that a head of digits computes for each code."""
    return len(bases) * (3 * width + 2 * sum(bases))


class Digits(nn.Module):
    """Codes -> their digits: code = sum of digit_j x (product of the bases before j)."""

    bases: Tensor
    powers: Tensor
    first: Tensor

    def __init__(self, bases: tuple[int, ...]) -> None:
        super().__init__()
        values = torch.tensor(bases)
        self.register_buffer("bases", values, persistent=False)
        self.register_buffer("powers", torch.cat([values.new_ones(1), values[:-1]]).cumprod(0), persistent=False)
        self.register_buffer("first", F.pad(values.cumsum(0)[:-1], (1, 0)), persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        """(...) -> (..., J)"""
        return codes[..., None] // self.powers % self.bases


class DigitEmbedding(nn.EmbeddingBag):
    """The embedding of a code as the sum of one vector for each of its digits.

    Args:
        std: the standard deviation of a code's embedding before training.
        masked: whether the code K, which stands for a masked one, has an embedding too.
    """

    def __init__(self, bases: tuple[int, ...], width: int, std: float, masked: bool = False) -> None:
        super().__init__(sum(bases) + masked * len(bases), width, mode="sum")
        self.digits, self.codebook_size, self.masked = Digits(bases), math.prod(bases), masked
        nn.init.normal_(self.weight, std=std * len(bases) ** -0.5)

    def forward(self, codes: Tensor) -> Tensor:  # type: ignore[override]
        """(...) -> (..., D)"""
        rows = self.digits(codes) + self.digits.first
        if self.masked:  # the last rows: one for each digit of a masked code
            unknown = self.num_embeddings - rows.shape[-1] + torch.arange(rows.shape[-1], device=rows.device)
            rows = torch.where(codes[..., None] < self.codebook_size, rows, unknown)
        return super().forward(rows.flatten(0, -2)).unflatten(0, codes.shape)


class DigitHead(nn.Module):
    """p(code) = prod_j p(digit_j | earlier digits, network), by one hidden layer for each digit, whose input is a sum
    over the earlier digits (NADE, Larochelle and Murray 2011, equations 1 to 3, with the network's output as context):

        a_j = W h + sum_{i < j} e_i[digit_i] + b_j,  logits_j = V_j gelu(a_j) + c_j

    Args:
        width: D.
    """

    adamw_layers = ("out",)

    def __init__(self, bases: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.choices, self.digits = bases, Digits(bases)
        self.inner = TrainedLinear(width, width, False)
        self.earlier = nn.Embedding(sum(bases[:-1]), width)
        self.bias = nn.Parameter(torch.zeros(len(bases), width))
        self.out = nn.Linear(width, sum(bases))
        of_digit = torch.arange(len(bases)).repeat_interleave(self.digits.bases, output_size=sum(bases))
        self.register_buffer("others", of_digit != torch.arange(len(bases))[:, None], persistent=False)
        self.initialize()

    def initialize(self) -> None:
        """The first prediction is uniform."""
        nn.init.normal_(self.inner.weight, std=self.inner.in_features**-0.5)
        nn.init.normal_(self.earlier.weight, std=0.5)
        for zero in (self.bias, self.out.weight, self.out.bias):
            nn.init.zeros_(zero)

    @property
    def floats(self) -> int:
        return digit_floats(self.choices, self.inner.in_features)

    def nats(self, predictions: Tensor, codes: Tensor) -> Tensor:
        """-log p of each code, for the network's output: (..., D) and (...) -> (...) float32."""
        rows = self.digits(codes) + self.digits.first  # (..., J)
        before = F.pad(self.earlier(rows[..., :-1]).cumsum(-2), (0, 0, 1, 0))  # (..., J, D)
        hidden = F.gelu(self.inner(predictions)[..., None, :] + before + self.bias, approximate="tanh")
        logits = self.out(hidden).float().masked_fill(self.others, -torch.inf)  # (..., J, S)
        return F.cross_entropy(logits.flatten(0, -2), rows.flatten(), reduction="none").view_as(rows).sum(-1)

    def sample(self, predictions: Tensor, branches: Branches, pick: Pick) -> Tensor:
        """Codes (R,) from the network's output (n R, D), one digit after another, see `CodeHead.sample`."""
        total, rows = self.inner(predictions), 0
        codes = torch.zeros(len(predictions) // branches.count, dtype=torch.long, device=predictions.device)
        last = len(self.choices) - 1
        for number, base in enumerate(self.choices):
            hidden, here = F.gelu(total + self.bias[number], approximate="tanh"), slice(rows, rows + base)
            values = pick(F.linear(hidden, self.out.weight[here], self.out.bias[here]), number)
            codes += values * self.digits.powers[number]
            if number < last:
                total = total + branches.repeat(self.earlier(values + rows))
            rows += base
        return codes


def head_for_codes(layer: nn.Module | None, codebook_size: int) -> CodeHead:
    """What a network's last ``layer`` predicts: digits, or all codes at once."""
    return layer if isinstance(layer, DigitHead) else Softmax(codebook_size)
