"""An encoder or a decoder that sees the class of each image: the conditional VAE's q(z | x, y) and p(x | z, y).

Sohn, Lee and Yan 2015, "Learning Structured Output Representation using Deep Conditional Generative Models", section 4,
with a prior that does not depend on the condition, p(z | y) = p(z).
Axes: B images, c channels of the first layer's output.
"""

import inspect

from torch import Tensor, nn

from twostage.core.errors import InputError

__all__ = ["ConditionalNetwork"]


class ConditionalNetwork(nn.Module):
    """A network whose first layer adds a learned vector for the class to its output.

    That is the same as a one-hot class beside the input: W [x; onehot(y)] = W_x x + (column y of W_y). For
    convolutions, it is the same as a constant plane for each class, except at the border.

    Args:
        network: its ``forward`` takes the input and a shift (B, c), see :meth:`BackboneConfig.build`.

    Raises:
        InputError: there are no classes, or the network takes no shift.
    """

    def __init__(self, network: nn.Module, num_classes: int) -> None:
        super().__init__()
        if not num_classes:
            raise InputError(
                "model.condition 'class': needs labelled data, and this data has no classes. Use one folder per class "
                "or a table with a `label` column, or set model.condition=null."
            )
        if "shift" not in inspect.signature(network.forward).parameters:
            raise InputError(
                f"model.condition 'class': {type(network).__name__} of this model.backbone takes no shift for its "
                "first layer. Set model.backbone.type to conv, mlp or vqgan, or model.condition=null."
            )
        self.network = network
        first = next(layer for layer in network.modules() if isinstance(layer, nn.Linear | nn.Conv2d))
        self.shifts = nn.Embedding(num_classes, len(first.weight))
        bound = first.weight[0].numel() ** -0.5  # as torch initialises the layer's own weights
        nn.init.uniform_(self.shifts.weight, -bound, bound)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """The network's output for inputs (B, ...) of the classes ``labels`` (B,).

        Raises:
            InputError: no labels.
        """
        if labels is None:
            raise InputError(
                "model.condition 'class': got no labels, expected the class of every image, because the encoder and "
                "the decoder see it. Use labelled data, or a model that was trained with model.condition=null."
            )
        return self.network(x, self.shifts(labels.to(x.device)))
