"""Batches fit in the free memory, by an estimate above what sampling really takes."""

import psutil
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from pipelines.drawing.batch_size import fitting_batch_size, sampling_bytes
from stage2_prior.networks.masked_transformer import MaskedTransformerConfig
from stage2_prior.networks.pixelcnn import PixelCNNConfig
from stage2_prior.prior import Prior
from stage2_prior.sampling_config import SamplingConfig

CPU = torch.device("cpu")
MODELS = {
    "pixelcnn": PixelCNNConfig(channels=32, depth=4, head_channels=64),
    "causal": None,  # the trained one, wider
    "masked": MaskedTransformerConfig(hidden_size=96, depth=4, num_heads=4, dropout=0.0),
}


def with_model(pipeline, name: str) -> Prior:
    model = MODELS[name] or pipeline.prior.config.model.model_copy(update={"hidden_size": 96, "depth": 4})
    update = {"model": model, "grid": (6, 6), "codebook_size": 256}
    return Prior(pipeline.prior.config.model_copy(update=update)).eval()


def peak_bytes(prior: Prior, count: int, sampling: SamplingConfig) -> int:
    """The peak of the memory that sampling ``count`` images allocates."""
    # acc_events: torch 2.11 warns without it.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        prior.sample(None, sampling, list(range(count)))
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("name", MODELS)
def test_the_estimate_is_above_the_memory_that_sampling_takes(pipeline, name, guidance_scale):
    prior, sampling = with_model(pipeline, name), SamplingConfig(guidance_scale=guidance_scale)
    few, many = peak_bytes(prior, 8, sampling), peak_bytes(prior, 16, sampling)
    taken = (many - few) / 8  # of each further image
    assert taken < sampling_bytes(prior, sampling) < 6 * taken


def test_less_memory_makes_smaller_batches(pipeline, monkeypatch):
    prior, sampling = with_model(pipeline, "masked"), SamplingConfig()
    free = psutil.virtual_memory()
    sizes = []
    for images in (1, 20, 40, 10_000):
        available = images * sampling_bytes(prior, sampling) * 2  # half of it is used
        monkeypatch.setattr(psutil, "virtual_memory", lambda a=available: free._replace(available=a))
        sizes.append(fitting_batch_size(prior, sampling, CPU))
    assert sizes == [8, 16, 32, 32]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert fitting_batch_size(prior, sampling, CPU) == 8
