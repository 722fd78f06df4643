"""The public face of twostage: ``from twostage import TwoStagePipeline``. Each name is imported when it is first used,
so that ``import twostage`` is instant and loads no torch."""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.drawing.two_stage import TwoStagePipeline
    from pipelines.encoding.new_prior import new_prior
    from stage1_tokenizer.autoencoder import Autoencoder, AutoencoderOutput
    from stage1_tokenizer.autoencoder_config import AutoencoderConfig, ModelConfig
    from stage1_tokenizer.backbones.backbone import BackboneConfig
    from stage1_tokenizer.backbones.conv_backbone import ConvConfig
    from stage1_tokenizer.backbones.mlp_backbone import MLPConfig
    from stage1_tokenizer.backbones.vqgan_backbone import VQGANConfig
    from stage1_tokenizer.bottlenecks.binary_spherical import BinarySphericalConfig
    from stage1_tokenizer.bottlenecks.bottleneck import BottleneckConfig, BottleneckOutput, Quantizer
    from stage1_tokenizer.bottlenecks.continuous import ClassGaussianConfig, GaussianConfig, IdentityConfig
    from stage1_tokenizer.bottlenecks.differentiable_vector import DiVeQConfig
    from stage1_tokenizer.bottlenecks.finite_scalar import FiniteScalarConfig
    from stage1_tokenizer.bottlenecks.gumbel_softmax import GumbelSoftmaxConfig
    from stage1_tokenizer.bottlenecks.index_backpropagation import IndexBackpropagationConfig
    from stage1_tokenizer.bottlenecks.lookup_free import LookupFreeConfig
    from stage1_tokenizer.bottlenecks.multi_scale import MultiScaleConfig
    from stage1_tokenizer.bottlenecks.product_quantizer import ProductConfig
    from stage1_tokenizer.bottlenecks.projected_codebook import ProjectedCodebookConfig
    from stage1_tokenizer.bottlenecks.residual_quantizer import ResidualConfig
    from stage1_tokenizer.bottlenecks.two_level import TwoLevelConfig
    from stage1_tokenizer.bottlenecks.vector_quantizer import VectorConfig
    from stage1_tokenizer.losses.loss_term import LossTermConfig
    from stage1_tokenizer.losses.objective import CorruptionConfig, ObjectiveConfig
    from stage2_prior.networks.causal_transformer import CausalTransformerConfig
    from stage2_prior.networks.masked_transformer import MaskedTransformerConfig
    from stage2_prior.networks.network import NetworkConfig
    from stage2_prior.networks.parallel_transformer import ParallelTransformerConfig
    from stage2_prior.networks.pixelcnn import PixelCNNConfig
    from stage2_prior.networks.scale_by_scale import ScaleByScaleConfig
    from stage2_prior.networks.scale_transformer import ScaleTransformerConfig
    from stage2_prior.prior import Prior, PriorConfig, PriorLossConfig
    from stage2_prior.sampling_config import SamplingConfig
    from twostage.core.conditions.text_condition import TextConditionConfig
    from twostage.core.conditions.vocabulary import Vocabulary
    from twostage.core.config.sections import load_config
    from twostage.core.data.data_config import DataConfig
    from twostage.core.data.dataset import load_images
    from twostage.core.errors import InputError
    from twostage.core.images.conversion import to_float, to_uint8
    from twostage.core.training.optimizer import AveragedCopy
    from twostage.core.training.random import BatchRandom

    __version__: str

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "AutoencoderOutput",
    "AveragedCopy",
    "BackboneConfig",
    "BatchRandom",
    "BinarySphericalConfig",
    "BottleneckConfig",
    "BottleneckOutput",
    "CausalTransformerConfig",
    "ClassGaussianConfig",
    "ConvConfig",
    "CorruptionConfig",
    "DataConfig",
    "DiVeQConfig",
    "FiniteScalarConfig",
    "GaussianConfig",
    "GumbelSoftmaxConfig",
    "IdentityConfig",
    "IndexBackpropagationConfig",
    "InputError",
    "LookupFreeConfig",
    "LossTermConfig",
    "MLPConfig",
    "MaskedTransformerConfig",
    "ModelConfig",
    "MultiScaleConfig",
    "NetworkConfig",
    "ObjectiveConfig",
    "ParallelTransformerConfig",
    "PixelCNNConfig",
    "Prior",
    "PriorConfig",
    "PriorLossConfig",
    "ProductConfig",
    "ProjectedCodebookConfig",
    "Quantizer",
    "ResidualConfig",
    "SamplingConfig",
    "ScaleByScaleConfig",
    "ScaleTransformerConfig",
    "TextConditionConfig",
    "TwoLevelConfig",
    "TwoStagePipeline",
    "VQGANConfig",
    "VectorConfig",
    "Vocabulary",
    "__version__",
    "load_config",
    "load_images",
    "new_prior",
    "to_float",
    "to_uint8",
]

MODULES = {
    "Autoencoder": "stage1_tokenizer.autoencoder",
    "AutoencoderConfig": "stage1_tokenizer.autoencoder_config",
    "AutoencoderOutput": "stage1_tokenizer.autoencoder",
    "AveragedCopy": "twostage.core.training.optimizer",
    "BackboneConfig": "stage1_tokenizer.backbones.backbone",
    "BatchRandom": "twostage.core.training.random",
    "BinarySphericalConfig": "stage1_tokenizer.bottlenecks.binary_spherical",
    "BottleneckConfig": "stage1_tokenizer.bottlenecks.bottleneck",
    "BottleneckOutput": "stage1_tokenizer.bottlenecks.bottleneck",
    "CausalTransformerConfig": "stage2_prior.networks.causal_transformer",
    "ClassGaussianConfig": "stage1_tokenizer.bottlenecks.continuous",
    "ConvConfig": "stage1_tokenizer.backbones.conv_backbone",
    "CorruptionConfig": "stage1_tokenizer.losses.objective",
    "DataConfig": "twostage.core.data.data_config",
    "DiVeQConfig": "stage1_tokenizer.bottlenecks.differentiable_vector",
    "FiniteScalarConfig": "stage1_tokenizer.bottlenecks.finite_scalar",
    "GaussianConfig": "stage1_tokenizer.bottlenecks.continuous",
    "GumbelSoftmaxConfig": "stage1_tokenizer.bottlenecks.gumbel_softmax",
    "IdentityConfig": "stage1_tokenizer.bottlenecks.continuous",
    "IndexBackpropagationConfig": "stage1_tokenizer.bottlenecks.index_backpropagation",
    "InputError": "twostage.core.errors",
    "LookupFreeConfig": "stage1_tokenizer.bottlenecks.lookup_free",
    "LossTermConfig": "stage1_tokenizer.losses.loss_term",
    "MLPConfig": "stage1_tokenizer.backbones.mlp_backbone",
    "MaskedTransformerConfig": "stage2_prior.networks.masked_transformer",
    "ModelConfig": "stage1_tokenizer.autoencoder_config",
    "MultiScaleConfig": "stage1_tokenizer.bottlenecks.multi_scale",
    "NetworkConfig": "stage2_prior.networks.network",
    "ObjectiveConfig": "stage1_tokenizer.losses.objective",
    "ParallelTransformerConfig": "stage2_prior.networks.parallel_transformer",
    "PixelCNNConfig": "stage2_prior.networks.pixelcnn",
    "Prior": "stage2_prior.prior",
    "PriorConfig": "stage2_prior.prior",
    "PriorLossConfig": "stage2_prior.prior",
    "ProductConfig": "stage1_tokenizer.bottlenecks.product_quantizer",
    "ProjectedCodebookConfig": "stage1_tokenizer.bottlenecks.projected_codebook",
    "Quantizer": "stage1_tokenizer.bottlenecks.bottleneck",
    "ResidualConfig": "stage1_tokenizer.bottlenecks.residual_quantizer",
    "SamplingConfig": "stage2_prior.sampling_config",
    "ScaleByScaleConfig": "stage2_prior.networks.scale_by_scale",
    "ScaleTransformerConfig": "stage2_prior.networks.scale_transformer",
    "TextConditionConfig": "twostage.core.conditions.text_condition",
    "TwoLevelConfig": "stage1_tokenizer.bottlenecks.two_level",
    "TwoStagePipeline": "pipelines.drawing.two_stage",
    "VQGANConfig": "stage1_tokenizer.backbones.vqgan_backbone",
    "VectorConfig": "stage1_tokenizer.bottlenecks.vector_quantizer",
    "Vocabulary": "twostage.core.conditions.vocabulary",
    "load_config": "twostage.core.config.sections",
    "load_images": "twostage.core.data.dataset",
    "new_prior": "pipelines.encoding.new_prior",
    "to_float": "twostage.core.images.conversion",
    "to_uint8": "twostage.core.images.conversion",
}
"""The module that defines each public name."""

# OpenMP's threads spin while they wait for each other. If other programs share the cores, spinning takes time from the
# threads that are waited for, and a step takes many times as long. OpenMP reads this variable when torch is loaded, so
# it must be set before the first import of torch (measurements: docs/scaling.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "0")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("twostage")
    if name not in MODULES:
        raise AttributeError(f"module 'twostage' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
