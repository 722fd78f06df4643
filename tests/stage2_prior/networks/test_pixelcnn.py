import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from contexts import of, sample
from messages import refuses
from torch import Tensor, nn

from stage2_prior.networks.pixelcnn import PixelCNN, PixelCNNConfig, PixelCNNDecoder
from stage2_prior.sampling import CodeNoise, guidance_at, image_seeds
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.conditions.context import ContextForm
from twostage.core.config.sections import parse_config
from twostage.core.training.random import BatchRandom

CODES, GRID, CLASSES = 7, (3, 5), 3
FORM = ContextForm(num_classes=CLASSES)
CELLS = GRID[0] * GRID[1]
NO_CLASS = CLASSES


def make_model(codes: int = CODES, grid: tuple[int, int] = GRID, **config) -> PixelCNN:
    """A model whose predictions depend on the class and on all codes, like those of a trained model."""
    torch.manual_seed(0)
    options = {"channels": 8, "depth": 4, "first_kernel": 5, "head_channels": 32} | config
    model = PixelCNN(PixelCNNConfig(**options), codes, grid, FORM).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


@pytest.fixture
def model() -> PixelCNN:
    return make_model()


@pytest.fixture
def codes() -> Tensor:
    return torch.randint(CODES, (4, CELLS), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels() -> Tensor:
    return torch.tensor([0, 1, 2, NO_CLASS])


def touched(model: PixelCNN, codes: Tensor, labels: Tensor, cell: int) -> Tensor:
    """Which input cells the logits of ``cell`` depend on: (B, h, w)."""
    embedded: list[Tensor] = []
    hook = model.code_embedding.register_forward_hook(lambda _, __, output: embedded.append(output))
    logits = model(codes, of(labels))
    hook.remove()
    gradients = torch.autograd.grad(logits[:, cell].square().sum(), embedded)[0]
    return (gradients != 0).any(2).unflatten(1, model.grid)


def plain_sample(
    model: PixelCNN, labels: Tensor, sampling: SamplingConfig, noise: Tensor, known: Tensor | None = None
) -> Tensor:
    """Guided sampling as papers write it: one full forward pass for each code."""
    codes = torch.zeros(noise.shape[:2], dtype=torch.long)
    cells = noise.shape[1]
    for cell in range(cells):
        branches = (labels, torch.full_like(labels, NO_CLASS))
        conditional, unconditional = (model(codes, of(classes))[:, cell] for classes in branches)
        scale = 1 + (sampling.guidance_scale - 1) * guidance_at(cell, cells, sampling)
        logits = unconditional + scale * (conditional - unconditional)
        logits = logits / sampling.temperature
        if sampling.top_k:
            unlikely = logits.argsort(descending=True)[:, sampling.top_k :]
            logits = logits.scatter(1, unlikely, -torch.inf)
        drawn = (logits + noise[:, cell]).argmax(1)
        codes[:, cell] = drawn if known is None else torch.where(known[:, cell] < 0, drawn, known[:, cell])
    return codes


# --- what a cell sees -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", [(5, 3), (3, 3), (7, 5)])
@pytest.mark.parametrize("cell", range(CELLS))
def test_logits_depend_on_all_earlier_codes_and_on_no_others(codes, labels, cell, kernels):
    model = make_model(depth=5, first_kernel=kernels[0], kernel=kernels[1])  # its field covers the grid
    seen = touched(model, codes, labels, cell).flatten(1)
    assert seen[:, :cell].all()  # no blind spot
    assert not seen[:, cell:].any()


@pytest.mark.parametrize("cell", range(CELLS))
def test_a_shallow_model_sees_its_receptive_field_and_nothing_else(codes, labels, cell):
    row, column = divmod(cell, GRID[1])
    seen = touched(make_model(depth=1, first_kernel=3), codes, labels, cell)
    expected = torch.zeros(GRID, dtype=torch.bool)
    expected[max(0, row - 1) : row, max(0, column - 1) : column + 2] = True
    expected[row, max(0, column - 1) : column] = True
    assert torch.equal(seen, expected.expand_as(seen))


def test_the_receptive_field_has_no_blind_spot_in_a_large_grid():
    grid, row, column = (9, 13), 8, 6
    model = make_model(grid=grid, depth=3, first_kernel=5, kernel=3)  # reaches 2 + 1 + 1 cells
    codes = torch.randint(CODES, (1, grid[0] * grid[1]), generator=torch.Generator().manual_seed(0))
    seen = touched(model, codes, torch.tensor([0]), row * grid[1] + column)[0]
    expected = torch.zeros(grid, dtype=torch.bool)
    expected[row - 4 : row, column - 4 : column + 5] = True
    expected[row, column - 4 : column] = True
    assert torch.equal(seen, expected)  # to the right as well, where masked convolutions are blind


@pytest.mark.parametrize("cell", range(CELLS))
def test_changing_a_code_changes_only_later_logits(model, codes, labels, cell):
    changed = codes.clone()
    changed[:, cell] = (changed[:, cell] + 1) % CODES
    before, after = model(codes, of(labels)), model(changed, of(labels))
    assert torch.equal(before[:, : cell + 1], after[:, : cell + 1])
    if cell < CELLS - 1:
        assert (before[:, cell + 1] != after[:, cell + 1]).any(1).all()


def test_every_cell_depends_on_the_class(model, codes):
    for one, other in itertools.combinations(range(CLASSES + 1), 2):
        logits, others = (model(codes[:1], of(torch.tensor([label]))) for label in (one, other))
        assert (logits != others).any(2).all()


def test_every_layer_has_its_own_class_bias_in_both_stacks(model, codes, labels):
    model(codes, of(labels)).square().sum().backward()
    tables = [layer.class_embedding.weight for layer in model.layers]
    assert len({id(table) for table in tables}) == model.config.depth
    for table in tables:
        assert table.grad is not None
        assert (table.grad != 0).all()  # (classes + 1, 4 C): each class, both stacks, both halves of the gate


# --- likelihood -----------------------------------------------------------------------------------------------------


def test_the_probabilities_of_all_grids_sum_to_one():
    model = make_model(codes=3, grid=(2, 3)).double()
    grids = torch.cartesian_prod(*[torch.arange(3)] * 6)  # (729, 6)
    random = BatchRandom(0, slice(0, len(grids)), len(grids))
    for label in range(CLASSES + 1):
        nats = model.nats_per_image(grids, of(torch.full((len(grids),), label)), random)
        assert nats.double().neg().exp().sum().item() == pytest.approx(1, abs=1e-5)
        assert nats.std() > 0.5
    assert model.exact_likelihood


def test_the_loss_predicts_the_true_codes_from_the_inputs(model, codes, labels, whole_batch):
    inputs = codes.roll(1, 0)
    expected = F.cross_entropy(model(inputs, of(labels)).flatten(0, 1), codes.flatten())
    torch.testing.assert_close(model.loss(codes, of(labels), inputs, whole_batch(4)), expected)
    per_image = model.nats_per_image(codes, of(labels), whole_batch(4))
    assert per_image.shape == (4,)
    torch.testing.assert_close(per_image.mean() / CELLS, model.loss(codes, of(labels), codes, whole_batch(4)))


def test_the_first_prediction_is_uniform(codes, labels, whole_batch):
    model = PixelCNN(PixelCNNConfig(channels=8, depth=3), CODES, GRID, FORM)
    assert (model(codes, of(labels)) == 0).all()
    assert model.loss(codes, of(labels), codes, whole_batch(4)).item() == pytest.approx(math.log(CODES))


def test_a_deep_model_overfits_a_batch(codes, labels, whole_batch):
    torch.manual_seed(0)
    model = PixelCNN(PixelCNNConfig(channels=16, depth=8, first_kernel=5), CODES, GRID, FORM)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.loss(codes, of(labels), codes, whole_batch(4))
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02


def test_dropout_only_applies_in_training(model, codes, labels):
    noisy = make_model(dropout=0.5)
    noisy.load_state_dict(model.state_dict())
    assert torch.equal(noisy.eval()(codes, of(labels)), model(codes, of(labels)))
    assert not torch.equal(noisy.train()(codes, of(labels)), model(codes, of(labels)))


# --- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("config", [{}, {"depth": 1}, {"first_kernel": 3, "kernel": 5}, {"first_kernel": 13}])
def test_incremental_logits_equal_those_of_the_whole_grid(codes, labels, config, dtype, tolerance):
    model = make_model(**config).to(dtype)
    decoder = PixelCNNDecoder(model, of(labels))
    steps = [decoder.step(codes[:, cell - 1] if cell else None) for cell in range(CELLS)]
    torch.testing.assert_close(torch.stack(steps, 1), model(codes, of(labels)).detach(), rtol=tolerance, atol=tolerance)
    assert steps[0].dtype == dtype


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"guidance_scale": 3.0},
        {"guidance_scale": 0.0},
        {"guidance_scale": 4.0, "guidance_schedule": "linear"},
        {"guidance_scale": 1.5, "guidance_schedule": "cosine", "top_k": 3, "temperature": 2.0},
    ],
)
@pytest.mark.parametrize("known_cells", [0, 7])
def test_samples_equal_those_of_one_full_forward_pass_per_code(sampling, known_cells):
    model, options = make_model().double(), SamplingConfig(**sampling)
    labels, seeds = torch.tensor([0, 1, 2, NO_CLASS] * 8), image_seeds(1, 0, 32)
    known = torch.full((32, CELLS), -1)
    known[1:, :known_cells] = torch.randint(CODES, (31, known_cells), generator=torch.Generator().manual_seed(2))
    expected = plain_sample(model, labels, options, CodeNoise(seeds, CODES).next(CELLS), known)
    assert torch.equal(sample(model, labels, options, seeds, known), expected)
    assert len(expected.unique(dim=0)) == 32


def test_sampling_uses_no_dropout():
    labels, seeds = torch.zeros(8, dtype=torch.long), image_seeds(0, 0, 8)
    model = make_model(dropout=0.5)
    expected = sample(model, labels, SamplingConfig(), seeds)
    assert torch.equal(sample(model.train(), labels, SamplingConfig(), seeds), expected)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_an_image_depends_on_its_seed_and_label_only(model, guidance_scale):
    labels, seeds = torch.arange(12) % CLASSES, image_seeds(7, 0, 12)
    sampling = SamplingConfig(guidance_scale=guidance_scale)
    together = sample(model, labels, sampling, seeds)
    assert len(together.unique(dim=0)) == 12
    for size in (1, 5):
        parts = [sample(model, labels[i : i + size], sampling, seeds[i : i + size]) for i in range(0, 12, size)]
        assert torch.equal(torch.cat(parts), together)
    assert torch.equal(sample(model, labels.flip(0), sampling, seeds[::-1]), together.flip(0))
    assert not torch.equal(sample(model, (labels + 1) % CLASSES, sampling, seeds), together)


def test_the_first_code_has_the_frequencies_of_the_model(model):
    labels = torch.zeros(2000, dtype=torch.long)
    first = sample(model, labels, SamplingConfig(), image_seeds(0, 0, 2000))[:, 0]
    shares = model(torch.zeros(1, CELLS, dtype=torch.long), of(labels[:1]))[0, 0].softmax(0)
    torch.testing.assert_close(first.bincount(minlength=CODES) / 2000, shares.detach(), atol=0.04, rtol=0)


def test_only_codes_that_come_first_can_be_kept(model):
    known = torch.full((2, CELLS), -1)
    known[:, :4] = 1
    assert model.can_keep(known >= 0)
    known[1, 8] = 1
    assert not model.can_keep(known >= 0)


# --- shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (4, 1), (2, 2)])
def test_grids_may_be_smaller_than_the_kernels(labels, grid):
    model, cells = make_model(grid=grid, first_kernel=7, kernel=5), grid[0] * grid[1]
    codes = torch.randint(CODES, (4, cells), generator=torch.Generator().manual_seed(0))
    logits = model(codes, of(labels))
    assert logits.shape == (4, cells, CODES)
    decoder = PixelCNNDecoder(model, of(labels))
    steps = [decoder.step(codes[:, cell - 1] if cell else None) for cell in range(cells)]
    torch.testing.assert_close(torch.stack(steps, 1), logits.detach(), rtol=1e-5, atol=1e-5)
    assert sample(model, labels, SamplingConfig(), image_seeds(0, 0, 4)).shape == (4, cells)


def test_training_under_autocast_gives_gradients_to_all_weights(codes, labels, whole_batch):
    model = make_model().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(codes, of(labels), codes, whole_batch(4))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(model.loss(codes, of(labels), codes, whole_batch(4)).item(), rel=0.02)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize(
    ("kernels", "named"),
    [
        ({"first_kernel": 4}, "first_kernel 4"),
        ({"kernel": 1}, "kernel 1"),
        ({"first_kernel": 1, "kernel": 6}, "first_kernel 1 and kernel 6"),
    ],
)
def test_kernels_must_have_a_centre(kernels, named):
    with refuses(named, "odd and at least 3"):
        parse_config(PixelCNNConfig, kernels, "model")
