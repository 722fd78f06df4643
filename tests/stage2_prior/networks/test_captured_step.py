"""The sampling step of a GPU draws the codes of a CPU, whether it is captured or not."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contexts import branches
from fake_gpu import GPU
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stage2_prior.networks import captured_step
from stage2_prior.networks.autoregressive import Autoregressive
from stage2_prior.networks.captured_step import repeat_captured, sample_with_fixed_shapes
from stage2_prior.networks.causal_transformer import (
    CausalTransformer,
    CausalTransformerConfig,
    CausalTransformerDecoder,
    FixedTransformerDecoder,
)
from stage2_prior.networks.pixelcnn import PixelCNN, PixelCNNConfig
from stage2_prior.sampling import Branches, CodeNoise, image_seeds
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.conditions.context import Context, ContextForm

CODES, GRID, CLASSES = 8, (5, 4), 3
CELLS = GRID[0] * GRID[1]
FORM = ContextForm(num_classes=CLASSES)


class Recorder(TorchDispatchMode):
    """Records operations with their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, results))
        return results


def recorded(function: Callable[[], None]) -> Callable[[], None]:
    """The function as a graph on a CPU: the same operations on the same memory, whatever else Python would do."""
    recorder = Recorder()
    with recorder:  # unlike a capture, this computes, so it is the first replay too
        function()
    replays = itertools.count()

    def replay() -> None:
        for func, args, kwargs, results in recorder.calls if next(replays) else ():
            found = func(*args, **kwargs)
            if isinstance(results, Tensor):
                found, results = [found], [results]
            for old, new in zip(results, found, strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)

    return replay


@pytest.fixture(params=[False, True], ids=["called", "replayed"])
def replayed(request, monkeypatch) -> None:
    """The step as on a CPU, and as a graph that a GPU replays."""
    if request.param:
        monkeypatch.setattr(captured_step, "_captured", recorded)
        monkeypatch.setattr(captured_step, "repeat_captured", lambda step, times, _: repeat_captured(step, times, GPU))


def build(form: ContextForm = FORM, **options: object) -> CausalTransformer:
    torch.manual_seed(0)
    settings = {"hidden_size": 16, "depth": 2, "num_heads": 2, "dropout": 0.0} | options
    model = CausalTransformer(CausalTransformerConfig.model_validate(settings), CODES, GRID, form).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def sample_as_on_a_gpu(
    model: Autoregressive, given: Branches, sampling: SamplingConfig, seeds: list[int], known: Tensor, first: int
) -> Tensor:
    head, context, known = model.code_head, given.context.in_order(model.order), known[:, model.order]
    decoder = model.fixed_decoder(context, sampling.weights, given.repeat(known[:, :first]))
    told: list[int] = []
    noise = CodeNoise(seeds, sum(head.choices))
    assert decoder
    codes = sample_with_fixed_shapes(decoder, head, given, noise, sampling, known, told.append)
    assert sum(told) == len(seeds) * (CELLS - first)
    return codes[:, model.order.argsort()]


@pytest.mark.parametrize("first", [0, 7, CELLS])
@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({"positions": "both"}, {}),
        ({"positions": "relative", "order": "spiral"}, {"guidance_scale": 2.0, "guidance_schedule": "cosine"}),
        ({"positions": "learned", "tied_head": True}, {"top_k": 3, "temperature": 2.0}),
        ({"positions": "rotary", "codes": [2, 4]}, {"top_p": 0.9, "guidance_scale": 1.5}),
    ],
)
def test_the_codes_are_those_of_growing_shapes(options, settings, first, replayed, monkeypatch):
    monkeypatch.setattr(FixedTransformerDecoder, "cells_per_graph", 5)
    check_codes(build(**options), SamplingConfig(**settings), first)


@pytest.mark.parametrize("first", [0, 6, 8])
@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 2.0, "guidance_schedule": "linear", "top_k": 3}])
@pytest.mark.parametrize("form", [FORM, ContextForm(num_classes=CLASSES, cells=True)])
def test_the_codes_of_a_pixelcnn_are_those_of_its_cells_one_by_one(form, settings, first, replayed):
    torch.manual_seed(0)
    config = PixelCNNConfig(channels=8, depth=3, head_channels=16, context_channels=8)
    model = PixelCNN(config, CODES, GRID, form).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    check_codes(model, SamplingConfig(**settings), first)


def check_codes(model: Autoregressive, sampling: SamplingConfig, first: int) -> None:
    labels, seeds = torch.arange(6) % CLASSES, image_seeds(0, 0, 6)
    given = branches(labels, CLASSES, sampling)
    if isinstance(model, PixelCNN) and any(layer.of_context is not None for layer in model.layers):
        random = torch.Generator().manual_seed(0)
        cells = torch.randn(given.context.size, CELLS, 8, generator=random, dtype=torch.double)
        given = dataclasses.replace(given, context=dataclasses.replace(given.context, cells=cells))
    known = torch.full((6, CELLS), -1)
    written = model.order[: first + 1]
    known[:, written] = torch.randint(CODES, (6, len(written)), generator=torch.Generator().manual_seed(1))
    if first < CELLS:
        known[0, model.order[first]] = -1  # one more code is known of the others
    expected = model.sample(given, sampling, seeds, known)
    assert torch.equal(sample_as_on_a_gpu(model, given, sampling, seeds, known, first), expected)
    assert torch.equal(expected[known >= 0], known[known >= 0])


@pytest.mark.parametrize("positions", ["both", "relative"])
def test_the_places_of_a_sequence_are_seen(positions, replayed):
    model = build(ContextForm(num_classes=CLASSES, pooled=True, sequence=3), positions=positions)
    present = torch.tensor([[True, True, True], [True, False, False], [False, False, False]] * 2)
    sequence = torch.randn(6, 3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    context = Context(6, torch.arange(6) % CLASSES)
    context = dataclasses.replace(context, pooled=sequence[:, 0], sequence=sequence, present=present)
    given, nothing, seeds = Branches(context), torch.full((6, CELLS), -1), image_seeds(0, 0, 6)
    expected = model.sample(given, SamplingConfig(), seeds)
    assert torch.equal(sample_as_on_a_gpu(model, given, SamplingConfig(), seeds, nothing, 0), expected)
    other = Branches(dataclasses.replace(context, sequence=sequence.flip(0)))
    assert not torch.equal(sample_as_on_a_gpu(model, other, SamplingConfig(), seeds, nothing, 0), expected)


def test_rounded_keys_and_values_change_predictions_only_slightly():
    model, codes = build().float(), torch.randint(CODES, (4, CELLS), generator=torch.Generator().manual_seed(0))
    context = Context(4, torch.arange(4) % CLASSES)
    exact = CausalTransformerDecoder(model, context)
    rounded = FixedTransformerDecoder(model, context, "bfloat16", codes[:, :0])
    for cell in range(CELLS):
        expected = exact.step(codes[:, cell - 1] if cell else None)
        found = rounded.predict(torch.tensor([cell]), codes[:, cell - 1], CELLS)
        assert found.dtype == torch.float32
        assert 0 < (found - expected).norm() < 0.03 * expected.norm()


# --- capturing -------------------------------------------------------------------------------------------------------


class Graph:
    """Records how often it is replayed; captures what is called between."""

    replays = 0

    def replay(self) -> None:
        Graph.replays += 1


@pytest.fixture
def captured(monkeypatch):
    monkeypatch.setattr(captured_step, "_FAILED", [])
    monkeypatch.setattr(Graph, "replays", 0)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)


def test_a_gpu_replays_all_calls_after_the_first(captured, monkeypatch):
    events: list[str] = []

    class Capture:
        def __init__(self, graph: Graph, **options: object) -> None: ...

        def __enter__(self) -> None:
            events.append("capture")

        def __exit__(self, *error: object) -> None:
            events.append("captured")

    monkeypatch.setattr(torch.cuda, "graph", Capture)
    assert len(list(repeat_captured(lambda: events.append("call"), 7, GPU))) == 7
    assert events == ["call", "call", "capture", "call", "captured"]
    assert Graph.replays == 5
    events.clear()
    list(repeat_captured(lambda: events.append("call"), 7, torch.device("cpu")))
    assert events == ["call"] * 7


def test_without_graphs_every_call_is_made_and_a_sentence_is_printed_once(captured, monkeypatch, capsys):
    def fails(graph: Graph, **options: object) -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCompile with more")

    monkeypatch.setattr(torch.cuda, "graph", fails)
    calls: list[int] = []
    for _ in range(2):
        list(repeat_captured(lambda: calls.append(1), 5, GPU))
    assert (len(calls), Graph.replays) == (10, 0)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Sampling continues without CUDA graphs")
    assert line.endswith("more slowly: CUDA error: operation not permitted when stream is capturing.")
