"""The scale transformer: what each code sees, its likelihood, and its sampling."""

import itertools
import math

import numpy as np
import pytest
import torch
from contexts import branches, of, sample
from messages import refuses
from pydantic import ValidationError
from torch import Tensor, nn

from stage2_prior.codes import CodeCache, Manifest
from stage2_prior.networks.causal_transformer import CausalTransformerConfig
from stage2_prior.networks.pixelcnn import PixelCNNConfig
from stage2_prior.networks.scale_transformer import ScaleDecoder, ScaleTransformer, ScaleTransformerConfig, cells_in
from stage2_prior.prior import Prior, PriorLossConfig, prior_config
from stage2_prior.sampling import image_seeds
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.conditions.context import Context, ContextForm
from twostage.core.scales import num_codes, split_scales
from twostage.core.training.random import BatchRandom

SCALES, CODES, CLASSES = ((1, 1), (2, 2), (3, 4)), 5, 3
CELLS = num_codes(SCALES)
SMALL = {"hidden_size": 16, "depth": 2, "num_heads": 2, "dropout": 0.0}
FORM = ContextForm(num_classes=CLASSES)
EVERY_PART = ContextForm(num_classes=CLASSES, pooled=True, cells=True, sequence=3)


def make_model(scales=SCALES, codes: int = CODES, form: ContextForm = FORM, **config: object) -> ScaleTransformer:
    torch.manual_seed(0)
    settings = ScaleTransformerConfig.model_validate(SMALL | config).for_codes(codes, None, scales)
    model = settings.build(codes, (1, num_codes(scales)), form).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.double()  # in float64 no two logits tie


def random_codes(count: int, seed: int = 0) -> Tensor:
    return torch.randint(CODES, (count, CELLS), generator=torch.Generator().manual_seed(seed))


def whole_context(count: int) -> Context:
    """One that has every part; the sequence ends early in the first image."""
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator, dtype=torch.double)

    present = torch.ones(count, 3, dtype=torch.bool)
    present[0, 1:] = False
    return Context(count, torch.arange(count) % CLASSES, noise(16), noise(12, 16), noise(3, 16), present)


def number_of_scale() -> Tensor:
    return torch.cat([torch.full((math.prod(scale),), s) for s, scale in enumerate(SCALES)])


# --- what a code sees -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["learned", "rotary", "both"])
def test_a_code_sees_all_coarser_codes_and_no_others(positions):
    """By gradients: of the logits at each place with respect to the embedding of each code."""
    model, embedded = make_model(positions=positions), []

    def watch(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    model.code_embedding.register_forward_hook(watch)
    logits, scale = model(random_codes(2), of(torch.tensor([0, 1]))), number_of_scale()
    assert [tuple(each.shape) for each in embedded] == [(2, 1, 1, 16), (2, 2, 2, 16)], "the finest codes are not read"
    for place in range(CELLS):
        total = logits[:, place].square().sum()
        for coarse, each in enumerate(embedded):
            (gradient,) = torch.autograd.grad(total, each, retain_graph=True, allow_unused=True)
            seen = torch.zeros(1) if gradient is None else gradient.abs().sum(-1)
            assert (seen > 0).all() if coarse < scale[place] else (seen == 0).all()


def test_changed_codes_change_finer_predictions_only():
    model, codes, context, scale = make_model(), random_codes(1), of(torch.tensor([1])), number_of_scale()
    before = model(codes, context)
    for place in range(CELLS):
        changed = codes.clone()
        changed[0, place] = (changed[0, place] + 1) % CODES
        differs = (model(changed, context) != before).any(-1)[0]
        assert torch.equal(differs, scale > scale[place])


def test_it_reads_the_sum_of_the_coarser_codes():
    """As the tokenizer computes it, with torch's interpolation."""
    model, codes = make_model(), random_codes(2)
    grids, table = split_scales(codes, SCALES), model.code_embedding.weight
    first = table[grids[0]].permute(0, 3, 1, 2)
    second = table[grids[1]].permute(0, 3, 1, 2)
    sums = nn.functional.interpolate(first, SCALES[-1], mode="bicubic")
    parts = [torch.zeros_like(first), nn.functional.interpolate(sums, SCALES[1], mode="area")]
    parts.append(sums + nn.functional.interpolate(second, SCALES[-1], mode="bicubic"))
    expected = torch.cat([part.flatten(2) for part in parts], 2).transpose(1, 2)
    torch.testing.assert_close(model.read(codes), expected, rtol=1e-5, atol=1e-6)


def test_cells_lie_where_their_pixels_are():
    assert cells_in((4, 4), (1, 1)).tolist() == [[1.5, 1.5]]
    assert cells_in((4, 4), (2, 2)).tolist() == [[0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5]]
    assert cells_in((2, 3), (2, 3)).tolist() == [[y, x] for y in range(2) for x in range(3)]


def test_what_is_said_about_cells_reaches_all_scales():
    model, context, scale = make_model(form=EVERY_PART), whole_context(2), number_of_scale()
    cells = context.cells.requires_grad_()
    logits = model(random_codes(2), context)
    for place in (0, 1, CELLS - 1):
        (gradient,) = torch.autograd.grad(logits[:, place].sum(), cells, retain_graph=True)
        assert (gradient.abs().sum(-1) > 0).all() if scale[place] == 2 else gradient.abs().sum() > 0


# --- the likelihood -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", [((1, 1), (2, 2)), ((1, 2), (2, 2), (2, 3))])
def test_the_probabilities_of_all_grids_sum_to_1(scales):
    model = make_model(scales, 2)
    codes = torch.tensor(list(itertools.product(range(2), repeat=num_codes(scales))))
    nats = model.nats_per_image(codes, of(torch.zeros(len(codes), dtype=torch.long)), BatchRandom(0, slice(0, 1), 1))
    assert nats.std() > 0.1
    assert (-nats.double()).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_samples_follow_the_likelihood():
    scales = ((1, 1), (1, 2))
    model = make_model(scales, 2)
    grids = torch.tensor(list(itertools.product(range(2), repeat=3)))
    nats = model.nats_per_image(grids, of(torch.zeros(8, dtype=torch.long)), BatchRandom(0, slice(0, 8), 8))
    drawn = sample(model, torch.zeros(4000, dtype=torch.long), SamplingConfig(), image_seeds(0, 0, 4000))
    found = torch.bincount((drawn * torch.tensor([4, 2, 1])).sum(1), minlength=8) / 4000
    torch.testing.assert_close(found, (-nats).exp().float(), atol=0.03, rtol=0)


def test_the_loss_is_the_nats_per_code_of_the_true_codes():
    model, codes, inputs = make_model(), random_codes(4), random_codes(4, seed=1)
    context, random = of(torch.arange(4) % CLASSES), BatchRandom(0, slice(0, 4), 4)
    logs = model(inputs, context).log_softmax(-1)
    expected = -logs.gather(2, codes[..., None]).mean()
    torch.testing.assert_close(model.loss(codes, context, inputs, random).double(), expected, rtol=1e-5, atol=1e-6)
    nats = model.nats_per_image(codes, context, random)
    torch.testing.assert_close(nats.mean() / CELLS, model.loss(codes, context, codes, random))


# --- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["learned", "rotary", "both"])
@pytest.mark.parametrize("form", [FORM, EVERY_PART])
def test_cached_predictions_equal_those_of_the_whole_row(positions, form):
    model, codes = make_model(form=form, positions=positions), random_codes(3)
    context = of(torch.arange(3)) if form is FORM else whole_context(3)
    decoder, found = ScaleDecoder(model, context), []
    for grid in [None, *split_scales(codes, SCALES)[:-1]]:
        found.append(decoder.step(grid))
    torch.testing.assert_close(torch.cat(found, 1), model(codes, context), rtol=1e-10, atol=1e-10)


def test_an_image_depends_on_its_seed_and_its_class_alone():
    model, settings = make_model().float(), SamplingConfig(guidance_scale=1.5, guidance_schedule="linear", top_k=4)
    seeds, labels = image_seeds(7, 0, 6), torch.arange(6) % CLASSES
    together = sample(model, labels, settings, seeds)
    alone = [sample(model, labels[i : i + 1], settings, seeds[i : i + 1]) for i in range(6)]
    assert torch.equal(torch.cat(alone), together)
    assert len(together.unique(dim=0)) > 1


def test_guidance_grows_from_scale_to_scale():
    model, labels, seeds = make_model(), torch.zeros(64, dtype=torch.long), image_seeds(0, 0, 64)
    plain = sample(model, labels, SamplingConfig(), seeds)
    grown = sample(model, labels, SamplingConfig(guidance_scale=8.0, guidance_schedule="linear"), seeds)
    constant = sample(model, labels, SamplingConfig(guidance_scale=8.0), seeds)
    assert torch.equal(grown[:, 0], plain[:, 0]), "the first scale is not guided"
    assert not torch.equal(constant[:, 0], plain[:, 0])
    assert not torch.equal(grown, plain)


def test_given_scales_are_kept_and_seen():
    """A small image grows: its codes are given, the finer ones are drawn as if they had been drawn before."""
    model, labels, seeds = make_model(), torch.arange(4) % CLASSES, image_seeds(0, 0, 4)
    drawn, counts = sample(model, labels, SamplingConfig(), seeds), []
    known = drawn.clone()
    known[:, 5:] = -1
    again = sample(model, labels, SamplingConfig(), seeds, known, counts.append)
    assert torch.equal(again, drawn)
    assert sum(counts) == 4 * 12
    known[:, :5] = (known[:, :5] + 1) % CODES
    other = sample(model, labels, SamplingConfig(), seeds, known)
    assert torch.equal(other[:, :5], known[:, :5])
    assert not torch.equal(other[:, 5:], drawn[:, 5:])
    assert model.can_keep(known >= 0)
    assert (branches(labels, CLASSES, SamplingConfig()).images, model.keeps) == (4, "any codes")


# --- with codes on disk ---------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, write_codes) -> CodeCache:
    codes = {name: random_codes(20, seed)[:, None].numpy() for seed, name in enumerate(("train", "val"))}
    labels = {name: np.arange(20) % 2 for name in codes}
    write_codes(tmp_path / "codes", codes, CODES, ["a", "b"], labels, scales=SCALES)
    return CodeCache(tmp_path / "codes")


def test_a_prior_is_saved_and_loaded_with_its_scales(cache, tmp_path):
    config = prior_config(ScaleTransformerConfig.model_validate(SMALL), None, PriorLossConfig(), cache)
    prior = Prior(config).eval()
    prior.save_pretrained(tmp_path / "prior")
    loaded = Prior.from_pretrained(tmp_path / "prior")
    assert loaded.config.model.scales == SCALES
    codes, labels = cache.validation.read(torch.arange(4)), torch.tensor([0, 1, 0, 1])
    assert codes.shape == (4, 1, CELLS)
    torch.testing.assert_close(loaded.log_likelihood(codes, labels), prior.log_likelihood(codes, labels))
    assert prior.sample(labels, None, [0, 1, 2, 3]).shape == codes.shape


def test_other_priors_see_one_row_or_say_why_not(cache, tmp_path, write_codes):
    gpt = prior_config(CausalTransformerConfig(**SMALL), None, PriorLossConfig(), cache)
    assert Prior(gpt).sample(torch.tensor([0]), None, [0]).shape == (1, 1, CELLS)
    with refuses("model.type 'pixelcnn'", "1x1 + 2x2 + 3x4", "model.type=scale_transformer"):
        prior_config(PixelCNNConfig(), None, PriorLossConfig(), cache)
    write_codes(tmp_path / "grid", {name: np.zeros((4, 2, 2), int) for name in ("train", "val")}, CODES)
    with refuses("model.type 'scale_transformer'", "single grid", "model.type=causal_transformer"):
        ScaleTransformerConfig().for_codes(CODES, None, CodeCache(tmp_path / "grid").manifest.scales)
    with refuses("model.scales 1x1 + 2x2", "1x1 + 2x2 + 3x4"):
        ScaleTransformerConfig(scales=((1, 1), (2, 2))).for_codes(CODES, None, SCALES)
    document = CodeCache(tmp_path / "grid").manifest.model_dump() | {"scales": SCALES}
    with pytest.raises(ValidationError, match=r"grid.*expected the grid \(1, 17\)"):
        Manifest.model_validate(document)
    with pytest.raises(ValidationError, match="positions=learned"):
        ScaleTransformerConfig(positions="relative")
