"""Codes as numbers with digits: their embedding, and a head that predicts one digit after another."""

import itertools
import math
from typing import cast

import numpy as np
import pytest
import torch
from contexts import ClassNetwork, of, sample
from messages import refuses
from torch import Tensor, nn

from stage2_prior.codes import CodeCache
from stage2_prior.networks.causal_transformer import (
    CausalTransformer,
    CausalTransformerConfig,
    CausalTransformerDecoder,
)
from stage2_prior.networks.code_head import Softmax, sample_codes
from stage2_prior.networks.digits import DigitEmbedding, DigitHead, DigitsConfig, digit_floats
from stage2_prior.networks.masked_transformer import MaskedTransformerConfig
from stage2_prior.networks.parallel_transformer import ParallelTransformerConfig
from stage2_prior.networks.pixelcnn import PixelCNNConfig
from stage2_prior.networks.scale_transformer import ScaleTransformer, ScaleTransformerConfig
from stage2_prior.networks.transformer import Transformer
from stage2_prior.prior import Prior, PriorLossConfig, prior_config
from stage2_prior.sampling import Branches, CodeNoise, image_seeds
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.conditions.context import Context, ContextForm
from twostage.core.training.random import BatchRandom

BASES, GRID, CLASSES = [2, 3, 2], (2, 3), 2
CODES, CELLS = math.prod(BASES), GRID[0] * GRID[1]
WIDTH = 8
NETWORKS: dict[str, type[DigitsConfig]] = {
    "causal": CausalTransformerConfig,
    "masked": MaskedTransformerConfig,
    "parallel": ParallelTransformerConfig,
    "pixelcnn": PixelCNNConfig,
}
SMALL = {
    "causal": {"hidden_size": 16, "depth": 2, "num_heads": 2, "dropout": 0.0},
    "masked": {"hidden_size": 16, "depth": 2, "num_heads": 2, "dropout": 0.0},
    "parallel": {"hidden_size": 16, "depth": 2, "num_heads": 2, "dropout": 0.0},
    "pixelcnn": {"channels": 8, "depth": 2, "head_channels": 8},
}


def build(name: str = "causal", grid: tuple[int, int] = GRID, bases: list[int] = BASES, **options: object) -> nn.Module:
    """A network with weights that differ from each other, as after training."""
    torch.manual_seed(0)
    config = NETWORKS[name].model_validate(SMALL[name] | {"codes": bases} | options)
    model = cast(nn.Module, config.build(math.prod(bases), grid, ContextForm(num_classes=CLASSES))).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def trained_head(bases: list[int] = BASES) -> DigitHead:
    torch.manual_seed(0)
    head = DigitHead(tuple(bases), WIDTH).double()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.7)
    return head


@pytest.fixture
def labels() -> Tensor:
    return torch.tensor([0, 1, CLASSES, 0])


@pytest.fixture
def codes() -> Tensor:
    return torch.randint(CODES, (4, CELLS), generator=torch.Generator().manual_seed(0))


# --- the head --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bases", [BASES, [2] * 5, [8, 5]])
def test_the_probabilities_of_all_codes_add_up_to_one(bases):
    head, hidden = trained_head(bases), torch.randn(4, WIDTH, dtype=torch.double)
    every = torch.arange(math.prod(bases))
    nats = torch.stack([head.nats(row.expand(len(every), -1), every) for row in hidden])
    torch.testing.assert_close((-nats.double()).exp().sum(1), torch.ones(4).double(), rtol=0, atol=1e-6)
    assert nats.std(1).min() > 0.5


def test_a_digit_depends_on_the_digits_before_it_and_on_no_others():
    """By the embeddings of the digits: whatever changes after a digit, its logits stay."""
    head, hidden = trained_head([3, 2, 4, 2]), torch.randn(1, WIDTH, dtype=torch.double)
    seen: list[Tensor] = []
    hook = head.earlier.register_forward_hook(lambda _, __, output: seen.append(output))
    logits: list[Tensor] = []
    head.out.register_forward_hook(lambda _, __, output: logits.append(output))
    head.nats(hidden, torch.tensor([17]))
    hook.remove()
    for digit in range(4):
        gradient = torch.autograd.grad(logits[0][0, digit].square().sum(), seen, retain_graph=True, allow_unused=True)[
            0
        ]
        touched = (gradient != 0).any(-1)[0]  # the embeddings of all digits but the last
        assert touched[:digit].all()
        assert not touched[digit:].any()


def test_the_gradient_is_that_of_finite_differences():
    head, codes = trained_head(), torch.tensor([0, 5, 11])

    def nats(hidden: Tensor) -> Tensor:
        rows = head.digits(codes) + head.digits.first
        predicted = head.inner(hidden)[:, None] + nn.functional.pad(head.earlier(rows[:, :-1]).cumsum(1), (0, 0, 1, 0))
        logits = head.out(nn.functional.gelu(predicted + head.bias, approximate="tanh"))
        parts = [part.log_softmax(-1) for part in logits.masked_fill(head.others, -torch.inf).unbind(1)]
        return -sum(part.gather(1, rows[:, i, None]) for i, part in enumerate(parts)).sum()

    hidden = torch.randn(3, WIDTH, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(nats, (hidden,))
    (expected,) = torch.autograd.grad(nats(hidden), hidden)
    (gradient,) = torch.autograd.grad(head.nats(hidden, codes).sum(), hidden)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-6)


def test_samples_have_the_frequencies_of_the_likelihood():
    head, hidden = trained_head(), torch.randn(1, WIDTH, dtype=torch.double)
    count, every = 20_000, torch.arange(CODES)
    noise = CodeNoise(image_seeds(0, 0, count), sum(BASES)).next(1)[:, 0]
    branches = Branches(Context(count))
    drawn = sample_codes(head, hidden.expand(count, -1), branches, 1.0, SamplingConfig(), noise)
    shares = (-head.nats(hidden.expand(CODES, -1), every)).exp().detach()
    torch.testing.assert_close(drawn.bincount(minlength=CODES) / count, shares, rtol=0, atol=0.015)


def test_guidance_temperature_and_top_p_apply_to_each_digit():
    """By a plain implementation that walks through the digits of one image."""
    head, hidden = trained_head(), torch.randn(2, WIDTH, dtype=torch.double)
    branches = Branches(Context(2), (3.0,))  # one image with its condition, then without
    noise = CodeNoise([5], sum(BASES)).next(1)[:, 0].double()
    sampling = SamplingConfig(temperature=0.7, top_p=0.6)
    (drawn,) = sample_codes(head, hidden, branches, 0.5, sampling, noise).tolist()
    code, power, row = 0, 1, 0
    total = head.inner(hidden)
    for digit, base in enumerate(BASES):
        logits = head.out(nn.functional.gelu(total + head.bias[digit], approximate="tanh"))[:, row : row + base]
        guided = (logits[1] + 2.0 * (logits[0] - logits[1])) / 0.7  # 1 + (3 - 1) * 0.5
        likely = guided.softmax(0).argsort(descending=True)
        shares = guided.softmax(0)[likely]
        kept = likely[shares.cumsum(0) - shares < 0.6]
        value = int(kept[(guided[kept] + noise[0, row : row + base][kept]).argmax()])
        if digit < len(BASES) - 1:
            total = total + head.earlier.weight[row + value]
        code, power, row = code + value * power, power * base, row + base
    assert drawn == code


def test_the_first_prediction_is_uniform():
    nats = DigitHead(tuple(BASES), WIDTH).nats(torch.randn(5, WIDTH), torch.arange(5))
    torch.testing.assert_close(nats, torch.full((5,), math.log(CODES)))


def test_an_embedding_is_the_sum_of_those_of_the_digits():
    embedding = DigitEmbedding(tuple(BASES), WIDTH, std=0.02, masked=True)
    weight = embedding.weight
    torch.testing.assert_close(embedding(torch.tensor([[9, CODES]]))[0, 0], weight[1] + weight[2 + 1] + weight[5 + 1])
    torch.testing.assert_close(embedding(torch.tensor([CODES]))[0], weight[-3:].sum(0))  # 9 = 1 + 2 (1 + 3 * 1)
    assert embedding(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, WIDTH)
    spread = DigitEmbedding((2,) * 16, 64, std=0.02)(torch.randint(2**16, (1000,))).std()
    assert 0.015 < spread < 0.025


# --- in the networks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["causal", "parallel", "pixelcnn"])
def test_the_probabilities_of_all_small_grids_add_up_to_one(name):
    model = cast(ClassNetwork, build(name, grid=(1, 2), bases=[2, 2, 3]))
    every = torch.tensor(list(itertools.product(range(12), repeat=2)))
    for label in range(CLASSES + 1):
        context = of(torch.full((len(every),), label))
        nats = model.nats_per_image(every, context, BatchRandom(0, slice(0, len(every)), len(every)))
        assert abs((-nats.double()).exp().sum().item() - 1) < 1e-5


def test_scales_of_digits_add_up_to_one():
    config = ScaleTransformerConfig(hidden_size=16, depth=1, num_heads=2, dropout=0.0, codes=[2, 2])
    config = config.for_codes(4, None, ((1, 1), (1, 2)))
    torch.manual_seed(0)
    model = ScaleTransformer(config, 4, ContextForm()).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    every = torch.tensor(list(itertools.product(range(4), repeat=3)))
    nats = model.nats_per_image(every, Context(len(every)), BatchRandom(0, slice(0, len(every)), len(every)))
    assert abs((-nats.double()).exp().sum().item() - 1) < 1e-5
    drawn = model.sample(Branches(Context(9)), SamplingConfig(), image_seeds(0, 0, 9))
    alone = [model.sample(Branches(Context(1)), SamplingConfig(), [seed]) for seed in image_seeds(0, 0, 9)]
    assert torch.equal(torch.cat(alone), drawn)


@pytest.mark.parametrize("name", ["causal", "pixelcnn"])
def test_changing_a_code_changes_its_own_nats_and_later_ones(name, codes, labels):
    model = build(name)
    before = model.nats(codes, of(labels), codes)
    for cell in range(CELLS):
        changed = codes.clone()
        changed[:, cell] = (changed[:, cell] + 1) % CODES
        after = model.nats(changed, of(labels), changed)
        assert torch.equal(before[:, :cell], after[:, :cell])
        assert (before[:, cell:] != after[:, cell:]).any(0).all()


def test_cached_predictions_equal_those_of_the_whole_grid(codes, labels):
    model = cast(CausalTransformer, build(positions="relative", order="snake")).double()
    decoder, ordered = CausalTransformerDecoder(model, of(labels)), codes[:, model.order]
    steps = [decoder.step(ordered[:, place - 1] if place else None) for place in range(CELLS)]
    torch.testing.assert_close(torch.stack(steps, 1), model(ordered, of(labels)).detach(), rtol=0, atol=1e-12)
    random = BatchRandom(0, slice(0, 4), 4)
    torch.testing.assert_close(model.decoded_nats(codes, of(labels)), model.nats_per_image(codes, of(labels), random))


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_an_image_depends_on_its_seed_and_label_only(name, scale):
    """Drawn alone, a causal transformer jumps."""
    model, labels, seeds = cast(ClassNetwork, build(name).double()), torch.arange(12) % CLASSES, image_seeds(7, 0, 12)
    sampling = SamplingConfig(guidance_scale=scale)
    together = sample(model, labels, sampling, seeds)
    assert together.min() >= 0
    assert together.max() < CODES
    assert len(together.unique(dim=0)) > 8
    for size in (1, 5):
        parts = [sample(model, labels[i : i + size], sampling, seeds[i : i + size]) for i in range(0, 12, size)]
        assert torch.equal(torch.cat(parts), together)


@pytest.mark.parametrize("name", NETWORKS)
def test_known_codes_are_kept(name):
    model, labels, seeds = cast(ClassNetwork, build(name)), torch.zeros(4, dtype=torch.long), image_seeds(7, 0, 4)
    known = torch.full((4, CELLS), -1)
    known[:, :3] = torch.tensor([11, 0, 7])
    drawn = sample(model, labels, SamplingConfig(), seeds, known)
    assert torch.equal(drawn[:, :3], known[:, :3])
    assert len(drawn.unique(dim=0)) > 1


def test_a_masked_transformer_fills_codes_with_the_frequencies_of_its_head():
    model = cast(ClassNetwork, build("masked", grid=(1, 1)))
    count = 4000
    drawn = sample(model, torch.zeros(count, dtype=torch.long), SamplingConfig(), image_seeds(0, 0, count))
    random = BatchRandom(0, slice(0, CODES), CODES)
    every = torch.arange(CODES)[:, None]
    shares = (-model.nats_per_image(every, of(torch.zeros(CODES, dtype=torch.long)), random)).exp().detach()
    torch.testing.assert_close(drawn.flatten().bincount(minlength=CODES) / count, shares, rtol=0, atol=0.03)


def test_a_gpt_learns_digits_that_depend_on_each_other():
    """A code and its complement, at random: every bit is even, but the others follow from the first."""
    torch.manual_seed(0)
    config = CausalTransformerConfig(hidden_size=16, depth=1, num_heads=2, dropout=0.0, codes=[2] * 5)
    model = cast(CausalTransformer, config.build(32, (1, 1), ContextForm()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    codes = torch.tensor([[0b01001], [0b10110]]).repeat(8, 1)
    random = BatchRandom(0, slice(0, 16), 16)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(codes, Context(16), codes, random).backward()
        optimizer.step()
    assert (
        abs(model.loss(codes, Context(16), codes, random).item() - math.log(2)) < 0.02
    )  # independent bits would need 5 ln 2


# --- configs, manifests, messages ------------------------------------------------------------------------------------


@pytest.fixture
def bits(tmp_path, write_codes):
    """A cache of 4-bit codes."""
    random = np.random.default_rng(0)
    grids = {name: random.integers(16, size=(8, *GRID)) for name in ("train", "val")}
    write_codes(tmp_path / "bits", grids, 16, digits=[2] * 4)
    return tmp_path / "bits"


def test_a_prior_learns_its_digits_from_the_codes(bits, tmp_path):
    config = CausalTransformerConfig(hidden_size=16, depth=1, num_heads=2, codes="digits")
    prior = Prior(prior_config(config, None, PriorLossConfig(), CodeCache(bits)))
    assert isinstance(prior.config.model, CausalTransformerConfig)
    assert prior.config.model.codes == [2, 2, 2, 2]
    for parameter in prior.parameters():
        nn.init.normal_(parameter, std=0.3)
    prior.save_pretrained(tmp_path / "prior")
    loaded = Prior.from_pretrained(tmp_path / "prior")
    assert loaded.config == prior.config
    assert torch.equal(loaded.sample(seeds=[1, 2]), prior.eval().sample(seeds=[1, 2]))


def test_a_table_is_the_default(bits):
    prior = Prior(prior_config(CausalTransformerConfig(hidden_size=16, depth=1, num_heads=2), None, PriorLossConfig(),
                               CodeCache(bits)))  # fmt: skip
    assert isinstance(prior.network, Transformer)
    assert prior.network.code_head == Softmax(16)
    assert isinstance(prior.network.code_embedding, nn.Embedding)


def test_codes_without_digits_are_refused(tmp_path, write_codes):
    grids = {name: np.arange(12).reshape(2, *GRID) for name in ("train", "val")}
    write_codes(tmp_path / "codes", grids, 12)
    cache = CodeCache(tmp_path / "codes")
    with refuses("model.codes", "'digits'", "12", "model.codes=table"):
        prior_config(CausalTransformerConfig(codes="digits"), None, PriorLossConfig(), cache)
    with refuses("model.codes", "[2, 2, 2]", "8", "12", "model.codes=table"):
        Prior(prior_config(CausalTransformerConfig(codes=[2, 2, 2]), None, PriorLossConfig(), cache))
    Prior(prior_config(CausalTransformerConfig(codes=[4, 3]), None, PriorLossConfig(), cache))


def test_digits_that_do_not_make_the_codebook_are_refused(tmp_path, write_codes):
    grids = {name: np.arange(12).reshape(2, *GRID) for name in ("train", "val")}
    with pytest.raises(ValueError, match=r"digits: the product of .* is 16, expected the codebook_size 12. Encode"):
        write_codes(tmp_path / "codes", grids, 12, digits=[2] * 4)


@pytest.mark.parametrize("wrong", [[16], [], [1, 16], "bits", [2, 2.5]])
def test_wrong_bases_are_refused(wrong):
    with pytest.raises(ValueError, match="codes"):
        CausalTransformerConfig.model_validate({"codes": wrong})


def test_a_tied_head_needs_a_table():
    with pytest.raises(ValueError, match=r"tied_head True: only applies to codes=table"):
        CausalTransformerConfig(tied_head=True, codes="digits")


def test_top_k_is_refused_and_top_p_is_not(bits):
    config = CausalTransformerConfig(hidden_size=16, depth=1, num_heads=2, codes="digits")
    prior = Prior(prior_config(config, None, PriorLossConfig(), CodeCache(bits)))
    with refuses("top_k 3", "model.codes", "top_p", "temperature"):
        prior.sample(sampling=SamplingConfig(top_k=3))
    prior.sample(sampling=SamplingConfig(top_p=0.9))


def test_large_codebooks_need_few_weights():
    sizes = {}
    for codes in ("table", [2] * 16):
        model = CausalTransformerConfig(hidden_size=64, depth=1, num_heads=2, codes=codes).build(
            2**16, GRID, ContextForm()
        )
        sizes[str(codes)] = sum(p.numel() for p in cast(nn.Module, model).parameters())
    assert sizes[str([2] * 16)] < sizes["table"] / 100
    assert digit_floats((2,) * 16, 64) < 2**16 / 10
