"""Pipelines with other kinds of priors over the same codes, to test what only some kinds can do."""

from typing import Any

import torch

from pipelines.drawing.two_stage import TwoStagePipeline
from stage2_prior.networks.causal_transformer import CausalTransformerConfig
from stage2_prior.networks.masked_transformer import MaskedTransformerConfig
from stage2_prior.networks.parallel_transformer import ParallelTransformerConfig
from stage2_prior.networks.pixelcnn import PixelCNNConfig
from stage2_prior.prior import Prior

MASKED = MaskedTransformerConfig(hidden_size=32, depth=2, num_heads=2, dropout=0.0)
PARALLEL = ParallelTransformerConfig(hidden_size=32, depth=2, num_heads=2, dropout=0.0)
PIXELCNN = PixelCNNConfig(channels=8, depth=3, head_channels=16)


def causal(order: str) -> CausalTransformerConfig:
    """A causal transformer that writes the cells in that order."""
    return CausalTransformerConfig(hidden_size=32, depth=1, num_heads=2, dropout=0.0, order=order)


def with_prior(pipeline: TwoStagePipeline, model: Any, **changed: Any) -> TwoStagePipeline:
    """The pipeline with an untrained prior, for which no two codes are equally likely.

    Args:
        changed: other fields of the prior's configuration.
    """
    assert pipeline.prior
    torch.manual_seed(0)
    prior = Prior(pipeline.prior.config.model_copy(update={"model": model, **changed}))
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return TwoStagePipeline(pipeline.tokenizer, prior)
