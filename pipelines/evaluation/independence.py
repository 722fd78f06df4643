"""Whether the network that judges a model is another one than those that the model was trained against.

Training lowers the distances in a perceptual loss's network whether or not the images get better, so the same network's
figures are no evidence.
"""

import shlex
from collections.abc import Iterable
from pathlib import Path

from pipelines.evaluation.frechet import InceptionFeatures, OwnFeatures
from stage1_tokenizer.autoencoder import AutoencoderConfig, PerceptualNetwork
from stage1_tokenizer.feature_network import FeatureNetwork
from twostage.core.errors import InputError
from twostage.core.runs.model_folder import find_model_folder

__all__ = ["LPIPS_REASON", "not_evidence"]

LPIPS_REASON = "the tokenizer was trained to lower LPIPS itself (loss.perceptual)"
OTHER_WIDTHS = (48, 32)
"""Of the network that is proposed instead: the first that the judging one does not have."""


def not_evidence(
    config: AutoencoderConfig,
    run: str | Path,
    network: OwnFeatures | InceptionFeatures | None,
    features: str | Path | None,
    source: str,
    names: Iterable[str],
) -> dict[str, str]:
    """Why each of the figures ``names``, which ``network`` gives, is no evidence of the tokenizer's quality, by figure;
    {} for a network of its own.

    Args:
        config: of the tokenizer.
        run: where the tokenizer is; a feature network that its config names is looked for around it, too.
        features: where the network was read from; None for Inception.
        source: of the images, for the command that trains another network.
    """
    if not isinstance(network, OwnFeatures) or features is None:
        return {}
    for trained in config.trained_against:
        if trained.type == "features" and _same(trained, Path(run), network.network, Path(features)):
            width = next(width for width in OTHER_WIDTHS if width != network.network.config.widths[0])
            command = f"twostage train-features {shlex.quote(source)} --seed 1 --width {width} --out runs/judge"
            reason = (
                f"{features} is the feature network that the tokenizer was trained against (loss.perceptual), and "
                f"training lowers distances in it. Judge by another one: {command}, then --features runs/judge; or "
                "give --inception FILE"
            )
            return dict.fromkeys(names, reason)
    return {}


def _same(trained: PerceptualNetwork, run: Path, network: FeatureNetwork, features: Path) -> bool:
    """Whether ``network``, read from ``features``, is the one that the model in ``run`` was trained against. By the
    weights; where neither their hash nor the folder is left, by the folder's name."""
    if trained.hash is not None:
        return trained.hash == network.features_hash()
    if trained.path is None:
        return False
    here = run.resolve()
    for folder in (Path(trained.path), *(above / trained.path for above in here.parents)):
        try:
            return FeatureNetwork.from_pretrained(folder).features_hash() == network.features_hash()
        except InputError:
            continue
    return _name(Path(trained.path)) == _name(find_model_folder(features))


def _name(folder: Path) -> str:
    """What the run of a network is called."""
    return (folder.parent if folder.name == "model" else folder).resolve().name
