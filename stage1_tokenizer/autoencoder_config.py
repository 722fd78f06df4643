"""The group `model`, and the content of an autoencoder's `config.json`."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

# These modules register the types of `model.backbone` and `model.bottleneck`.
from stage1_tokenizer.backbones import mlp_backbone, vqgan_backbone  # noqa: F401
from stage1_tokenizer.backbones.backbone import BackboneConfig
from stage1_tokenizer.backbones.conv_backbone import ConvConfig
from stage1_tokenizer.bottlenecks import (  # noqa: F401
    binary_spherical,
    continuous,
    differentiable_vector,
    finite_scalar,
    gumbel_softmax,
    index_backpropagation,
    lookup_free,
    multi_scale,
    product_quantizer,
    projected_codebook,
    residual_quantizer,
    two_level,
)
from stage1_tokenizer.bottlenecks.bottleneck import BottleneckConfig
from stage1_tokenizer.bottlenecks.vector_quantizer import VectorConfig
from stage1_tokenizer.losses.objective import ObjectiveConfig
from twostage.core.conditions.class_condition import ClassConditionConfig
from twostage.core.conditions.condition import ConditionConfig
from twostage.core.config.sections import Count, Flag, Section, Sides, Width

__all__ = ["AutoencoderConfig", "ModelConfig", "PerceptualNetwork"]


class ModelConfig(Section):
    """The architecture."""

    latent_channels: Width = 64
    """Channels of the latent grid (alias: `z_channels`); with the `mlp` backbone, the dimensions of the latent."""
    backbone: BackboneConfig = ConvConfig()
    bottleneck: BottleneckConfig = VectorConfig()
    condition: ConditionConfig | None = None
    """`class`, or a group such as `{type: text}`, `{type: vector}` or `{type: map}`: the encoder and the decoder of a
    VAE see the class, caption, vector or map of each image; needs the bottleneck `gaussian`."""

    @field_validator("condition", mode="before")
    @classmethod
    def _as_group(cls, value: Any) -> Any:
        return {"type": value} if isinstance(value, str) else value

    @field_validator("condition")
    @classmethod
    def _never_hidden(cls, value: ConditionConfig | None) -> ConditionConfig | None:
        if value and value.dropout is not None:
            raise ValueError(f"dropout {value.dropout:g}: only applies to priors. Remove model.condition.dropout")
        return value

    @model_validator(mode="after")
    def _channels_fit_the_bottleneck(self) -> "ModelConfig":
        self.bottleneck.check_channels(self.latent_channels)
        return self

    @model_serializer(mode="wrap")
    def _readable_by_earlier_versions(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """They do not know `condition`, so it is written only if it says something; and `class` was a word."""
        found = handler(self)
        if isinstance(self.condition, ClassConditionConfig):
            found["condition"] = self.condition.type
        return {key: value for key, value in found.items() if key != "condition" or value}


class PerceptualNetwork(Section):
    """A network that a model was trained against, so its distances are not evidence of the model's quality."""

    type: Literal["lpips", "features", "imagenet"]
    path: str | None = None
    """The folder of a feature network during training."""
    hash: str | None = None
    """A feature network's :meth:`FeatureNetwork.features_hash`, or the sha256 of the ImageNet network's file; None: not
    recorded."""


class AutoencoderConfig(Section):
    """Everything needed to rebuild a trained autoencoder: the content of its `config.json`."""

    image_size: Sides
    """(height, width) of its images; one number for squares."""
    channels: Count = 3
    """1 grey, 3 RGB, 4 RGBA."""
    bits: Literal[8, 16] = 8
    """Bits per pixel and channel of its images (`data.bits`)."""
    shown_channels: tuple[int, ...] | None = None
    """The channels that sheets show (`data.shown_channels`)."""
    class_names: list[str] | None = None
    """The classes of its training data."""
    untrained_classes: tuple[str, ...] = ()
    """The classes that had no training image."""
    value_range: tuple[float, float] | None = None
    """The values in image files that became black and white (`data.value_range`)."""
    model: ModelConfig = ModelConfig()
    loss: ObjectiveConfig = ObjectiveConfig()
    trained_against: list[PerceptualNetwork] = Field(default=[])
    """The networks of the perceptual losses that its weights were trained with, those of `init_from` first."""
    adversarial: Flag = False
    """Whether a discriminator took part in its training."""

    if TYPE_CHECKING:  # what editors know of the constructor: the keys that one sets, and that a number is a square

        def __init__(
            self,
            *,
            image_size: int | tuple[int, int],
            channels: int = 3,
            class_names: list[str] | None = None,
            model: ModelConfig = ...,
            loss: ObjectiveConfig = ...,
            **record: Any,
        ) -> None: ...

    @property
    def conditions(self) -> list[ConditionConfig]:
        """What encoder and decoder see of each image besides its pixels: one condition at most."""
        return [self.model.condition] if self.model.condition else []

    @model_validator(mode="before")
    @classmethod
    def _from_earlier_version(cls, document: Any) -> Any:
        """Earlier versions kept the settings of the training's image losses instead of a record of them."""
        loss = document.get("loss") if isinstance(document, dict) else None
        if not isinstance(loss, dict):
            return document
        loss = dict(loss)
        perceptual, adversarial = loss.pop("perceptual", None), loss.pop("adversarial", None)
        document = {"adversarial": adversarial is not None} | document | {"loss": loss}
        if isinstance(perceptual, dict) and perceptual.get("weight", 1) and not document.get("trained_against"):
            document["trained_against"] = [{key: perceptual[key] for key in ("type", "path") if key in perceptual}]
        return document
