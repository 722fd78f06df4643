"""The `causal` term: a small causal transformer predicts each cell from the cells before it.

CRT, Ramanujan et al. 2024 (arXiv 2412.16326): the encoder learns to write what an autoregressive prior can predict.
Axes: B images, C channels, N = h w cells in raster order, F features.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from stage1_tokenizer.losses.latent_term import LatentTermConfig
from twostage.core.config.sections import Count, Depth, Number, Share, Width
from twostage.core.errors import InputError

__all__ = ["CausalTerm", "CausalTermConfig"]


@LatentTermConfig.register
class CausalTermConfig(LatentTermConfig):
    """How well earlier cells predict the encoder's output."""

    type: Literal["causal"] = "causal"
    weight: Annotated[Number, Field(ge=0)] = 4.0
    ramp: Share = 0.1
    width: Width = 128
    """Features of the transformer."""
    layers: Depth = 2
    """Layers of the transformer."""
    heads: Count = 4
    """Attention heads of each layer."""

    @model_validator(mode="after")
    def _divides(self) -> "CausalTermConfig":
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads}: expected a divisor of width {self.width}. Change one of the two")
        return self

    def build(self, encoded_shape: tuple[int, int, int], image_shape: tuple[int, int, int]) -> "CausalTerm":
        if encoded_shape[1] * encoded_shape[2] < 2:
            raise InputError(
                "loss.latents causal: got a grid of 1x1 cells, expected at least two, to predict one from another. Set "
                "model.backbone.type=conv, or remove the term from loss.latents"
            )
        return CausalTerm(self, encoded_shape)


class CausalTerm(nn.Module):
    """mean_i |f(x_1 ... x_i) - x_(i+1)|^2, with a gradient to inputs and targets.

    x is the encoder's output, each cell scaled to a mean square of 1 (our choice): otherwise the encoder could make the
    loss small by making its output small.
    """

    def __init__(self, config: CausalTermConfig, encoded_shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = encoded_shape
        self.read = nn.Linear(channels, config.width)
        self.places = nn.Parameter(nn.init.normal_(torch.empty(height * width - 1, config.width), std=0.02))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                config.width,
                config.heads,
                4 * config.width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.predict = nn.Linear(config.width, channels)

    def forward(self, encoded: Tensor, images: Tensor) -> Tensor:
        """The mean squared error, for the encoder's output (B, C, h, w)."""
        cells = rearrange(F.normalize(encoded.float(), dim=1), "b c h w -> b (h w) c") * encoded.shape[1] ** 0.5
        return F.mse_loss(self.predictions(cells[:, :-1]).float(), cells[:, 1:])

    def predictions(self, cells: Tensor) -> Tensor:
        """The cell after each of the first N - 1 cells (B, N - 1, C), from it and those before."""
        hidden = self.read(cells) + self.places
        future = nn.Transformer.generate_square_subsequent_mask(len(self.places), cells.device, hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, src_mask=future, is_causal=True)
        return self.predict(self.norm(hidden))
