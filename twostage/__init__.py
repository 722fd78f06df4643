"""The public face of twostage: ``from twostage import TwoStagePipeline``. Each name is imported when it is first used,
so that ``import twostage`` is instant and loads no torch."""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.drawing.two_stage import TwoStagePipeline
    from stage1_tokenizer.autoencoder import Autoencoder, AutoencoderConfig
    from stage2_prior.prior import Prior, PriorConfig
    from stage2_prior.sampling_config import SamplingConfig
    from twostage.core.config.sections import load_config
    from twostage.core.data.dataset import DataConfig, load_images
    from twostage.core.errors import InputError

    __version__: str

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "DataConfig",
    "InputError",
    "Prior",
    "PriorConfig",
    "SamplingConfig",
    "TwoStagePipeline",
    "__version__",
    "load_config",
    "load_images",
]

MODULES = {
    "Autoencoder": "stage1_tokenizer.autoencoder",
    "AutoencoderConfig": "stage1_tokenizer.autoencoder",
    "DataConfig": "twostage.core.data.dataset",
    "InputError": "twostage.core.errors",
    "Prior": "stage2_prior.prior",
    "PriorConfig": "stage2_prior.prior",
    "SamplingConfig": "stage2_prior.sampling_config",
    "TwoStagePipeline": "pipelines.drawing.two_stage",
    "load_config": "twostage.core.config.sections",
    "load_images": "twostage.core.data.dataset",
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
