import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.config import parse_config
from core.errors import InputError
from stage2_prior.causal_transformer import (
    CausalTransformer,
    CausalTransformerConfig,
    CausalTransformerDecoder,
    causal_attention,
    rotate,
    rotations,
)
from stage2_prior.sampling import SamplingConfig, image_seeds, uniform_noise

CODES, GRID, CLASSES = 5, (2, 3), 3
CELLS = GRID[0] * GRID[1]
NO_CLASS = CLASSES


@pytest.fixture
def model() -> CausalTransformer:
    torch.manual_seed(0)
    config = CausalTransformerConfig(hidden_size=16, depth=2, num_heads=2, dropout=0.0)
    model = CausalTransformer(config, CODES, GRID, CLASSES).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


@pytest.fixture
def codes() -> Tensor:
    return torch.randint(CODES, (4, CELLS), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels() -> Tensor:
    return torch.tensor([0, 1, 2, NO_CLASS])


def plain_sample(model: CausalTransformer, labels: Tensor, sampling: SamplingConfig, noise: Tensor) -> Tensor:
    """Guided sampling as it is written in papers: nothing is kept from one cell to the next."""
    codes = torch.zeros(len(labels), CELLS, dtype=torch.long)
    for cell in range(CELLS):
        branches = (labels, torch.full_like(labels, NO_CLASS))
        conditional, unconditional = (model(codes, classes)[:, cell] for classes in branches)
        logits = unconditional + sampling.guidance_scale * (conditional - unconditional)
        logits = logits / sampling.temperature
        if sampling.top_k:
            unlikely = logits.argsort(descending=True)[:, sampling.top_k :]
            logits = logits.scatter(1, unlikely, -torch.inf)
        codes[:, cell] = (logits.double().softmax(1).cumsum(1) <= noise[:, cell, None]).sum(1)
    return codes


@pytest.mark.parametrize("cell", range(CELLS))
def test_logits_depend_on_all_earlier_codes_and_on_no_other(model, codes, labels, cell):
    embedded: list[Tensor] = []
    model.code_embedding.register_forward_hook(lambda _, __, output: embedded.append(output))
    logits = model(codes, labels)
    gradients = torch.autograd.grad(logits[:, cell].square().sum(), embedded)[0]
    touched = (gradients != 0).any(2)  # (B, N - 1): no logit is after the last code
    assert touched.shape == (4, CELLS - 1)
    assert touched[:, :cell].all()
    assert not touched[:, cell:].any()


@pytest.mark.parametrize("cell", range(CELLS))
def test_changing_a_code_changes_the_later_logits_alone(model, codes, labels, cell):
    changed = codes.clone()
    changed[:, cell] = (changed[:, cell] + 1) % CODES
    before, after = model(codes, labels), model(changed, labels)
    assert torch.equal(before[:, : cell + 1], after[:, : cell + 1])
    assert (before[:, cell + 1 :] != after[:, cell + 1 :]).any(2).all()


def test_every_cell_depends_on_the_class(model, codes):
    for one, other in itertools.combinations(range(CLASSES + 1), 2):
        logits, others = (model(codes[:1], torch.tensor([label])) for label in (one, other))
        assert (logits != others).any(2).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-12)])
def test_cached_logits_equal_those_of_the_whole_grid(model, codes, labels, dtype, tolerance):
    model = model.to(dtype)
    decoder = CausalTransformerDecoder(model, labels)
    steps = [decoder.step(codes[:, cell - 1] if cell else None) for cell in range(CELLS)]
    torch.testing.assert_close(torch.stack(steps, 1), model(codes, labels).detach(), rtol=tolerance, atol=tolerance)
    assert steps[0].dtype == dtype


@pytest.mark.parametrize(
    "sampling",
    [{}, {"guidance_scale": 3.0}, {"guidance_scale": 0.0}, {"guidance_scale": 1.5, "top_k": 3, "temperature": 2.0}],
)
def test_samples_equal_those_of_a_plain_implementation(model, sampling):
    labels, seeds, options = torch.tensor([0, 1, 2] * 4), image_seeds(1, 0, 12), SamplingConfig(**sampling)
    expected = plain_sample(model, labels, options, uniform_noise(seeds, CELLS))
    assert torch.equal(model.sample(labels, options, seeds), expected)
    assert len(expected.unique()) > 2


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_an_image_depends_on_its_seed_and_label_alone(model, guidance_scale):
    labels, seeds = torch.arange(12) % CLASSES, image_seeds(7, 0, 12)
    sampling = SamplingConfig(guidance_scale=guidance_scale)
    together = model.sample(labels, sampling, seeds)
    assert len(together.unique(dim=0)) > 8
    for size in (1, 5):
        parts = [model.sample(labels[i : i + size], sampling, seeds[i : i + size]) for i in range(0, 12, size)]
        assert torch.equal(torch.cat(parts), together)
    assert torch.equal(model.sample(labels.flip(0), sampling, seeds[::-1]), together.flip(0))


def test_frequencies_of_the_first_code_are_the_models(model):
    labels = torch.zeros(2000, dtype=torch.long)
    first = model.sample(labels, SamplingConfig(), image_seeds(0, 0, 2000))[:, 0]
    shares = model(torch.zeros(1, CELLS, dtype=torch.long), labels[:1])[0, 0].softmax(0)
    torch.testing.assert_close(first.bincount(minlength=CODES) / 2000, shares.detach(), atol=0.04, rtol=0)


def test_the_first_prediction_is_uniform(codes, labels):
    config = CausalTransformerConfig(hidden_size=16, depth=2, num_heads=2)
    assert (CausalTransformer(config, CODES, GRID, CLASSES)(codes, labels) == 0).all()


def test_dropout_is_of_training_alone(model, codes, labels):
    noisy = CausalTransformer(model.config.model_copy(update={"dropout": 0.5}), CODES, GRID, CLASSES)
    noisy.load_state_dict(model.state_dict())
    assert torch.equal(noisy.eval()(codes, labels), model(codes, labels))
    assert not torch.equal(noisy.train()(codes, labels), model(codes, labels))


def test_a_single_cell_is_enough(labels):
    config = CausalTransformerConfig(hidden_size=4, depth=1, num_heads=1)
    model = CausalTransformer(config, CODES, (1, 1), CLASSES).eval()
    assert model(torch.zeros(4, 1, dtype=torch.long), labels).shape == (4, 1, CODES)
    assert model.sample(labels, SamplingConfig(), image_seeds(0, 0, 4)).shape == (4, 1)


def test_rotated_heads_see_how_far_apart_two_cells_are_and_nothing_else():
    grid, width = (5, 6), 8
    rotation = rotations(grid, width)
    q, k = (torch.randn(width, generator=torch.Generator().manual_seed(i)).expand(30, -1) for i in range(2))
    scores = (rotate(q, rotation) @ rotate(k, rotation).T).view(*grid, *grid)  # of one head, from cell to cell
    torch.testing.assert_close(scores[1:, 1:, 1:, 1:], scores[:-1, :-1, :-1, :-1], rtol=1e-4, atol=1e-5)
    turned = rotate(q, rotation)  # (30, 8): another direction at every cell
    assert (torch.cdist(turned, turned) + torch.eye(30)).min() > 0.1
    torch.testing.assert_close(turned.norm(dim=1), q.norm(dim=1))


def test_attention_in_bfloat16_equals_that_in_float32_and_looks_at_nothing_later():
    q, k, v = (torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3))
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    torch.testing.assert_close(causal_attention(q, k, v).float(), expected, rtol=0.02, atol=0.02)
    changed = v.clone()
    changed[:, :, 4:] += 1
    assert torch.equal(causal_attention(q, k, changed)[:, :, :4], causal_attention(q, k, v)[:, :, :4])


def test_heads_must_divide_the_width():
    with pytest.raises(InputError, match="hidden_size 10 must be a multiple of num_heads 4"):
        parse_config(CausalTransformerConfig, {"hidden_size": 10, "num_heads": 4}, "model")


def test_heads_must_be_as_wide_as_rows_and_columns_need():
    with pytest.raises(InputError, match="hidden_size 12 / num_heads 2 must be a multiple of 4"):
        parse_config(CausalTransformerConfig, {"hidden_size": 12, "num_heads": 2}, "model")
