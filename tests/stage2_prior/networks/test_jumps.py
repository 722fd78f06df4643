"""Exact jumps draw the codes of drawing one after another, in fewer passes."""

from typing import cast

import pytest
import torch
from contexts import ClassNetwork, branches, sample
from torch import Tensor, nn

from stage2_prior.networks.autoregressive import Autoregressive
from stage2_prior.networks.causal_transformer import CausalTransformer, CausalTransformerConfig
from stage2_prior.networks.network import PriorNetwork
from stage2_prior.networks.transformer import packed_layers
from stage2_prior.sampling import Branches, image_seeds
from stage2_prior.sampling_config import SamplingConfig, Weights
from twostage.core.conditions.context import Context, ContextForm

CODES, GRID, CLASSES = 7, (5, 6), 3
CELLS = GRID[0] * GRID[1]
LABELS = torch.arange(8) % CLASSES


def build(grid: tuple[int, int] = GRID, form: ContextForm | None = None, **options: object) -> CausalTransformer:
    config = CausalTransformerConfig.model_validate({"hidden_size": 16, "depth": 2, "num_heads": 2} | options)
    return cast(CausalTransformer, trained(config.build(CODES, grid, form or ContextForm(num_classes=CLASSES))))


def trained(network: PriorNetwork) -> nn.Module:
    """With weights that differ from each other, as after training."""
    torch.manual_seed(0)
    model = cast(nn.Module, network).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def one_by_one(model: ClassNetwork, sampling: SamplingConfig, known: Tensor | None = None) -> Tensor:
    seeds = image_seeds(3, 0, len(LABELS))
    drawn = [
        sample(model, LABELS[i : i + 1], sampling, seeds[i : i + 1], None if known is None else known[i : i + 1])
        for i in range(len(LABELS))
    ]
    return torch.cat(drawn)


@pytest.mark.parametrize("grid", [GRID, (2, 3), (1, 1)])
@pytest.mark.parametrize(
    "sampling",
    [{}, {"guidance_scale": 2.5, "guidance_schedule": "linear"}, {"top_k": 3, "temperature": 0.7}, {"top_p": 0.8}],
)
@pytest.mark.parametrize("options", [{"positions": "relative", "order": "spiral"}, {"positions": "both"}])
def test_the_codes_are_those_of_one_after_another(grid, sampling, options):
    model = build(grid, **options).double()
    settings = SamplingConfig.model_validate(sampling)
    expected = sample(model, LABELS, settings, image_seeds(3, 0, len(LABELS)))
    assert torch.equal(one_by_one(model, settings), expected)
    known = torch.full_like(expected, -1)
    known[:, model.order[: len(model.order) // 2]] = 1
    kept = sample(model, LABELS, settings, image_seeds(3, 0, len(LABELS)), known)
    assert torch.equal(one_by_one(model, settings, known), kept)


def test_captions_of_any_length_are_seen():
    model = build(form=ContextForm(sequence=4, pooled=True)).double()
    present = torch.tensor([[True, True, False, False], [True, True, True, True]] * 4)
    random = torch.Generator().manual_seed(0)
    sequence = torch.randn(8, 4, 16, generator=random, dtype=torch.float64)
    context = Context(8, pooled=sequence[:, 0], sequence=sequence, present=present)
    seeds = image_seeds(0, 0, 8)
    together = model.sample(Branches(context), SamplingConfig(), seeds)
    alone = [
        model.sample(Branches(context.rows(slice(i, i + 1))), SamplingConfig(), seeds[i : i + 1]) for i in range(8)
    ]
    assert torch.equal(torch.cat(alone), together)


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_a_window_is_computed_like_a_batch_of_as_many_images(weights, monkeypatch):
    monkeypatch.setattr("stage2_prior.networks.fast_linear.MIN_PACKED", 0)
    check_windows(build(positions="relative", mlp="squared_relu", biases=False), weights)


def test_known_codes_change_nothing_about_an_image_drawn_alone(monkeypatch):
    monkeypatch.setattr("stage2_prior.networks.fast_linear.MIN_PACKED", 0)
    model = build(positions="relative")
    known = torch.full((8, CELLS), -1)
    known[:, :11] = torch.randint(CODES, (8, 11), generator=torch.Generator().manual_seed(1))
    together = sample(model, LABELS, SamplingConfig(), image_seeds(3, 0, 8), known)
    assert torch.equal(one_by_one(model, SamplingConfig(), known), together)
    assert torch.equal(together[:, :11], known[:, :11])


def check_windows(model: Autoregressive, weights: Weights) -> None:
    """All cells by windows, and by steps of a batch of the same image."""
    cells = len(model.order)
    codes = torch.randint(CODES, (1, cells + 1), generator=torch.Generator().manual_seed(0))
    context = Context(1, LABELS[:1])
    windows, step = model.window_decoder(context, weights), model.decoder(context.rows(torch.zeros(8).long()), weights)
    assert windows is not None
    starts = range(0, cells - windows.size + 1, windows.size)
    together = [windows.predict(first, codes[:, first : first + windows.size]) for first in starts]
    steps = [step(codes[:, cell].expand(8) if cell else None)[:1] for cell in range(len(starts) * windows.size)]
    assert torch.equal(torch.cat(together, 1), torch.stack(steps, 1))


def test_there_are_fewer_passes_than_codes(monkeypatch):
    model, passes = build(positions="relative"), []
    window_decoder = model.window_decoder

    def counting(*given):
        windows = window_decoder(*given)
        predict = windows.predict
        monkeypatch.setattr(windows, "predict", lambda *asked: passes.append(asked) or predict(*asked))
        return windows

    monkeypatch.setattr(model, "window_decoder", counting)
    one_by_one(model, SamplingConfig(temperature=0.5))
    assert len(passes) < 0.75 * 8 * CELLS
    passes.clear()
    one_by_one(model, SamplingConfig(), torch.ones(8, CELLS, dtype=torch.long))
    assert len(passes) <= 8 * 5  # known codes need no guesses


def test_progress_is_reported_for_each_code():
    reported: list[int] = []
    known = torch.full((1, CELLS), -1)
    known[0, :5] = 2
    model = build()
    model.sample(branches(LABELS[:1], CLASSES, SamplingConfig()), SamplingConfig(), [1], known, reported.append)
    assert sum(reported) == CELLS - 5


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_packed_weights_are_made_again_when_weights_change(optimizer):
    model = build()
    first = packed_layers(model, "float32")
    assert packed_layers(model, "float32") is first
    model.code_embedding.weight.grad = torch.ones_like(model.code_embedding.weight)
    optimizer(model.parameters(), lr=0.1).step()
    second = packed_layers(model, "float32")
    assert second is not first
    model.load_state_dict(model.state_dict())
    assert packed_layers(model, "float32") is not second
