"""A new prior for a tokenizer, built in Python without a config file."""

from stage1_tokenizer.autoencoder import Autoencoder
from stage2_prior.codes import TokenizerReference
from stage2_prior.networks.causal_transformer import CausalTransformerConfig
from stage2_prior.networks.network import NetworkConfig
from stage2_prior.prior import Prior, PriorConfig, PriorLossConfig
from twostage.core.conditions.class_condition import ClassConditionConfig
from twostage.core.conditions.condition import ConditionConfig
from twostage.core.errors import InputError

__all__ = ["new_prior"]


def new_prior(
    tokenizer: Autoencoder,
    model: NetworkConfig | None = None,
    *,
    loss: PriorLossConfig | None = None,
    class_names: list[str] | None = None,
    conditions: list[ConditionConfig] | None = None,
) -> Prior:
    """An untrained prior for the codes of a trained tokenizer. It belongs to these codes: if the encoder or the
    codebook is trained further, :class:`TwoStagePipeline` refuses the two together.

    Args:
        model: the network; None: a small GPT.
        class_names: the classes that the prior is conditioned on; None: those of the tokenizer; []: none.
        conditions: what the prior is conditioned on, such as a `TextConditionConfig` with its vocabulary; None: the
            class, if there are ``class_names``.

    Raises:
        InputError: the tokenizer has no codes.
    """
    if tokenizer.codebook_size is None:
        kind = tokenizer.config.model.bottleneck.type
        raise InputError(
            f"model.bottleneck.type {kind!r}: has no codes for a prior. Use a tokenizer with another bottleneck, such "
            "as VectorConfig()"
        )
    model, bottleneck = model or CausalTransformerConfig(), tokenizer.bottleneck
    names = tokenizer.config.class_names if class_names is None else class_names
    if conditions is None:
        conditions = [ClassConditionConfig(num_classes=len(names))] if names else []
    has_class = any(condition.type == "class" for condition in conditions)
    return Prior(
        PriorConfig(
            model=model.for_codes(tokenizer.codebook_size, list(bottleneck.digits) or None, bottleneck.scales),
            conditions=conditions,
            loss=loss or PriorLossConfig(),
            codebook_size=tokenizer.codebook_size,
            grid=tokenizer.code_grid,
            class_names=names if has_class else None,
            image_size=tokenizer.config.image_size,
            channels=tokenizer.config.channels,
            tokenizer=TokenizerReference(hash=tokenizer.content_hash(), path="(in memory)"),
        )
    )
