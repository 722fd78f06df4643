import dataclasses
import itertools
import math

import pytest
import torch
from contexts import branches, of, sample
from messages import refuses
from torch import Tensor, nn

from stage2_prior.networks import fast_linear
from stage2_prior.networks.autoregressive import ORDERS
from stage2_prior.networks.parallel_transformer import (
    ParallelDecoder,
    ParallelTransformer,
    ParallelTransformerConfig,
    group_mask,
    group_sizes,
    grouped_cells,
    groups_of,
)
from stage2_prior.sampling import CodeNoise, filter_logits, guidance_at, image_seeds
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.conditions.context import Context, ContextForm
from twostage.core.training.random import BatchRandom

CODES, GRID, CLASSES = 5, (3, 4), 3
CELLS = GRID[0] * GRID[1]
FORM = ContextForm(num_classes=CLASSES)
POSITIONS = ("learned", "rotary", "both", "relative")
FAST = {"positions": "relative", "mlp": "squared_relu", "biases": False}
GROUPS = torch.tensor([[2, 0, 1, 3, 1, 2, 3, 0, 2, 1, 3, 3], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]])


def build(codes: int = CODES, grid: tuple[int, int] = GRID, form: ContextForm = FORM, **options) -> ParallelTransformer:
    torch.manual_seed(0)
    config = ParallelTransformerConfig.model_validate(
        {"hidden_size": 16, "depth": 2, "num_heads": 2, "dropout": 0.0} | options
    )
    model = ParallelTransformer(config, codes, grid, form).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def random_codes(count: int) -> Tensor:
    return torch.randint(CODES, (count, CELLS), generator=torch.Generator().manual_seed(0))


def told_by_a_sequence() -> Context:
    """Of 3 images, whose sequences have 3, 1 and no places."""
    states = torch.randn(3, 3, 16, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    present = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    return dataclasses.replace(of(torch.tensor([0, 1, 2])), pooled=states[:, 0], sequence=states, present=present)


# --- what depends on what --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_code_is_predicted_from_all_codes_of_earlier_groups_and_from_no_others(positions):
    """By gradients: of the logits of each cell, to the embeddings of all codes and of all queries."""
    model, codes = build(positions=positions, depth=3), random_codes(2)
    embedded: list[Tensor] = []
    model.code_embedding.register_forward_hook(lambda *call: embedded.append(call[-1]))  # pyright: ignore[reportArgumentType]
    logits = model(codes, of(torch.tensor([0, 1])), GROUPS)
    assert [each.shape for each in embedded] == [(2, CELLS, 16)] * 2  # the codes, then the queries
    for cell in range(CELLS):
        touched = [
            (gradient != 0).any(2)
            for gradient in torch.autograd.grad(logits[:, cell].square().sum(), embedded, retain_graph=True)
        ]
        assert torch.equal(touched[0], GROUPS[:, cell, None] > GROUPS)
        assert torch.equal(touched[1], GROUPS[:, cell, None] == GROUPS)


def test_no_code_token_sees_a_query_or_a_later_group():
    seen = group_mask(GROUPS, torch.double) == 0
    assert seen.shape == (2, 1, 2 * CELLS, 2 * CELLS)
    of_codes, of_queries = seen[:, 0, :CELLS], seen[:, 0, CELLS:]
    later, same = GROUPS[:, None] > GROUPS[..., None], GROUPS[:, None] == GROUPS[..., None]
    assert torch.equal(of_codes[..., :CELLS], ~later)  # so all of one group see each other
    assert not of_codes[..., CELLS:].any()
    assert torch.equal(of_queries[..., :CELLS], ~later & ~same)
    assert torch.equal(of_queries[..., CELLS:], same)


def test_groups_of_one_in_raster_order_are_the_plain_chain_rule():
    model, codes = build(order="raster", num_steps=CELLS), random_codes(2)
    assert torch.equal(model.groups, torch.arange(CELLS))
    context, nats = of(torch.tensor([0, 1])), torch.zeros(2, dtype=torch.double)
    for cell in range(CELLS):
        others = torch.cat([codes[:, :cell], (codes[:, cell:] + 1) % CODES], 1)  # of this cell and those after it
        logits = model(others, context, model.groups[None])[:, cell]
        nats -= logits.log_softmax(-1).gather(1, codes[:, cell, None])[:, 0]
    found = model.nats_per_image(codes, context, BatchRandom(0, slice(0, 2), 2))
    torch.testing.assert_close(found.double(), nats, rtol=1e-6, atol=1e-6)


def test_every_cell_depends_on_the_conditions_and_on_its_place():
    model, codes = build(form=ContextForm(CLASSES, pooled=True, cells=True, sequence=3)), random_codes(1)
    context = dataclasses.replace(
        told_by_a_sequence().rows(torch.tensor([0])), cells=torch.zeros(1, CELLS, 16).double()
    )
    before = model(codes, context, GROUPS[:1])
    assert before.shape == (1, CELLS, CODES)
    assert len(before[0].unique(dim=0)) == CELLS
    assert context.pooled is not None
    assert context.sequence is not None
    assert context.cells is not None
    for changed in (
        {"labels": torch.tensor([1])},
        {"pooled": context.pooled + 1},
        {"sequence": context.sequence + 1},
        {"cells": context.cells + 1},
    ):
        assert (model(codes, dataclasses.replace(context, **changed), GROUPS[:1]) != before).any(2).all()


def test_absent_places_of_a_sequence_change_nothing():
    model, codes, context = (
        build(form=ContextForm(CLASSES, pooled=True, sequence=3)),
        random_codes(3),
        told_by_a_sequence(),
    )
    assert context.sequence is not None
    assert context.present is not None
    changed = dataclasses.replace(context, sequence=context.sequence.masked_fill(~context.present[..., None], 9.0))
    assert torch.equal(model(codes, context, GROUPS[:1]), model(codes, changed, GROUPS[:1]))


# --- the likelihood --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("order", "num_steps"), [("locality", 1), ("locality", 2), ("locality", 3), ("spiral", 4)])
def test_the_probabilities_of_all_grids_sum_to_1(order, num_steps):
    model = build(3, (2, 2), order=order, num_steps=num_steps)
    grids = torch.tensor(list(itertools.product(range(3), repeat=4)))
    for label in (0, CLASSES):
        labels = torch.full((len(grids),), label)
        shares = (-model.nats_per_image(grids, of(labels), BatchRandom(0, slice(0, 81), 81))).double().exp()
        assert shares.sum().item() == pytest.approx(1, abs=1e-6)
        assert shares.max() > 1.5 / len(grids)


def test_samples_occur_as_often_as_their_likelihood_says():
    model = build(2, (2, 2), num_steps=2)
    count, grids = 4000, torch.tensor(list(itertools.product(range(2), repeat=4)))
    shares = (-model.nats_per_image(grids, of(torch.zeros(16).long()), BatchRandom(0, slice(0, 16), 16))).exp()
    drawn = sample(model, torch.zeros(count, dtype=torch.long), SamplingConfig(), image_seeds(0, 0, count))
    counts = (drawn * torch.tensor([8, 4, 2, 1])).sum(1).bincount(minlength=16)
    error = (shares * (1 - shares) / count).sqrt()
    assert ((counts / count - shares).abs() < 4 * error).all()


def test_the_config_says_which_likelihood_it_is():
    named = ParallelTransformerConfig(num_steps=3, order="spiral").likelihood(GRID)
    assert "3 groups" in named
    assert "spiral" in named
    assert "independent" in named


# --- the groups ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cells", [1, 2, 6, 49, 64])
def test_the_groups_of_training_have_the_sizes_of_sampling(cells):
    for count in range(1, cells + 1):
        sizes = group_sizes(cells, count)
        assert (len(sizes), sum(sizes)) == (count, cells)
        assert min(sizes) >= 1
        assert groups_of(torch.arange(cells)[None], torch.tensor([count]))[0].bincount().tolist() == list(sizes)


@pytest.mark.parametrize("order", ["locality", *ORDERS])
@pytest.mark.parametrize("known", [(), (5,), (0, 3, 7, 10)])
def test_an_order_has_each_cell_once_and_the_known_ones_first(order, known):
    written = grouped_cells(order, GRID, known, group_sizes(CELLS - len(known), 4)).tolist()
    assert sorted(written) == list(range(CELLS))
    assert sorted(written[: len(known)]) == list(known)


def test_locality_writes_groups_near_known_cells_and_far_from_each_other():
    grid, sizes = (8, 8), group_sizes(64, 10)
    gaps = {}
    for order in ("locality", "raster"):
        cells = grouped_cells(order, grid, (), sizes)
        places = torch.stack([cells // 8, cells % 8], 1).double()
        distances = torch.cdist(places, places)
        ends = list(itertools.accumulate(sizes, initial=0))
        near, apart = [], []
        for start, end in itertools.pairwise(ends):
            if start:
                near += distances[start:end, :start].min(1).values.tolist()
            if end - start > 1:
                apart += (distances[start:end, start:end] + torch.eye(end - start) * 99).min(1).values.tolist()
        gaps[order] = sum(near) / len(near), sum(apart) / len(apart)
    assert gaps["locality"][0] < 1.3  # nearly all next to a known cell
    assert gaps["locality"][1] > 1.5 * gaps["raster"][1]


def test_by_default_there_are_about_ten_groups_for_8_by_8_cells():
    assert [ParallelTransformerConfig().default_steps(grid) for grid in ((8, 8), (7, 7), (16, 16), (1, 1))] == [
        10,
        9,
        20,
        1,
    ]


def test_more_groups_than_cells_are_refused():
    with refuses("model.num_steps 13", "at most 12", "3x4"):
        build(num_steps=CELLS + 1)


# --- training --------------------------------------------------------------------------------------------------------


def test_the_loss_predicts_every_code_once_from_the_inputs():
    model, codes, random = build(), random_codes(8), BatchRandom(3, slice(0, 8), 8)
    labels, inputs = torch.arange(8) % CLASSES, (random_codes(8) + 1) % CODES
    logits = model(inputs, of(labels), model._random_groups(codes, random))
    expected = -logits.log_softmax(-1).gather(-1, codes[..., None]).mean()
    torch.testing.assert_close(model.loss(codes, of(labels), inputs, random).double(), expected, rtol=1e-6, atol=1e-6)


def test_two_halves_of_a_batch_average_to_the_whole():
    model, codes, labels = build(), random_codes(8), torch.arange(8) % CLASSES
    whole = model.loss(codes, of(labels), codes, BatchRandom(3, slice(0, 8), 8))
    halves = [model.loss(codes[r], of(labels[r]), codes[r], BatchRandom(3, r, 8)) for r in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(torch.stack(halves).mean(), whole)


def test_training_draws_orders_and_numbers_of_groups_evenly():
    model, count = build(), 6000
    groups = model._random_groups(random_codes(count), BatchRandom(0, slice(0, count), count))
    counts = groups.amax(1) + 1
    assert sorted(counts.unique().tolist()) == list(range(3, CELLS + 1))
    for low, high in ((3, 5), (6, CELLS)):  # a uniform logarithm
        share = ((counts >= low) & (counts <= high)).double().mean().item()
        assert share == pytest.approx(math.log((high + 1) / low) / math.log((CELLS + 1) / 3), abs=0.03)
    first = (groups == 0).double()
    torch.testing.assert_close(first.mean(0), first.mean().expand(CELLS), rtol=0, atol=0.03)  # every cell
    sizes = groups[0].bincount().tolist()
    assert tuple(sizes) == group_sizes(CELLS, len(sizes))


def test_it_learns_codes_that_all_equal_the_first():
    torch.manual_seed(0)
    config = ParallelTransformerConfig(hidden_size=32, depth=2, num_heads=2, dropout=0.0, num_steps=4)
    model, count = ParallelTransformer(config, 4, (2, 3), FORM), 64
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    codes = (torch.arange(count) % 4)[:, None].expand(-1, 6).contiguous()
    context = of(torch.full((count,), CLASSES))
    for step in range(60):
        loss = model.loss(codes, context, codes, BatchRandom(step, slice(0, count), count))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    nats = model.eval().nats_per_image(codes, context, BatchRandom(0, slice(0, count), count)).mean().item()
    assert nats == pytest.approx(math.log(4), abs=0.1)  # the first code costs log 4, all others nothing
    drawn = sample(model, torch.full((20,), CLASSES), SamplingConfig(temperature=0.5), image_seeds(0, 0, 20))
    assert torch.equal(drawn, drawn[:, :1].expand(-1, 6))
    assert len(drawn.unique()) == 4


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[0, 2**16], ids=["packed", "plain"])
def worth_packing(request, monkeypatch) -> None:
    monkeypatch.setattr(fast_linear, "MIN_PACKED", request.param)


@pytest.mark.parametrize("sequence", [0, 3])
@pytest.mark.parametrize("options", [*({"positions": p} for p in POSITIONS), {"tied_head": True}, FAST])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-11)])
def test_cached_logits_equal_those_of_the_whole_grid(dtype, tolerance, options, sequence, worth_packing):
    model = build(form=ContextForm(CLASSES, pooled=bool(sequence), sequence=sequence), **options).to(dtype)
    codes, context = random_codes(3), of(torch.tensor([0, 1, CLASSES]))
    if sequence:
        context = told_by_a_sequence()
        assert context.sequence is not None
        assert context.pooled is not None
        context = dataclasses.replace(context, sequence=context.sequence.to(dtype), pooled=context.pooled.to(dtype))
    expected = model(codes, context, GROUPS[:1]).detach()
    order = GROUPS[0].argsort(stable=True)
    decoder, read, logits = ParallelDecoder(model, context, order), codes[:, :0], []
    for cells in order.split(GROUPS[0].bincount().tolist()):
        logits.append(decoder.step(read, len(cells)))
        read = codes[:, cells]
    found = torch.cat(logits, 1)[:, order.argsort()]
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def plain_sample(
    model: ParallelTransformer, labels: Tensor, options: SamplingConfig, seeds: list[int], known: Tensor
) -> Tensor:
    """Guided sampling as papers write it, image by image: nothing is cached."""
    codes = known.clone()
    for row, (given, seed) in enumerate(zip(known, seeds, strict=True)):
        cells, noise = (given >= 0).nonzero()[:, 0].tolist(), CodeNoise([seed], CODES)
        if len(cells) == CELLS:
            continue
        sizes = group_sizes(
            CELLS - len(cells), min(CELLS - len(cells), options.num_steps or model.config.default_steps(GRID))
        )
        order, groups = grouped_cells("locality", GRID, tuple(cells), sizes), torch.zeros(1, CELLS, dtype=torch.long)
        for start in itertools.accumulate(sizes, initial=len(cells)):
            groups[0, order[start:]] += 1
        start = len(cells)
        for number, size in enumerate(sizes):
            here, image = order[start : start + size], codes[row : row + 1].clamp(min=0)
            both = [model(image, of(torch.tensor([each])), groups)[0, here] for each in (int(labels[row]), CLASSES)]
            assert isinstance(options.guidance_scale, float)
            scale = 1 + (options.guidance_scale - 1) * guidance_at(number, len(sizes), options)
            logits = filter_logits(both[1] + scale * (both[0] - both[1]), options)
            codes[row, here] = (logits + noise.next(size)[0]).argmax(-1)
            start += size
    return codes


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_steps": 1},
        {"num_steps": CELLS, "guidance_scale": 3.0},
        {"num_steps": 5, "guidance_scale": 1.5, "top_k": 3, "temperature": 2.0, "guidance_schedule": "cosine"},
    ],
)
def test_samples_equal_those_of_a_plain_implementation(settings):
    model, options = build(), SamplingConfig(**settings)
    labels, seeds = torch.arange(6) % CLASSES, image_seeds(1, 0, 6)
    nothing = torch.full((6, CELLS), -1)
    drawn = sample(model, labels, options, seeds)
    assert torch.equal(drawn, plain_sample(model, labels, options, seeds, nothing))
    assert len(drawn.unique()) > 2
    random = torch.rand(6, CELLS, generator=torch.Generator().manual_seed(0))
    known = torch.where(random < torch.arange(6)[:, None] / 5, random_codes(6), -1)  # no image has the same cells
    known[4] = torch.where(known[3] < 0, known[3], random_codes(5)[4])  # but these two
    kept = sample(model, labels, options, seeds, known)
    assert torch.equal(kept, plain_sample(model, labels, options, seeds, known))
    assert torch.equal(kept[known >= 0], known[known >= 0])
    assert torch.equal(kept[5], known[5])
    assert model.can_keep(known >= 0)


@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_an_image_depends_on_its_seed_and_label_only(guidance_scale, weights):
    model = build().float()
    labels, seeds = torch.arange(12) % CLASSES, image_seeds(7, 0, 12)
    sampling = SamplingConfig(guidance_scale=guidance_scale, weights=weights)
    together = sample(model, labels, sampling, seeds)
    assert len(together.unique(dim=0)) > 8
    for rows in (slice(0, 1), slice(3, 8)):
        assert torch.equal(sample(model, labels[rows], sampling, seeds[rows]), together[rows])


def test_logits_are_the_same_to_the_last_bit_alone_and_in_a_batch():
    torch.manual_seed(0)
    config = ParallelTransformerConfig(hidden_size=256, depth=2, num_heads=4, positions="relative")
    model = ParallelTransformer(config, 512, (8, 8), FORM).eval()
    nn.init.normal_(model.head_weight, std=0.3)
    codes, order = torch.randint(512, (8, 64)), grouped_cells("locality", (8, 8), (), group_sizes(64, 10))
    batch = ParallelDecoder(model, of(torch.zeros(8, dtype=torch.long)), order)
    alone = ParallelDecoder(model, of(torch.zeros(1, dtype=torch.long)), order)
    start, read = 0, 0
    for size in group_sizes(64, 10):
        of_batch, of_one = batch.step(codes[:, read:start], size), alone.step(codes[:1, read:start], size)
        assert torch.equal(of_batch[:1], of_one)
        read, start = start, start + size


def test_a_grid_of_one_cell():
    model = build(grid=(1, 1))
    assert sample(model, torch.tensor([0, 1]), SamplingConfig(), [0, 1]).shape == (2, 1)
    random = BatchRandom(0, slice(0, 2), 2)
    assert (
        model.loss(torch.zeros(2, 1, dtype=torch.long), of(torch.tensor([0, 1])), torch.zeros(2, 1).long(), random) > 0
    )


def test_branches_of_some_images_keep_their_order():
    both = branches(torch.tensor([0, 1, 2]), CLASSES, SamplingConfig(guidance_scale=2.0)).rows(torch.tensor([2, 0]))
    assert both.images == 2
    assert both.context.labels is not None
    assert both.context.labels.tolist() == [2, 0, CLASSES, CLASSES]
