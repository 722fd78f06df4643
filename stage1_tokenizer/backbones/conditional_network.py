"""An encoder or a decoder that sees a condition of each image: the conditional VAE's q(z | x, y) and p(x | z, y).

Sohn, Lee and Yan 2015, "Learning Structured Output Representation using Deep Conditional Generative Models", section 4,
with a prior that does not depend on the condition, p(z | y) = p(z).
Axes: B images, c channels of the first layer's output, h and w cells of the latent grid, D the width of contexts.
"""

import inspect

from torch import Tensor, nn

from twostage.core.conditions.context import Context, ContextForm, ContextSpace
from twostage.core.errors import InputError

__all__ = ["ConditionalNetwork", "context_space"]

CONTEXT_WIDTH = 128


def context_space(grid: tuple[int, int]) -> ContextSpace:
    """The contexts of an autoencoder with the latent grid (h, w); encoder and decoder share them."""
    return ContextSpace(CONTEXT_WIDTH, 1.0, grid)


class ConditionalNetwork(nn.Module):
    """A network whose first layer adds what the condition says to its output: a learned vector for each class, or a
    linear map of the context of a caption, of a vector, or of each cell of a map.

    For classes, that is the same as a one-hot class beside the input: W [x; onehot(y)] = W_x x + (column y of W_y). For
    convolutions, it is the same as a constant plane for each class, except at the border.

    Args:
        network: its ``forward`` takes the input and a shift, see :meth:`BackboneConfig.build`.
        grid: the latent grid (h, w).

    Raises:
        InputError: the network takes no shift.
    """

    def __init__(self, network: nn.Module, form: ContextForm, grid: tuple[int, int]) -> None:
        super().__init__()
        if "shift" not in inspect.signature(network.forward).parameters:
            raise InputError(
                f"model.condition: {type(network).__name__} of this model.backbone takes no shift for its first "
                "layer. Set model.backbone.type to conv, mlp or vqgan, or model.condition=null."
            )
        self.network, self.grid = network, grid
        first = next(layer for layer in network.modules() if isinstance(layer, nn.Linear | nn.Conv2d))
        bound = first.weight[0].numel() ** -0.5  # as torch initialises the layer's own weights
        if form.num_classes:
            self.shifts = nn.Embedding(form.num_classes, len(first.weight))
            nn.init.uniform_(self.shifts.weight, -bound, bound)
        else:
            self.shifts = nn.Linear(CONTEXT_WIDTH, len(first.weight), bias=False)
            nn.init.normal_(self.shifts.weight, std=bound * (3 * CONTEXT_WIDTH) ** -0.5)  # as large as for classes

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """The network's output for inputs (B, ...) with what the condition says about them."""
        return self.network(x, self._shift(context))

    def _shift(self, context: Context) -> Tensor:
        """(B, c), or (B, c, h, w) for maps."""
        if context.labels is not None:
            return self.shifts(context.labels)
        if context.cells is not None:
            return self.shifts(context.cells).transpose(1, 2).unflatten(2, self.grid)
        return self.shifts(context.pooled)
