"""A network for each scale: together they are one distribution, and each sees the coarser codes."""

import itertools

import numpy as np
import pytest
import torch
from contexts import of
from messages import refuses
from torch import Tensor, nn

from stage2_prior.codes import CodeCache
from stage2_prior.networks.causal_transformer import CausalTransformerConfig
from stage2_prior.networks.masked_transformer import MaskedTransformerConfig
from stage2_prior.networks.pixelcnn import PixelCNNConfig
from stage2_prior.networks.scale_by_scale import ScaleByScale, ScaleByScaleConfig
from stage2_prior.prior import Prior, PriorLossConfig, prior_config
from stage2_prior.sampling import Branches, image_seeds
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.conditions.context import Context, ContextForm
from twostage.core.scales import num_codes
from twostage.core.training.random import BatchRandom

SMALL = {"hidden_size": 16, "depth": 2, "num_heads": 2, "dropout": 0.0}
GPT, MASKED = CausalTransformerConfig(**SMALL), MaskedTransformerConfig(**SMALL)
PIXELCNN = PixelCNNConfig(channels=8, depth=2, first_kernel=3, head_channels=8, context_channels=16)
PAIRS = {"GPT, PixelCNN": (GPT, PIXELCNN), "PixelCNN, GPT": (PIXELCNN, GPT), "GPT, masked": (GPT, MASKED)}
SCALES, FORM = ((1, 2), (2, 2)), ContextForm(num_classes=2)


def make_model(pair: str, codes: int = 2, scales=SCALES, form: ContextForm = FORM) -> ScaleByScale:
    torch.manual_seed(0)
    config = ScaleByScaleConfig(networks=PAIRS[pair]).for_codes(codes, None, scales)
    model = config.build(codes, (1, num_codes(scales)), form).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def every_row(codes: int = 2, cells: int = 6) -> Tensor:
    return torch.tensor(list(itertools.product(range(codes), repeat=cells)))


def whole(count: int) -> BatchRandom:
    return BatchRandom(0, slice(0, count), count)


@pytest.mark.parametrize("pair", ["GPT, PixelCNN", "PixelCNN, GPT"])
def test_the_probabilities_of_all_codes_sum_to_1(pair):
    model, rows = make_model(pair), every_row()
    nats = model.nats_per_image(rows, of(torch.zeros(64, dtype=torch.long)), whole(64))
    assert model.exact_likelihood
    assert nats.std() > 0.1
    assert (-nats.double()).exp().sum().item() == pytest.approx(1, abs=1e-4)
    assert not make_model("GPT, masked").exact_likelihood


@pytest.mark.parametrize("pair", ["GPT, PixelCNN", "PixelCNN, GPT"])
def test_samples_follow_the_likelihood(pair):
    model, rows, count = make_model(pair), every_row(), 3000
    nats = model.nats_per_image(rows, of(torch.zeros(64, dtype=torch.long)), whole(64))
    drawn = model.sample(Branches(of(torch.zeros(count, dtype=torch.long))), SamplingConfig(), image_seeds(0, 0, count))
    found = torch.bincount((drawn * 2 ** torch.arange(5, -1, -1)).sum(1), minlength=64) / count
    torch.testing.assert_close(found, (-nats).exp(), atol=0.03, rtol=0)


@pytest.mark.parametrize("pair", PAIRS)
def test_the_bottom_depends_on_the_top_and_not_the_other_way_round(pair):
    model, context = make_model(pair), of(torch.tensor([1]))
    row = torch.tensor([[0, 1, 1, 0, 1, 0]])
    seen = model.context_of(1, context, [row[:, :2].view(1, 1, 2)]).cells
    other = model.context_of(1, context, [1 - row[:, :2].view(1, 1, 2)]).cells
    assert (seen != other).any(-1).all(), "each cell sees the top"
    assert model.context_of(0, context, []).cells is None
    table = model.readers[0].tables[0].weight
    (gradient,) = torch.autograd.grad(model.loss(row, context, row, whole(1)), table)
    assert (gradient[row[0, :2]] != 0).all()


@pytest.mark.parametrize("pair", PAIRS)
def test_an_image_depends_on_its_seed_alone_and_keeps_its_top(pair):
    model, seeds, labels = make_model(pair), image_seeds(3, 0, 5), torch.tensor([0, 1, 0, 1, 0])
    context = Context(10, torch.cat([labels, torch.full((5,), 2)]))
    together = model.sample(Branches(context, (2.0,)), SamplingConfig(), seeds)
    for i, seed in enumerate(seeds):
        alone = model.sample(Branches(context.rows(torch.tensor([i, i + 5])), (2.0,)), SamplingConfig(), [seed])
        assert torch.equal(alone[0], together[i])
    known = torch.cat([together[:, :2], torch.full((5, 4), -1)], 1)
    assert model.can_keep(known >= 0)
    assert torch.equal(model.sample(Branches(context, (2.0,)), SamplingConfig(), seeds, known), together)
    backwards = torch.tensor([[False, True, True, True, True, True]])
    assert not model.can_keep(backwards)


def test_a_prior_of_every_condition_is_saved_and_loaded(tmp_path, write_codes):
    codes = {name: every_row()[:8][:, None].numpy() for name in ("train", "val")}
    labels = {name: np.arange(8) % 2 for name in codes}
    write_codes(tmp_path / "codes", codes, 2, ["a", "b"], labels, scales=SCALES)
    model = ScaleByScaleConfig(networks=PAIRS["GPT, PixelCNN"])
    prior = Prior(prior_config(model, None, PriorLossConfig(), CodeCache(tmp_path / "codes"))).eval()
    prior.save_pretrained(tmp_path / "prior")
    loaded, rows = Prior.from_pretrained(tmp_path / "prior"), torch.from_numpy(codes["val"]).long()
    assert [network.type for network in loaded.config.model.networks] == ["causal_transformer", "pixelcnn"]
    given = torch.from_numpy(labels["val"])
    torch.testing.assert_close(loaded.log_likelihood(rows, given), prior.log_likelihood(rows, given))
    assert torch.equal(loaded.sample(given, None, range(8)), prior.sample(given, None, range(8)))


def test_what_does_not_fit_is_refused():
    config = ScaleByScaleConfig(networks=PAIRS["GPT, PixelCNN"])
    with refuses("model.networks", "got 2 for codes of 3 scales, 1x1 + 2x2 + 4x4"):
        config.for_codes(2, None, ((1, 1), (2, 2), (4, 4)))
    with refuses("model.networks", "got 2 for codes of a single grid"):
        config.for_codes(2, None)
    wide = ScaleByScaleConfig(networks=(GPT, PixelCNNConfig(context_channels=8))).for_codes(2, None, SCALES)
    with refuses("model.networks", "16, 8", "hidden_size"):
        wide.build(2, (1, 6), ContextForm(pooled=True))
