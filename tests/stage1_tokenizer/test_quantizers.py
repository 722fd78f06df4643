"""What the quantizers beside the plain codebook do: each against its definition, worked out here the long way."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from messages import refuses
from torch import Tensor, nn

from stage1_tokenizer.autoencoder_config import ModelConfig
from stage1_tokenizer.bottlenecks.binary_spherical import BinarySpherical, BinarySphericalConfig
from stage1_tokenizer.bottlenecks.bottleneck import Quantizer, pass_gradient
from stage1_tokenizer.bottlenecks.differentiable_vector import DiVeQ, DiVeQConfig
from stage1_tokenizer.bottlenecks.finite_scalar import FiniteScalar, FiniteScalarConfig
from stage1_tokenizer.bottlenecks.gumbel_softmax import GumbelSoftmax, GumbelSoftmaxConfig
from stage1_tokenizer.bottlenecks.index_backpropagation import IndexBackpropagation, IndexBackpropagationConfig
from stage1_tokenizer.bottlenecks.lookup_free import LookupFree, LookupFreeConfig, mean_choice
from stage1_tokenizer.bottlenecks.product_quantizer import ProductConfig, ProductQuantizer
from stage1_tokenizer.bottlenecks.projected_codebook import ProjectedCodebook, ProjectedCodebookConfig
from stage1_tokenizer.bottlenecks.residual_quantizer import ResidualConfig, ResidualQuantizer
from stage1_tokenizer.bottlenecks.vector_quantizer import VectorConfig, VectorQuantizer
from twostage.core.config.sections import parse_config
from twostage.core.training.optimizer import AveragedCopy
from twostage.core.training.random import BatchRandom


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def encodings(count: int = 8, dim: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, dim, 2, 3, generator=generator(seed))


def as_vectors(encoded: Tensor) -> Tensor:
    return rearrange(encoded, "b d h w -> (b h w) d")


def alone(statistics: Tensor) -> Tensor:
    return statistics


def build(
    name: str, size: int = 16, dim: int = 4, **options: object
) -> VectorQuantizer | ResidualQuantizer | ProductQuantizer:
    torch.manual_seed(0)
    if name == "product":
        each = VectorConfig(codebook_size=size, **options)
        return ProductConfig(groups=2, each=each).build((dim, 1, 1), 0)
    if name in LATER_CODEBOOKS:
        config, quantizer = LATER_CODEBOOKS[name]
        return quantizer(config(codebook_size=size, **options), dim)
    if name == "residual":
        return ResidualQuantizer(ResidualConfig(codebook_size=size, depth=2, **options), dim)
    kind = {"l2": {"l2_normalize": True}}.get(name, {"codebook": name})
    return VectorQuantizer(VectorConfig(codebook_size=size, **kind, **options), dim)


def scored() -> GumbelSoftmax:
    torch.manual_seed(0)
    return GumbelSoftmax(GumbelSoftmaxConfig(codebook_size=4), 3)


CODEBOOKS = ["ema", "learned", "simvq", "l2", "residual"]
LATER_CODEBOOKS = {
    "diveq": (DiVeQConfig, DiVeQ),
    "index_backpropagation": (IndexBackpropagationConfig, IndexBackpropagation),
    "projected": (ProjectedCodebookConfig, ProjectedCodebook),
}


# --- the gradient to the encoder ------------------------------------------------------------------------------------


def rotation_matrix(encoded: Tensor, quantized: Tensor) -> Tensor:
    """lambda R of equation 4 of the rotation trick, for one vector."""
    e, q = encoded / encoded.norm(), quantized / quantized.norm()
    r = (e + q) / (e + q).norm()
    turn = torch.eye(len(e)).double() - 2 * torch.outer(r, r) + 2 * torch.outer(q, e)
    return quantized.norm() / encoded.norm() * turn


def test_the_rotation_trick_rotates_the_gradient_like_the_vector():
    encoded = torch.randn(5, 6, generator=generator(), dtype=torch.double, requires_grad=True)
    quantized = torch.randn(5, 6, generator=generator(1), dtype=torch.double)
    gradient = torch.randn(5, 6, generator=generator(2), dtype=torch.double)
    z = pass_gradient(encoded, quantized, "rotation")
    torch.testing.assert_close(z, quantized)
    z.backward(gradient)
    for row in range(5):
        matrix = rotation_matrix(encoded[row].detach(), quantized[row])
        torch.testing.assert_close(matrix @ encoded[row].detach(), quantized[row])
        torch.testing.assert_close(encoded.grad[row], matrix.T @ gradient[row])


@pytest.mark.parametrize("quantized", [[0.0, 0.0], [-1.0, -2.0], [1.0, 2.0]])
def test_the_rotation_trick_is_finite_for_degenerate_directions(quantized):
    for start in ([1.0, 2.0], [0.0, 0.0]):
        encoded = torch.tensor([start], requires_grad=True)
        z = pass_gradient(encoded, torch.tensor([quantized]), "rotation")
        z.sum().backward()
        assert z.isfinite().all()
        assert encoded.grad.isfinite().all()


@pytest.mark.parametrize("rule", ["straight_through", "rotation"])
@pytest.mark.parametrize("name", CODEBOOKS)
def test_every_codebook_quantizer_passes_the_decoders_gradient(name, rule, whole_batch):
    quantizer, encoded = build(name, gradient=rule), encodings().requires_grad_()
    output = quantizer(encoded, None, whole_batch(8))
    torch.testing.assert_close(output.z, quantizer.encode(encoded).z, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad((output.z * encodings(seed=3)).sum(), encoded)
    if rule == "straight_through" and name != "l2":
        torch.testing.assert_close(gradient, encodings(seed=3))
    assert gradient.abs().sum() > 0


# --- normalised codes -----------------------------------------------------------------------------------------------


def test_l2_codes_are_compared_by_their_direction(whole_batch):
    quantizer, encoded = build("l2"), encodings() * 7
    for step in range(3):
        output = quantizer(encoded, None, whole_batch(8, step))
        cosines = F.cosine_similarity(as_vectors(encoded)[:, None], quantizer.codebook[None], dim=2)
        assert torch.equal(output.indices.flatten(), cosines.argmax(1))
        torch.testing.assert_close(output.z.norm(dim=1), torch.ones(8, 2, 3))
        quantizer.update_codebook(alone)
        torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(16))


def test_a_learned_l2_codebook_gets_no_gradient_along_its_codes(whole_batch):
    quantizer = VectorQuantizer(VectorConfig(codebook_size=16, codebook="learned", l2_normalize=True), 4)
    sum(quantizer(encodings(), None, whole_batch(8)).losses.values()).backward()
    along = (quantizer.codebook.grad * quantizer.codebook).sum(1)
    assert quantizer.codebook.grad.abs().max() > 1e-3
    torch.testing.assert_close(along, torch.zeros(16), atol=1e-6, rtol=0)


# --- SimVQ ----------------------------------------------------------------------------------------------------------


def test_simvq_moves_all_codes_by_one_linear_map(whole_batch):
    quantizer = build("simvq", revive_below=0.0)
    assert [name for name, _ in quantizer.named_parameters()] == ["projection"]
    fixed, before = quantizer.codebook.clone(), quantizer.codes()
    output = quantizer(encodings(1), None, whole_batch(1))
    sum(output.losses.values()).backward()
    with torch.no_grad():
        quantizer.projection -= 0.1 * quantizer.projection.grad
    quantizer.update_codebook(alone)
    assert torch.equal(quantizer.codebook, fixed)
    assert len(output.indices.unique()) < 16
    assert ((quantizer.codes() - before).norm(dim=1) > 0).all()  # those that nothing chose, too
    torch.testing.assert_close(quantizer.codes(), fixed @ quantizer.projection)


def test_simvq_revives_a_code_and_leaves_the_others_where_they_are(whole_batch):
    quantizer = build("simvq", ema_decay=0.5, revive_below=0.5)
    with torch.no_grad():
        quantizer.projection.copy_(torch.ones(4, 4))  # singular
        before = quantizer.codes()
    quantizer(encodings(), None, whole_batch(8))
    quantizer.update_codebook(alone)
    moved = (quantizer.codes() != before).any(1)
    assert 0 < moved.sum() < 16
    assert all((quantizer.codes()[code] == as_vectors(encodings())).all(1).any() for code in moved.nonzero())
    assert torch.equal(quantizer.projection, torch.eye(4))


def test_simvq_starts_on_the_data_under_any_map():
    quantizer = build("simvq", size=12)
    with torch.no_grad():
        quantizer.projection.copy_(torch.randn(4, 4, generator=generator(5)))
    encoded = encodings(2)
    quantizer.initialize(encoded, generator())
    torch.testing.assert_close(quantizer.encode(encoded).z, encoded, rtol=1e-3, atol=1e-3)


# --- revival --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CODEBOOKS, *LATER_CODEBOOKS, "product"])
def test_every_codebook_recovers_from_identical_distant_codes(name, whole_batch):
    """With vectors that drift away from the codes, as an encoder's do; measured with averaged weights."""
    quantizer = build(name, size=32, ema_decay=0.95)
    levels = [each for each in quantizer.modules() if isinstance(each, VectorQuantizer)]
    far = torch.tensor([[100.0, 90.0, 80.0, 70.0]])
    with torch.no_grad():
        for level in levels:
            away = level._normalized(far[:, : level.encoded_channels].expand(32, -1))
            level._place(away, torch.ones(32, dtype=torch.bool))
    clusters = 3 * torch.randn(32, 4, generator=generator())

    def data(seed: int) -> Tensor:
        members = (1 + seed / 1000) * clusters[torch.randint(32, (32, 2, 3), generator=generator(seed))]
        return (members + 0.3 * torch.randn(members.shape, generator=generator(seed))).movedim(-1, 1)

    assert len(levels[0].encode(data(0)[:, : levels[0].encoded_channels]).indices.unique()) == 1
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=1e-3) if list(quantizer.parameters()) else None
    tokenizer = nn.ModuleList([quantizer, nn.Linear(1, 1)])  # torch averages no model without parameters
    averaged = AveragedCopy(tokenizer, 0.999)
    for seed in range(1, 400):
        output = quantizer(data(seed), None, whole_batch(32, seed))
        if optimizer:
            optimizer.zero_grad()
            (F.mse_loss(output.z, data(seed)) + sum(output.losses.values())).backward()
            optimizer.step()
        quantizer.update_codebook(alone)
        averaged.update_parameters(tokenizer)
    codes = torch.cat([averaged.module[0].encode(data(seed)).indices.flatten(1) for seed in range(400, 410)])
    used = [len(codes[:, level :: len(levels)].unique()) for level in range(len(levels))]
    assert min(used) > 0.9 * 32


@pytest.mark.parametrize("name", ["learned", "simvq", *LATER_CODEBOOKS])
def test_a_code_restarts_in_the_averaged_weights_too(name, whole_batch):
    quantizer = build(name, size=8, ema_decay=0.5, revive_below=0.2)
    averaged = AveragedCopy(quantizer, 0.999)
    averaged.update_parameters(quantizer)
    with torch.no_grad():
        quantizer.codebook[0] = 1e3
        quantizer.codebook[1:] += 0.1
    for step in range(4):
        quantizer(encodings(8), None, whole_batch(8, step))
        quantizer.update_codebook(alone)
        if quantizer.restarted[0]:
            break
    assert quantizer.restarted[0]
    before = averaged.module.codes().clone()
    averaged.update_parameters(quantizer)
    moved, codes, averages = quantizer.restarted, quantizer.codes(), averaged.module.codes()
    torch.testing.assert_close(averages[moved], codes[moved])
    assert codes[moved].abs().max() < 10
    if name not in ("simvq", "projected"):  # theirs are buffers, which are copied
        assert not torch.equal(averages[~moved], codes[~moved])
        torch.testing.assert_close(averages[~moved], (before + 0.1 * 9 / 11)[~moved], atol=0.05, rtol=0)


# --- finite scalar --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [[3], [3, 5], [8, 5, 5, 5], [4, 3, 7]])
def test_finite_scalar_codes_are_all_combinations_of_levels(levels):
    quantizer = FiniteScalar(FiniteScalarConfig(levels=levels))
    size = math.prod(levels)
    vectors = quantizer.lookup(torch.arange(size).view(1, 1, size))[0, :, 0].T  # (size, D)
    expected = [[(digit - level // 2) / (level // 2) for digit in range(level)] for level in levels]
    wanted = {tuple(round(x, 4) for x in combination) for combination in itertools.product(*expected)}
    assert {tuple(round(x, 4) for x in vector.tolist()) for vector in vectors} == wanted
    assert quantizer.codebook_size == size


@pytest.mark.parametrize("levels", [[8, 5], [4, 3]])
def test_finite_scalar_rounds_to_the_nearest_level_and_back(levels, whole_batch):
    quantizer = FiniteScalar(FiniteScalarConfig(levels=levels))
    encoded = 2 * encodings(200, len(levels))
    output = quantizer(encoded, None, whole_batch(200))
    torch.testing.assert_close(output.z, quantizer.lookup(output.indices))
    assert len(output.indices.unique()) == math.prod(levels)
    extremes = quantizer.encode(torch.full((1, len(levels), 1, 1), 50.0)).indices
    assert extremes.item() == math.prod(levels) - 1
    assert quantizer.encode(torch.full((1, len(levels), 1, 1), -50.0)).indices.item() == 0
    assert quantizer.encode(torch.zeros(1, len(levels), 1, 1)).z.abs().max() == 0


def test_finite_scalar_passes_the_gradient_of_the_bound(whole_batch):
    quantizer = FiniteScalar(FiniteScalarConfig(levels=[8, 5]))
    encoded = encodings(2, 2).requires_grad_()
    quantizer(encoded, None, whole_batch(2)).z.sum().backward()
    half = torch.tensor([3.5, 2.0]).view(2, 1, 1) * 1.001
    shift = torch.atanh(torch.tensor([0.5, 0.0]).view(2, 1, 1) / half)
    width = torch.tensor([4.0, 2.0]).view(2, 1, 1)
    expected = half * (1 - torch.tanh(encoded.detach() + shift) ** 2) / width
    torch.testing.assert_close(encoded.grad, expected.expand_as(encoded))


def test_finite_scalar_needs_one_channel_per_level():
    document = {"latent_channels": 4, "bottleneck": {"type": "finite_scalar", "levels": [8, 5]}}
    with refuses("latent_channels 4", "[8, 5]", "set latent_channels to 2"):
        parse_config(ModelConfig, document, "model")


# --- lookup free ----------------------------------------------------------------------------------------------------


def test_lookup_free_codes_are_signs(whole_batch):
    quantizer, encoded = LookupFree(LookupFreeConfig(), 4), encodings(50)
    output = quantizer(encoded, None, whole_batch(50))
    assert torch.equal(output.z, encoded.sign())
    assert torch.equal(quantizer.lookup(output.indices), output.z)
    assert quantizer.codebook_size == 16
    assert len(output.indices.unique()) == 16


@pytest.mark.parametrize(("dim", "temperature"), [(1, 1.0), (4, 0.5), (5, 2.0)])
def test_lookup_free_entropies_equal_those_over_the_whole_codebook(dim, temperature, whole_batch):
    """p(c) ~ exp(-|z - c|^2 / T) over all 2^D codes, in float64; values and gradients."""
    config = LookupFreeConfig(temperature=temperature, entropy_weight=0.3, diversity_weight=2.0)
    quantizer, encoded = LookupFree(config, dim), encodings(3, dim).requires_grad_()
    losses = quantizer(encoded, None, whole_batch(3)).losses
    codes = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=dim)), dtype=torch.double)
    distances = (as_vectors(encoded).double()[:, None] - codes).square().sum(2)
    choice = torch.softmax(-distances / temperature, 1)
    expected = {
        "code_entropy": 0.3 * torch.special.entr(choice).sum(1).mean(),
        "codebook_entropy": -0.3 * 2.0 * torch.special.entr(choice.mean(0)).sum(),
        "commitment": 0.25 * (encoded.double() - encoded.sign().double()).square().mean(),
    }
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name].double(), value, rtol=1e-5, atol=1e-6)
        gradients = [torch.autograd.grad(loss, encoded, retain_graph=True)[0] for loss in (losses[name], value)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_certain_choices_have_a_finite_gradient(whole_batch):
    encoded = (1e4 * encodings()).requires_grad_()
    losses = LookupFree(LookupFreeConfig(), 4)(encoded, None, whole_batch(8)).losses
    assert torch.autograd.grad(sum(losses.values()), encoded)[0].isfinite().all()


def test_the_mean_choice_is_a_distribution_over_codes_in_their_order():
    logits = torch.full((3, 5), -40.0)
    logits[:, 1] = 40.0
    choice = mean_choice(logits)
    assert choice.argmax() == 2  # bit 1
    torch.testing.assert_close(choice.sum(), torch.tensor(1.0))


# --- residual -------------------------------------------------------------------------------------------------------


def test_residual_codes_are_the_nearest_to_what_is_left(whole_batch):
    quantizer, encoded = build("residual"), encodings()
    output = quantizer(encoded, None, whole_batch(8))
    assert output.indices.shape == (8, 2, 3 * 2)
    left, total = as_vectors(encoded).double(), torch.zeros(48, 4, dtype=torch.double)
    for depth, level in enumerate(quantizer.quantizers):
        codes = torch.cdist(left, level.codebook.double()).argmin(1)
        assert torch.equal(output.indices[:, :, depth::2].flatten(), codes)  # side by side, coarse first
        total, left = total + level.codebook[codes], left - level.codebook[codes]
    torch.testing.assert_close(as_vectors(output.z).double(), total, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(quantizer.lookup(output.indices), output.z)


def test_residual_losses_are_summed_over_depths(whole_batch):
    quantizer, encoded = build("residual", commitment_weight=0.5), encodings().requires_grad_()
    losses = quantizer(encoded, None, whole_batch(8)).losses
    left, expected = as_vectors(encoded.detach()), 0.0
    for level in quantizer.quantizers:
        left = left - level.embed(level.encode(left[..., None, None]).indices.flatten())
        expected += 0.5 * left.square().mean()
    torch.testing.assert_close(losses, {"commitment": expected})


def test_each_depth_starts_on_what_earlier_depths_leave_over(whole_batch):
    quantizer, encoded = build("residual", size=8), encodings(64)
    quantizer.initialize(encoded, generator())
    one = (quantizer.quantizers[0].encode(encoded).z - encoded).square().mean()
    both = (quantizer.encode(encoded).z - encoded).square().mean()
    assert both < 0.6 * one


# --- what they share ------------------------------------------------------------------------------------------------

QUANTIZERS = {
    **{name: lambda name=name: build(name, ema_decay=0.5, revive_below=0.5) for name in CODEBOOKS},
    "finite_scalar": lambda: FiniteScalar(FiniteScalarConfig(levels=[4, 3, 3, 3])),
    "lookup_free": lambda: LookupFree(LookupFreeConfig(entropy_weight=0.0), 4),
    "binary_spherical": lambda: BinarySpherical(BinarySphericalConfig(), 4),
    "gumbel_softmax": scored,
    **{name: lambda name=name: build(name, ema_decay=0.5, revive_below=0.5) for name in [*LATER_CODEBOOKS, "product"]},
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_two_processes_get_the_same_statistics_as_one(name):
    whole, *halves = (QUANTIZERS[name]() for _ in range(3))
    for step in range(3):
        encoded = encodings(8, seed=step)
        whole(encoded, None, BatchRandom(step, slice(0, 8), 8))
        whole.update_codebook(alone)
        parts = [slice(0, 4), slice(4, 8)]
        for half, rows in zip(halves, parts, strict=True):
            half(encoded[rows], None, BatchRandom(step, rows, 8))
        exchange(*halves)
        for half in halves:
            torch.testing.assert_close(half.state_dict(), whole.state_dict(), rtol=1e-4, atol=1e-5)


def exchange(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """Updates both with the sum of what either has gathered, as a reduction over two processes does."""
    mine, theirs = ([b for n, b in net.named_buffers() if "pending" in n] for net in (one, other))
    for a, b in zip(mine, theirs, strict=True):
        total = a + b
        a.copy_(total)
        b.copy_(total)
    one.update_codebook(alone)
    other.update_codebook(alone)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizers_work_in_float32_under_autocast(name, whole_batch):
    quantizer, encoded = QUANTIZERS[name](), encodings(64)
    expected = quantizer(encoded, None, whole_batch(64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = quantizer(encoded, None, whole_batch(64))
        low = quantizer(encoded.bfloat16(), None, whole_batch(64))
    assert torch.equal(output.indices, expected.indices)
    assert torch.equal(output.z, expected.z)
    assert low.z.dtype == torch.float32
    assert all(loss.dtype == torch.float32 for loss in output.losses.values())


@pytest.mark.parametrize("name", QUANTIZERS)
def test_usage_is_counted_only_in_training(name, whole_batch):
    quantizer = QUANTIZERS[name]()
    levels = [m for m in quantizer.modules() if isinstance(m, Quantizer)]
    quantizer.eval()(encodings(), None, whole_batch(8))
    quantizer.encode(encodings())
    assert all(level.pending_counts.sum() == 0 for level in levels)
    quantizer.train()(encodings(), None, whole_batch(8))
    assert all(level.pending_counts.sum() == 48 for level in levels)


def test_usage_metrics_by_hand():
    quantizer = Quantizer(4, 1)
    quantizer.ema_counts.copy_(torch.tensor([3.0, 3.0, 0.0, 0.001]))
    metrics = quantizer.usage_metrics()
    assert metrics["codebook_usage"] == 0.5
    assert metrics["perplexity"].item() == pytest.approx(2.0, rel=1e-2)


# --- codes as numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "quantizer",
    [
        FiniteScalar(FiniteScalarConfig(levels=[4, 3, 5])),
        LookupFree(LookupFreeConfig(), 5),
        BinarySpherical(BinarySphericalConfig(), 5),
    ],
    ids=lambda quantizer: type(quantizer).__name__,
)
def test_each_channel_of_a_code_is_a_digit(quantizer):
    """Counted from the least significant digit, a larger one is a larger value."""
    assert math.prod(quantizer.digits) == quantizer.codebook_size
    codes, power = torch.arange(quantizer.codebook_size), 1
    vectors = quantizer.lookup(codes[None, None])[0, :, 0]  # (C, K)
    for values, base in zip(vectors, quantizer.digits, strict=True):
        digit = codes // power % base
        of_digits = [values[digit == value].unique() for value in range(base)]
        assert all(len(found) == 1 for found in of_digits)
        assert (torch.cat(of_digits).diff() > 0).all()
        power *= base
