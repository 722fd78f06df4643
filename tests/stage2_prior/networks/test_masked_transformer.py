import itertools
import math
from typing import Any

import pytest
import torch
from contexts import branches, of, sample
from torch import Tensor, nn

from stage2_prior.networks.code_head import Softmax
from stage2_prior.networks.masked_transformer import (
    MEAN_MASKED_SHARE,
    MaskedPredictor,
    MaskedTransformer,
    MaskedTransformerConfig,
    gumbel,
    halton_order,
    masked_share,
    num_left_masked,
    sample_in_parallel,
)
from stage2_prior.sampling import guidance_at, image_seeds, uniform_noise
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.conditions.context import ContextForm
from twostage.core.errors import InputError
from twostage.core.training.random import BatchRandom

FAST = {"positions": "relative", "mlp": "squared_relu", "biases": False}
CODES, GRID, CLASSES = 5, (3, 4), 3
FORM = ContextForm(num_classes=CLASSES)
CELLS = GRID[0] * GRID[1]
MASK, NO_CLASS = CODES, CLASSES


def make_model(codebook_size: int = CODES, grid: tuple[int, int] = GRID, std: float = 1.0, **config: Any):
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"hidden_size": 16, "depth": 2, "num_heads": 2, "dropout": 0.0}
    model = MaskedTransformer(MaskedTransformerConfig(**(defaults | config)), codebook_size, grid, FORM).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model.double()  # in float64 no two logits tie


@pytest.fixture
def model() -> MaskedTransformer:
    return make_model()


def random_codes(count: int, codes: int = CODES, cells: int = CELLS, seed: int = 0) -> Tensor:
    return torch.randint(codes, (count, cells), generator=torch.Generator().manual_seed(seed))


def some_known(count: int) -> Tensor:
    """Known codes, a different number in each image, from none to all."""
    given = torch.rand(count, CELLS, generator=torch.Generator().manual_seed(5)).argsort(1).argsort(1)
    return random_codes(count, seed=7).masked_fill(given >= torch.linspace(0, CELLS, count).long()[:, None], -1)


def masked_of(codes: Tensor) -> Tensor:
    """The numbers of the masked codes."""
    return (codes == MASK).flatten().nonzero()[:, 0]


def watch_inputs(model: MaskedTransformer) -> list[Tensor]:
    """The codes (B, N) that the model receives from now on, one tensor for each forward pass."""
    inputs: list[Tensor] = []
    model.code_embedding.register_forward_hook(lambda _, given, __: inputs.append(given[0]))
    return inputs


# --- the mask schedules ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "arccos"])
def test_the_masked_share_falls_from_all_to_none_and_is_concave(schedule):
    share = masked_share(torch.linspace(0, 1, 101, dtype=torch.double), schedule)
    torch.testing.assert_close(share[[0, -1]], torch.tensor([1.0, 0.0], dtype=torch.double), atol=1e-12, rtol=0)
    steps = share.diff()
    assert (steps < 0).all()
    assert (steps.diff() < 0).all()  # so an image is filled in exactly its last step


@pytest.mark.parametrize("schedule", ["cosine", "arccos"])
def test_the_mean_masked_share_is_two_over_pi(schedule):
    middles = (torch.arange(100_000, dtype=torch.double) + 0.5) / 100_000
    assert masked_share(middles, schedule).mean().item() == pytest.approx(MEAN_MASKED_SHARE, abs=1e-6)
    assert pytest.approx(2 / math.pi) == MEAN_MASKED_SHARE


def test_the_two_mask_schedules_are_inverse_functions():
    progress = torch.linspace(0, 1, 11, dtype=torch.double)
    back = masked_share(masked_share(progress, "cosine"), "arccos")
    torch.testing.assert_close(back, progress)
    assert masked_share(progress, "cosine")[5].item() == pytest.approx(math.sqrt(0.5))
    assert masked_share(progress, "arccos")[5].item() == pytest.approx(2 / 3)


# --- the training loss ----------------------------------------------------------------------------------------------


def plain_loss(model: MaskedTransformer, codes: Tensor, labels: Tensor, inputs: Tensor, masked: Tensor) -> float:
    total = 0.0
    for image in range(len(codes)):
        shown = torch.where(masked[image], MASK, inputs[image])
        logits = model(shown[None], of(labels[image : image + 1]))[0].log_softmax(-1)
        for cell in range(CELLS):
            replaced = model.config.predict_replaced and inputs[image, cell] != codes[image, cell]
            if masked[image, cell] or replaced:
                total -= logits[cell, codes[image, cell]].item()
    return total / (len(codes) * CELLS * 2 / math.pi)


@pytest.mark.parametrize("schedule", ["cosine", "arccos"])
@pytest.mark.parametrize("predict_replaced", [False, True])
def test_the_loss_equals_a_plain_implementation(schedule, predict_replaced, whole_batch):
    model = make_model(mask_schedule=schedule, predict_replaced=predict_replaced)
    codes, labels = random_codes(8), torch.arange(8) % (CLASSES + 1)
    inputs = torch.where(
        torch.rand(8, CELLS, generator=torch.Generator().manual_seed(2)) < 0.3, random_codes(8, seed=1), codes
    )
    watched = watch_inputs(model)
    loss = model.loss(codes, of(labels), inputs, whole_batch(8))
    masked = watched[0] == MASK
    assert torch.equal(watched[0][~masked], inputs[~masked])
    assert loss.item() == pytest.approx(plain_loss(model, codes, labels, inputs, masked), rel=1e-5)
    ends = masked_share(torch.arange(9) / 8, schedule) * CELLS  # one image in each eighth of the schedule
    counts = masked.sum(1).sort(descending=True).values
    assert ((ends[1:] - 0.5 <= counts.clamp(min=1)) & (counts <= ends[:-1].clamp(min=1) + 0.5)).all()
    assert masked.any(1).all()


def test_masks_change_with_each_step_and_cover_all_cells_evenly(model, whole_batch):
    codes, labels, watched = random_codes(8), torch.zeros(8, dtype=torch.long), watch_inputs(model)
    for seed in range(200):
        model.loss(codes, of(labels), codes, whole_batch(8, seed))
    masked = torch.stack(watched) == MASK  # (200, 8, N)
    assert masked.double().mean().item() == pytest.approx(2 / math.pi, abs=0.02)
    assert (masked.double().mean((0, 1)) - 2 / math.pi).abs().max() < 0.05  # every cell
    assert (masked.double().mean((0, 2)) - 2 / math.pi).abs().max() < 0.07  # every place in the batch


@pytest.mark.parametrize("predict_replaced", [False, True])
def test_the_loss_covers_masked_codes_and_if_asked_replaced_codes(predict_replaced, whole_batch):
    model = make_model(predict_replaced=predict_replaced)
    codes, labels = random_codes(8), torch.zeros(8, dtype=torch.long)
    inputs = codes.clone()
    inputs[:, ::3] = (inputs[:, ::3] + 1) % CODES
    watched, predicted = watch_inputs(model), []
    model.norm.register_forward_hook(lambda _, __, output: predicted.append(output))
    loss = model.loss(codes, of(labels), inputs, whole_batch(8))
    gradient = torch.autograd.grad(loss, predicted[0])[0]  # (B, N, D)
    masked = watched[0] == MASK
    wanted = masked | (inputs != codes) if predict_replaced else masked
    assert torch.equal(gradient.abs().sum(-1) > 0, wanted)
    assert (inputs != codes)[~masked].any()


def test_two_halves_of_a_batch_average_to_the_whole(model):
    codes, labels = random_codes(8), torch.arange(8) % CLASSES
    whole = model.loss(codes, of(labels), codes, BatchRandom(3, slice(0, 8), 8))
    halves = [model.loss(codes[r], of(labels[r]), codes[r], BatchRandom(3, r, 8)) for r in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(torch.stack(halves).mean(), whole)
    bounds = [
        model.nats_per_image(codes[r], of(labels[r]), BatchRandom(3, r, 8))
        for r in (slice(0, 4), slice(4, 8), slice(0, 8))
    ]
    torch.testing.assert_close(torch.cat(bounds[:2]), bounds[2])


def test_an_untrained_model_has_about_log_codebook_size_nats_per_code(whole_batch):
    model = MaskedTransformer(MaskedTransformerConfig(hidden_size=16, depth=1, num_heads=2), CODES, GRID, FORM)
    codes, labels = random_codes(64), torch.zeros(64, dtype=torch.long)
    assert model.loss(codes, of(labels), codes, whole_batch(64)).item() == pytest.approx(math.log(CODES), rel=0.03)
    nats = model.nats_per_image(codes, of(labels), whole_batch(64))
    torch.testing.assert_close(nats / CELLS, torch.full_like(nats, math.log(CODES)))


# --- the bound ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_bound_is_the_mean_over_all_orders_and_above_the_mixture_of_them(whole_batch):
    model, cells = make_model(2, (2, 2)), 4
    codes, labels = torch.tensor([[0, 1, 1, 0]]), torch.tensor([1])
    orders = []
    for order in itertools.permutations(range(cells)):
        nats, shown = 0.0, torch.full((1, cells), 2)
        for cell in order:
            nats -= model(shown, of(labels))[0, cell].log_softmax(-1)[codes[0, cell]].item()
            shown[0, cell] = codes[0, cell]
        orders.append(nats)
    per_order = torch.tensor(orders, dtype=torch.double)
    bound, mixture = per_order.mean().item(), -torch.logsumexp(-per_order, 0).item() + math.log(len(orders))
    assert bound > mixture + 0.1
    draws = model.nats_per_image(codes.expand(20_000, -1), of(labels.expand(20_000)), whole_batch(20_000)).double()
    error = draws.std().item() / math.sqrt(len(draws))
    assert error < 0.01 * bound
    assert draws.mean().item() == pytest.approx(bound, abs=4 * error)


def test_the_bound_of_an_image_masks_every_number_of_codes_equally_often(model, whole_batch):
    watched = watch_inputs(model)
    model.nats_per_image(random_codes(3 * CELLS), of(torch.zeros(3 * CELLS, dtype=torch.long)), whole_batch(3 * CELLS))
    counts = (watched[0] == MASK).sum(1)
    assert counts.bincount().tolist() == [0] + [3] * CELLS


# --- the parallel steps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "arccos"])
@pytest.mark.parametrize("num_steps", [1, 2, 8, 37, 64])
def test_images_are_filled_in_exactly_their_last_step(schedule, num_steps):
    unknown = torch.arange(65)
    steps = unknown.clamp(max=num_steps)
    masked = unknown
    for step in range(1, num_steps + 1):
        left = num_left_masked(step, steps, unknown, masked, schedule)
        assert (left < masked)[masked > 0].all()
        assert torch.equal(left == 0, steps <= step)
        masked = left


def test_the_number_of_masked_codes_follows_the_schedule():
    unknown, counts = torch.tensor([256, 4]), []
    masked = unknown
    for step in range(1, 9):
        masked = num_left_masked(step, torch.tensor([8, 4]), unknown, masked, "cosine")
        counts.append(masked.tolist())
    assert [image for image, _ in counts] == [int(256 * math.cos(math.pi / 16 * t)) for t in range(1, 8)] + [0]
    assert [image for _, image in counts] == [3, 2, 1, 0, 0, 0, 0, 0]


def test_gumbel_noise_has_the_right_mean_and_variance_and_is_finite():
    noise = gumbel(uniform_noise([0], 100_000)[0])
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.05)
    assert gumbel(torch.tensor([0.0, 1 - 2**-53], dtype=torch.double)).isfinite().all()


@pytest.mark.parametrize("grid", [(1, 1), (3, 4), (8, 8), (16, 5)])
def test_the_halton_order_visits_each_cell_once_and_jumps(grid):
    order = halton_order(grid)
    assert order.sort().values.tolist() == list(range(math.prod(grid)))
    if math.prod(grid) < 60:
        return
    rows, columns = order[:16] // grid[1], order[:16] % grid[1]
    for half in (rows >= grid[0] // 2, columns >= grid[1] / 2):  # the first quarter is spread over the grid
        assert 5 <= half.sum() <= 11


# --- sampling -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_sample(
    model: MaskedTransformer, labels: Tensor, sampling: SamplingConfig, seeds: list[int], known: Tensor
) -> Tensor:
    """One image and one cell at a time; every step predicts the whole grid."""
    most, schedule = sampling.num_steps or 8, sampling.mask_schedule or model.config.mask_schedule
    heat = 4.5 if sampling.choice_temperature is None else sampling.choice_temperature
    images = []
    for label, seed, given in zip(labels.tolist(), seeds, known, strict=True):
        noise = uniform_noise([seed], most * 2 * CELLS).view(most, 2, CELLS)
        codes = [MASK if code < 0 else code for code in given.tolist()]
        unknown = codes.count(MASK)
        steps = min(most, unknown)
        for step in range(steps):
            grid = torch.tensor([codes])
            logits = model(grid, of(torch.tensor([label])))[0]
            if sampling.guidance_scale != 1:
                scale = 1 + (sampling.guidance_scale - 1) * guidance_at(step, steps, sampling)
                without = model(grid, of(torch.tensor([NO_CLASS])))[0]
                logits = without + scale * (logits - without)
            ranking = []
            for cell in [cell for cell in range(CELLS) if codes[cell] == MASK]:
                allowed = logits[cell] / sampling.temperature
                if sampling.top_k:
                    allowed[logits[cell].argsort(descending=True)[sampling.top_k :]] = -torch.inf
                code = int((allowed.softmax(0).cumsum(0) <= noise[step, 0, cell]).sum())
                chance = -math.log(-math.log(noise[step, 1, cell].item()))
                confidence = logits[cell].log_softmax(0)[code].item() + heat * (1 - (step + 1) / steps) * chance
                if sampling.cell_choice == "halton":
                    confidence = -halton_order(GRID).tolist().index(cell)
                ranking.append((confidence, cell, code))
            progress = torch.tensor((step + 1) / steps, dtype=torch.double)
            share = max(0.0, masked_share(progress, schedule).item())
            left = min(int(share * unknown), len(ranking) - 1)
            for _, cell, code in sorted(ranking)[left:]:
                codes[cell] = code
        images.append(codes)
    return torch.tensor(images)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"num_steps": 1},
        {"num_steps": CELLS, "choice_temperature": 0.0},
        {"num_steps": 5, "mask_schedule": "arccos", "temperature": 2.0},
        {"num_steps": 4, "guidance_scale": 3.0, "guidance_schedule": "cosine", "top_k": 3},
        {"guidance_scale": 0.0, "choice_temperature": 1.0},
        {"num_steps": 6, "cell_choice": "halton", "guidance_scale": 2.0},
        {"guidance_scale": 2.0, "guidance_schedule": "linear", "top_k": 1},
    ],
)
def test_samples_equal_those_of_a_plain_implementation(model, sampling, known):
    labels, seeds, options = torch.arange(12) % CLASSES, image_seeds(1, 0, 12), SamplingConfig(**sampling)
    given = some_known(12) if known else torch.full((12, CELLS), -1)
    expected = plain_sample(model, labels, options, seeds, given)
    assert torch.equal(sample(model, labels, options, seeds, given if known else None), expected)
    assert len(expected.unique()) > 2


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("known", [False, True])
def test_an_image_depends_on_its_seed_label_and_known_codes_only(model, guidance_scale, known):
    labels, seeds = torch.arange(12) % CLASSES, image_seeds(7, 0, 12)
    given = some_known(12) if known else torch.full((12, CELLS), -1)
    sampling = SamplingConfig(guidance_scale=guidance_scale)
    together = sample(model, labels, sampling, seeds, given)
    assert len(together.unique(dim=0)) > 8
    for size in (1, 5):
        parts = [slice(i, i + size) for i in range(0, 12, size)]
        apart = [sample(model, labels[p], sampling, seeds[p], given[p]) for p in parts]
        assert torch.equal(torch.cat(apart), together)
    assert torch.equal(sample(model, labels.flip(0), sampling, seeds[::-1], given.flip(0)), together.flip(0))


@pytest.mark.parametrize("num_steps", [1, 3, 8, CELLS])
def test_each_step_follows_the_schedule_and_never_changes_filled_codes(model, num_steps):
    known = some_known(6)
    sampling = SamplingConfig()
    unguided = branches(torch.zeros(6, dtype=torch.long), NO_CLASS, sampling)
    predictor = MaskedPredictor(model, unguided.context)
    noise = uniform_noise(image_seeds(0, 0, 6), num_steps * 2 * CELLS).view(6, num_steps, 2, CELLS)
    inputs: list[Tensor] = []
    told: list[int] = []

    def predict(codes: Tensor, masked: Tensor) -> Tensor:
        inputs.append(codes.clone())
        return predictor(codes, masked)

    codes = sample_in_parallel(
        predict, Softmax(CODES), unguided, noise, sampling, "cosine", 4.5, MASK, None, known, told.append
    )
    unknown = (known < 0).sum(1)
    steps = unknown.clamp(max=num_steps)
    expected = [unknown]
    for step in range(1, num_steps + 1):
        expected.append(num_left_masked(step, steps, unknown, expected[-1], "cosine"))
    grids = [*inputs, codes]
    assert len(inputs) == num_steps
    for step, grid in enumerate(grids):
        assert torch.equal((grid == MASK).sum(1), expected[step])
        assert torch.equal(grid[grid != MASK], codes[grid != MASK])
    assert told == [int((before - after).sum()) for before, after in itertools.pairwise(expected)]
    assert sum(told) == unknown.sum()


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_known_codes_are_kept_and_influence_the_others(model, guidance_scale):
    labels, seeds, known = torch.zeros(12, dtype=torch.long), image_seeds(0, 0, 12), some_known(12)
    sampling = SamplingConfig(guidance_scale=guidance_scale)
    codes = sample(model, labels, sampling, seeds, known)
    assert torch.equal(codes[known >= 0], known[known >= 0])
    assert 0 <= codes.min() <= codes.max() < CODES
    assert (known[0] < 0).all()
    assert (known[-1] >= 0).all()
    assert torch.equal(sample(model, labels[:1], sampling, seeds[:1]), codes[:1])  # none known
    others = torch.where(known < 0, -1, (known + 1) % CODES)
    changed = (sample(model, labels, sampling, seeds, others) != codes) & (known < 0)
    assert changed.any(1).sum() > 6


def test_images_whose_codes_are_all_known_stay_the_same(model):
    codes, told = random_codes(3), []
    sampled = sample(model, torch.zeros(3, dtype=torch.long), SamplingConfig(), [1, 2, 3], codes, told.append)
    assert torch.equal(sampled, codes)
    assert not told


def test_sampling_does_not_change_the_known_codes_it_receives(model):
    known = some_known(4)
    sample(model, torch.zeros(4, dtype=torch.long), SamplingConfig(), [1, 2, 3, 4], known)
    assert torch.equal(known, some_known(4))


def test_a_single_step_has_the_frequencies_of_the_model(model):
    labels = torch.zeros(2000, dtype=torch.long)
    codes = sample(model, labels, SamplingConfig(num_steps=1), image_seeds(0, 0, 2000))
    with torch.no_grad():
        shares = model(torch.full((1, CELLS), MASK), of(labels[:1]))[0].softmax(1)  # (N, K)
    counts = torch.stack([codes[:, cell].bincount(minlength=CODES) for cell in range(CELLS)])
    torch.testing.assert_close(counts / 2000, shares, atol=0.05, rtol=0, check_dtype=False)


@pytest.mark.parametrize("config", [{}, {"positions": "learned"}, {"positions": "rotary"}, {"tied_head": True}, FAST])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-12)])
def test_logits_of_masked_codes_equal_those_of_the_whole_grid(config, dtype, tolerance):
    model = make_model(**config).to(dtype)
    codes, labels = random_codes(6), torch.tensor([0, 1, 1, 2, NO_CLASS, 1])
    codes[torch.rand(6, CELLS, generator=torch.Generator().manual_seed(2)) < 0.5] = MASK
    codes[5], codes[3] = codes[1], random_codes(1)[0]  # two equal images, and one with nothing to predict
    with torch.no_grad():
        expected = model(codes, of(labels))[codes == MASK]
    logits = MaskedPredictor(model, of(labels))(codes, masked_of(codes))
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)
    assert logits.dtype == dtype


@pytest.mark.parametrize("known", [False, True])
def test_a_gpu_that_predicts_all_images_draws_the_same_codes(model, known, monkeypatch):
    labels, seeds, given = torch.arange(12) % CLASSES, image_seeds(1, 0, 12), some_known(12) if known else None
    sampling = SamplingConfig(guidance_scale=2.0, guidance_schedule="cosine", num_steps=5)
    expected = sample(model, labels, sampling, seeds, given)
    monkeypatch.setattr("stage2_prior.networks.masked_transformer.same_context", lambda context: None)  # as on a GPU
    assert torch.equal(sample(model, labels, sampling, seeds, given), expected)


@pytest.mark.parametrize(("weights", "tolerance"), [("bfloat16", 0.05), ("int8", 0.1)])
def test_rounded_weights_change_logits_only_slightly(weights, tolerance):
    model = make_model(hidden_size=32).float()
    codes, labels = random_codes(4), torch.tensor([0, 1, 2, NO_CLASS])
    codes[:, ::2] = MASK
    try:
        coarse = MaskedPredictor(model, of(labels), weights)(codes, masked_of(codes))
    except InputError as error:
        pytest.skip(str(error))
    exact = MaskedPredictor(model, of(labels))(codes, masked_of(codes))
    assert not torch.equal(coarse, exact)
    assert (coarse - exact).norm() < tolerance * exact.norm()


def test_a_grid_may_have_a_single_cell():
    model = make_model(grid=(1, 1), hidden_size=4, depth=1, num_heads=1)
    labels = torch.tensor([0, 1, 2, NO_CLASS])
    assert sample(model, labels, SamplingConfig(), image_seeds(0, 0, 4)).shape == (4, 1)


# --- learning -------------------------------------------------------------------------------------------------------


def test_an_overfitted_batch_is_sampled(whole_batch):
    torch.manual_seed(0)
    config = MaskedTransformerConfig(hidden_size=32, depth=2, num_heads=2, dropout=0.0)
    model = MaskedTransformer(config, 8, GRID, ContextForm(num_classes=4))
    codes, labels = random_codes(4, codes=8), torch.arange(4)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loss = torch.tensor(torch.inf)
    for step in range(300):
        optimizer.zero_grad()
        loss = model.loss(codes.repeat(4, 1), of(labels.repeat(4)), codes.repeat(4, 1), whole_batch(16, step))
        loss.backward()
        optimizer.step()
    model.eval()
    assert loss.item() < 0.05
    assert torch.equal(sample(model, labels, SamplingConfig(top_p=0.9), image_seeds(0, 0, 4)), codes)
    assert model.nats_per_image(codes, of(labels), whole_batch(4)).mean() < 1
