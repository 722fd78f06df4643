import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from contexts import of, sample
from torch import Tensor, nn

from stage2_prior.networks import fast_linear
from stage2_prior.networks.autoregressive import ORDERS, Autoregressive
from stage2_prior.networks.causal_transformer import (
    CausalTransformer,
    CausalTransformerConfig,
    CausalTransformerDecoder,
)
from stage2_prior.prior import Prior
from stage2_prior.sampling import CodeNoise, guidance_at, image_seeds
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.conditions.context import Context, ContextForm
from twostage.core.training.random import BatchRandom

CODES, GRID, CLASSES = 5, (2, 3), 3
FORM = ContextForm(num_classes=CLASSES)
CELLS = GRID[0] * GRID[1]
NO_CLASS = CLASSES
POSITIONS = ("learned", "rotary", "both", "relative")
FAST = {"positions": "relative", "mlp": "squared_relu", "biases": False}


def build(depth: int = 2, **options: object) -> CausalTransformer:
    torch.manual_seed(0)
    config = CausalTransformerConfig.model_validate(
        {"hidden_size": 16, "depth": depth, "num_heads": 2, "dropout": 0.0} | options
    )
    model = CausalTransformer(config, CODES, GRID, FORM).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


@pytest.fixture
def model() -> CausalTransformer:
    return build()


@pytest.fixture
def codes() -> Tensor:
    return torch.randint(CODES, (4, CELLS), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels() -> Tensor:
    return torch.tensor([0, 1, 2, NO_CLASS])


def plain_sample(
    model: CausalTransformer, labels: Tensor, sampling: SamplingConfig, noise: Tensor, known: Tensor | None = None
) -> Tensor:
    """Guided sampling as papers write it: nothing is cached from one cell to the next."""
    codes = torch.zeros(len(labels), CELLS, dtype=torch.long)  # in the order in which they are written
    for place, cell in enumerate(model.order.tolist()):
        branches = (labels, torch.full_like(labels, NO_CLASS))
        conditional, unconditional = (model(codes, of(classes))[:, place] for classes in branches)
        scale = 1 + (sampling.guidance_scale - 1) * guidance_at(place, CELLS, sampling)
        logits = unconditional + scale * (conditional - unconditional)
        logits = logits / sampling.temperature
        if sampling.top_k:
            unlikely = logits.argsort(descending=True)[:, sampling.top_k :]
            logits = logits.scatter(1, unlikely, -torch.inf)
        codes[:, place] = (logits + noise[:, place]).argmax(1)
        if known is not None:
            codes[:, place] = torch.where(known[:, cell] < 0, codes[:, place], known[:, cell])
    return codes[:, model.order.argsort()]


# --- what depends on what --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("order", ORDERS)
def test_logits_depend_on_all_earlier_codes_and_on_no_others(codes, labels, order, positions):
    model = build(order=order, positions=positions)
    embedded: list[Tensor] = []
    model.code_embedding.register_forward_hook(lambda *call: embedded.append(call[-1]))  # pyright: ignore[reportArgumentType]
    logits = model(codes, of(labels))
    for place in range(CELLS):
        gradients = torch.autograd.grad(logits[:, place].square().sum(), embedded, retain_graph=True)[0]
        touched = (gradients != 0).any(2)  # (B, N - 1): no logit is after the last code
        assert touched.shape == (4, CELLS - 1)
        assert touched[:, :place].all()
        assert not touched[:, place:].any()


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("order", ORDERS)
def test_changing_a_code_changes_only_later_logits(codes, labels, order, positions):
    model = build(order=order, positions=positions)
    before = model.nats(codes, of(labels), codes)  # (B, N), in the order in which they are written
    for place, cell in enumerate(model.order.tolist()):
        changed = codes.clone()
        changed[:, cell] = (changed[:, cell] + 1) % CODES
        after = model.nats(codes, of(labels), changed)
        assert torch.equal(before[:, : place + 1], after[:, : place + 1])
        assert (before[:, place + 1 :] != after[:, place + 1 :]).all()


@pytest.mark.parametrize("positions", POSITIONS)
def test_each_cell_has_its_own_position(codes, labels, positions):
    """Swapping two earlier codes changes the prediction."""
    model, swapped = build(positions=positions), codes.clone()
    swapped[:, 0], swapped[:, 1] = codes[:, 1], codes[:, 0]
    different = codes[:, 0] != codes[:, 1]
    assert different.any()
    assert (model(codes, of(labels))[different, -1] != model(swapped, of(labels))[different, -1]).any(1).all()


def test_every_cell_depends_on_the_class(model, codes):
    for one, other in itertools.combinations(range(CLASSES + 1), 2):
        logits, others = (model(codes[:1], of(torch.tensor([label]))) for label in (one, other))
        assert (logits != others).any(2).all()


def test_nats_of_an_image_are_the_sum_over_its_codes_in_any_order(codes, labels):
    raster, columns = build(), build(order="columns", positions="learned")
    for model in (raster, columns):
        order = model.order
        expected = -model(codes[:, order], of(labels)).log_softmax(-1).gather(-1, codes[:, order, None]).sum((1, 2))
        random = BatchRandom(0, slice(0, 4), 4)
        torch.testing.assert_close(model.nats_per_image(codes, of(labels), random), expected)
        torch.testing.assert_close(model.loss(codes, of(labels), codes, random), expected.mean() / CELLS)


# --- decoding --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[0, 2**16], ids=["packed", "plain"])
def worth_packing(request, monkeypatch) -> None:
    monkeypatch.setattr(fast_linear, "MIN_PACKED", request.param)


@pytest.mark.parametrize(
    "options",
    [*({"positions": p} for p in POSITIONS), {"order": "spiral"}, {"tied_head": True}, FAST | {"order": "spiral"}],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-12)])
def test_cached_logits_equal_those_of_the_whole_grid(codes, labels, dtype, tolerance, options, worth_packing):
    model = build(**options).to(dtype)
    decoder = CausalTransformerDecoder(model, of(labels))
    steps = [decoder.step(codes[:, place - 1] if place else None) for place in range(CELLS)]
    torch.testing.assert_close(torch.stack(steps, 1), model(codes, of(labels)).detach(), rtol=tolerance, atol=tolerance)
    assert steps[0].dtype == dtype


KNOWN = torch.tensor([[1, 0, 4, -1, -1, -1], [3, 3, 3, 3, 3, -1], [-1] * 6, [2, -1, -1, -1, -1, -1]] * 3)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"guidance_scale": 3.0},
        {"guidance_scale": 0.0, "guidance_schedule": "linear"},
        {"guidance_scale": 1.5, "top_k": 3, "temperature": 2.0, "guidance_schedule": "cosine"},
    ],
)
def test_samples_equal_those_of_a_plain_implementation(order, sampling):
    model = build(order=order).double()
    labels, seeds, options = torch.tensor([0, 1, 2] * 4), image_seeds(1, 0, 12), SamplingConfig(**sampling)
    noise = CodeNoise(seeds, CODES).next(CELLS)
    expected = plain_sample(model, labels, options, noise)
    assert torch.equal(sample(model, labels, options, seeds), expected)
    assert len(expected.unique()) > 2
    known = KNOWN[:, model.order.argsort()]
    assert model.can_keep(known >= 0)
    kept = sample(model, labels, options, seeds, known)
    assert torch.equal(kept, plain_sample(model, labels, options, noise, known))
    assert torch.equal(kept[known >= 0], known[known >= 0])
    assert not torch.equal(kept, expected)


def test_only_codes_that_come_first_in_its_order_can_be_kept():
    model, known = build(order="columns"), torch.full((2, CELLS), -1)
    known[0, [0, 3]] = 1  # the first column
    assert model.can_keep(known >= 0)
    known[1, 1] = 1  # the first of the second column
    assert not model.can_keep(known >= 0)
    assert "'columns'" in model.keeps


@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_an_image_depends_on_its_seed_and_label_only(model, guidance_scale, weights):
    labels, seeds = torch.arange(12) % CLASSES, image_seeds(7, 0, 12)
    sampling = SamplingConfig(guidance_scale=guidance_scale, weights=weights)
    together = sample(model, labels, sampling, seeds)
    assert len(together.unique(dim=0)) > 8
    for size in (1, 5):
        parts = [sample(model, labels[i : i + size], sampling, seeds[i : i + size]) for i in range(0, 12, size)]
        assert torch.equal(torch.cat(parts), together)
    assert torch.equal(sample(model, labels.flip(0), sampling, seeds[::-1]), together.flip(0))
    assert torch.equal(sample(model, labels, sampling, seeds), together)


def test_the_first_code_has_the_frequencies_of_the_model(model):
    labels = torch.zeros(2000, dtype=torch.long)
    first = sample(model, labels, SamplingConfig(), image_seeds(0, 0, 2000))[:, 0]
    shares = model(torch.zeros(1, CELLS, dtype=torch.long), of(labels[:1]))[0, 0].softmax(0)
    torch.testing.assert_close(first.bincount(minlength=CODES) / 2000, shares.detach(), atol=0.04, rtol=0)


@pytest.mark.parametrize(("weights", "tolerance"), [("float32", 1e-6), ("bfloat16", 0.02), ("int8", 0.06)])
def test_rounded_weights_predict_nearly_the_same(codes, labels, weights, tolerance):
    model = build(order="snake")
    decoder = CausalTransformerDecoder(model, of(labels), weights)
    written = codes[:, model.order]
    logits = torch.stack([decoder.step(written[:, place - 1] if place else None) for place in range(CELLS)], 1)
    expected = model(written, of(labels)).detach()
    error = (logits - expected).norm() / expected.norm()
    assert error < tolerance
    assert weights == "float32" or error > tolerance / 30  # they are rounded
    nats, exact = model.decoded_nats(codes, of(labels), weights), model.nats(codes, of(labels), codes).sum(1)
    torch.testing.assert_close(nats, exact.detach(), rtol=tolerance, atol=CELLS * tolerance)
    samples = sample(model, labels, SamplingConfig(weights=weights, guidance_scale=2.0), image_seeds(0, 0, 4))
    assert samples.shape == (4, CELLS)
    assert set(samples.unique().tolist()) <= set(range(CODES))


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [{"order": "z_curve", "positions": "rotary"}, {"tied_head": True}])
def test_saving_and_loading_changes_nothing(tmp_path: Path, tiny_prior, codes, option):
    prior = tiny_prior(CODES, GRID, ["a", "b", "c"])
    model = prior.config.model.model_copy(update=option)
    prior = Prior(prior.config.model_copy(update={"model": model})).eval()
    for parameter in prior.parameters():
        nn.init.normal_(parameter, std=0.4)
    prior.save_pretrained(tmp_path / "model")
    loaded, labels = Prior.from_pretrained(tmp_path / "model"), torch.tensor([0, 1, 2, 0])
    grids, seeds = codes.view(4, *GRID), image_seeds(0, 0, 4)
    assert torch.equal(loaded.log_likelihood(grids, labels), prior.log_likelihood(grids, labels))
    assert torch.equal(loaded.sample(labels, SamplingConfig(), seeds), prior.sample(labels, SamplingConfig(), seeds))
    assert ("network.head.weight" in loaded.state_dict()) == (not model.tied_head)


def test_the_first_prediction_is_uniform(codes, labels):
    config = CausalTransformerConfig(hidden_size=16, depth=2, num_heads=2)
    assert (CausalTransformer(config, CODES, GRID, FORM)(codes, of(labels)) == 0).all()


def test_the_same_seed_builds_the_same_model(codes, labels):
    logits = []
    for _ in range(2):
        torch.manual_seed(3)
        config = CausalTransformerConfig(hidden_size=16, depth=2, num_heads=2, tied_head=True)
        logits.append(CausalTransformer(config, CODES, GRID, FORM).eval()(codes, of(labels)))
    assert torch.equal(*logits)
    assert logits[0].std() > 0


def test_dropout_only_applies_in_training(model, codes, labels):
    noisy = build(dropout=0.5)
    assert torch.equal(noisy(codes, of(labels)), model(codes, of(labels)))
    assert not torch.equal(noisy.train()(codes, of(labels)), model(codes, of(labels)))


def test_a_grid_may_have_a_single_cell(labels):
    config = CausalTransformerConfig(hidden_size=4, depth=1, num_heads=1)
    model = CausalTransformer(config, CODES, (1, 1), FORM).eval()
    assert model(torch.zeros(4, 1, dtype=torch.long), of(labels)).shape == (4, 1, CODES)
    assert sample(model, labels, SamplingConfig(), image_seeds(0, 0, 4)).shape == (4, 1)


@pytest.mark.parametrize("count", [1, 4, CELLS - 1])
@pytest.mark.parametrize("options", [{"positions": "relative", "order": "spiral"}, {"positions": "both"}])
@pytest.mark.parametrize("sequence", [0, 3])
def test_known_codes_are_read_in_one_pass_as_one_by_one(options, count, sequence):
    form = ContextForm(num_classes=2, pooled=bool(sequence), sequence=sequence)
    config = CausalTransformerConfig(hidden_size=16, depth=3, num_heads=2, **options)
    torch.manual_seed(0)
    model = CausalTransformer(config, CODES, GRID, form).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    context = Context(3, torch.tensor([0, 1, 2]))
    if sequence:
        present = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
        states = torch.randn(3, sequence, 16, dtype=torch.double)
        context = dataclasses.replace(context, pooled=states[:, 0], sequence=states, present=present)
    codes = torch.randint(CODES, (3, CELLS))
    at_once = CausalTransformerDecoder(model, context)  # as a GPU does it
    at_once.read(codes[:, :count])
    in_windows = model.continued(context, "float32", codes[:, :count])
    one_by_one = Autoregressive.continued(model, context, "float32", codes[:, :count])
    for cell in range(count, CELLS):
        expected = one_by_one(codes[:, cell - 1])
        torch.testing.assert_close(at_once.step(codes[:, cell - 1]), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(in_windows(codes[:, cell - 1]), expected, rtol=0, atol=1e-12)
