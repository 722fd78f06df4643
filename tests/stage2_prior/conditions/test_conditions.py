"""Captions, maps and vectors beside classes, in all three priors."""

import numpy as np
import pytest
import torch
from messages import refuses
from torch import Tensor, nn

from stage2_prior.codes import TokenizerReference
from stage2_prior.networks.causal_transformer import CausalTransformerConfig, CausalTransformerDecoder
from stage2_prior.networks.masked_transformer import MaskedPredictor, MaskedTransformerConfig
from stage2_prior.networks.network import NetworkConfig
from stage2_prior.networks.pixelcnn import PixelCNNConfig, PixelCNNDecoder
from stage2_prior.prior import Prior, PriorConfig, PriorLossConfig
from stage2_prior.sampling import Branches, image_seeds
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.conditions.class_condition import ClassConditionConfig
from twostage.core.conditions.condition import ConditionConfig
from twostage.core.conditions.context import Context, join_contexts
from twostage.core.conditions.map_condition import NO_LABEL, MapConditionConfig
from twostage.core.conditions.text_condition import TextConditionConfig
from twostage.core.conditions.vector_condition import VectorConditionConfig
from twostage.core.conditions.vocabulary import Vocabulary
from twostage.core.training.random import BatchRandom

GRID, CODES, CELLS = (2, 3), 5, 6
CAPTIONS = ["a red star", "a blue ring", "a small red ring, on white"]
VOCABULARY = Vocabulary.learned_from(CAPTIONS, "words", 100)
TEXT = TextConditionConfig(units="words", max_length=8, depth=1, vocabulary=VOCABULARY)
KINDS: dict[str, ConditionConfig] = {
    "class": ClassConditionConfig(num_classes=2),
    "text": TEXT,
    "map": MapConditionConfig(labels=(0, 1, 2), size=(8, 12)),
    "vector": VectorConditionConfig(mean=(1.0, 2.0), std=(0.5, 3.0)),
}
IMAGE_MAP = MapConditionConfig(channels=3, size=(8, 12))
NETWORKS: dict[str, NetworkConfig] = {
    "causal": CausalTransformerConfig(hidden_size=16, depth=2, num_heads=2, dropout=0.0),
    "relative": CausalTransformerConfig(
        hidden_size=16, depth=2, num_heads=2, dropout=0.0, positions="relative", mlp="squared_relu", order="snake"
    ),
    "masked": MaskedTransformerConfig(hidden_size=16, depth=2, num_heads=2, dropout=0.0),
    "pixelcnn": PixelCNNConfig(channels=8, depth=3, first_kernel=5, head_channels=8, context_channels=8),
}


def build(model: str, *kinds: str, dropout: float = 0.1) -> Prior:
    torch.manual_seed(0)
    config = PriorConfig(
        model=NETWORKS[model],
        conditions=[{**KINDS, "image map": IMAGE_MAP}[kind] for kind in kinds],
        loss=PriorLossConfig(class_dropout_prob=dropout),
        codebook_size=CODES,
        grid=GRID,
        class_names=["cat", "dog"] if "class" in kinds else None,
        image_size=(8, 12),
        channels=3,
        tokenizer=TokenizerReference(hash="0" * 64, path="runs/tokenizer"),
        unigram_nats_per_code=1.0,
    )
    prior = Prior(config)
    for parameter in prior.parameters():
        nn.init.normal_(parameter, std=0.4)
    return prior.eval()


def given_values(count: int, *kinds: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = {}
    if "class" in kinds:
        found["class"] = torch.arange(count) % 2
    if "text" in kinds:
        text = build("causal", "text").conditions["text"]
        found["text"] = torch.cat([text.parse(CAPTIONS[i % 3]) for i in range(count)])
    if "map" in kinds:
        found["map"] = torch.randint(3, (count, 8, 12), generator=generator).to(torch.uint8)
    if "vector" in kinds:
        found["vector"] = torch.randn(count, 2, generator=generator)
    return found


def codes_of(count: int) -> Tensor:
    return torch.randint(CODES, (count, *GRID), generator=torch.Generator().manual_seed(2))


def whole(size: int) -> BatchRandom:
    return BatchRandom(0, slice(0, size), size)


ALL = ("class", "text", "map", "vector")


@pytest.mark.parametrize("model", NETWORKS)
@pytest.mark.parametrize("kind", ALL)
def test_every_prior_listens_to_every_kind(model, kind):
    prior, codes = build(model, *ALL), codes_of(4)
    values = given_values(4, *ALL)
    right = prior.nats_per_image(codes, values, whole(4))
    others = values | {kind: values[kind].roll(1, 0)}
    assert not torch.allclose(prior.nats_per_image(codes, others, whole(4)), right, rtol=1e-4)
    without = {name: value for name, value in values.items() if name != kind}
    assert not torch.allclose(prior.nats_per_image(codes, without, whole(4)), right, rtol=1e-4)


@pytest.mark.parametrize("model", NETWORKS)
def test_maps_may_be_images(model):
    prior, codes = build(model, "image map"), codes_of(3)
    maps = torch.from_numpy(np.random.Generator(np.random.Philox(0)).integers(0, 256, (3, 3, 8, 12), dtype=np.uint8))
    maps[0] = 0
    right = prior.nats_per_image(codes, {"map": prior.parse("map", list(maps.numpy()))}, whole(3))
    others = prior.nats_per_image(codes, {"map": prior.parse("map", list(maps.flip(1).numpy()))}, whole(3))
    assert torch.equal(right[0], others[0])
    assert not torch.isclose(right[1:], others[1:], rtol=1e-4).any()
    # A black map is not a missing one.
    assert not torch.isclose(prior.nats_per_image(codes, None, whole(3))[0], right[0], rtol=1e-4)
    for wrong in (maps[0, :1], maps[0, :, :4], maps[0].float(), maps[0, 0]):
        with refuses("map", "channels", str(tuple(wrong.shape))):
            prior.parse("map", [wrong.numpy()])


def test_maps_may_be_smaller_than_whole_cells():
    """Like images, which a tokenizer pads at the right and below."""
    form = MapConditionConfig(labels=(0, 1), size=(7, 11))
    torch.manual_seed(0)
    condition = form.build(NETWORKS["causal"].context_space(GRID))
    maps = torch.zeros(2, 7, 11, dtype=torch.uint8)
    maps[1, 6, 10] = 1
    changed = (condition(maps).cells.diff(dim=0) != 0).any(2)[0]
    assert changed.shape == (CELLS,)
    assert changed[-1]


@pytest.mark.parametrize("model", NETWORKS)
def test_a_hidden_condition_is_nothing(model):
    prior, codes, values = build(model, *ALL, dropout=1.0), codes_of(4), given_values(4, *ALL)
    random = whole(4)
    torch.testing.assert_close(prior(codes, values, random, 0.0), prior(codes, None, random, 0.0), rtol=0, atol=0)


def test_each_kind_is_hidden_by_itself_and_at_its_own_rate():
    kinds = dict(KINDS, vector=VectorConditionConfig(mean=(1.0, 2.0), std=(0.5, 3.0), dropout=0.0))
    prior = build("causal", "class", "text", "map")
    values = given_values(2000, *ALL)
    from twostage.core.conditions.conditions import Conditions

    conditions = Conditions(list(kinds.values()), prior.config.model.context_space(GRID))
    hidden = conditions.hide(values, 0.3, whole(2000))
    gone = {
        "class": hidden["class"] == 2,
        "text": (hidden["text"] == 0).flatten(1).all(1),
        "map": (hidden["map"] == NO_LABEL).flatten(1).all(1),
        "vector": hidden["vector"].isnan().all(1),
    }
    for name in ("class", "text", "map"):
        assert gone[name].float().mean().item() == pytest.approx(0.51, abs=0.04), "by itself or with the others"
    assert not gone["vector"].any()
    assert (gone["class"] & gone["text"]).float().mean().item() == pytest.approx(0.3 + 0.7 * 0.09, abs=0.04)


@pytest.mark.parametrize("model", NETWORKS)
def test_a_longer_neighbour_changes_nothing(model):
    """Padding is masked exactly: an image's likelihood and codes are the same whatever its neighbours' captions are."""
    prior, codes = build(model, "text"), codes_of(3)
    text, seeds = prior.conditions["text"], image_seeds(0, 0, 3)
    short = torch.cat([text.parse("a red star")] * 3)
    mixed = torch.cat([text.parse("a red star"), text.parse(CAPTIONS[2]), text.nothing(1)])
    sampling = SamplingConfig(guidance_scale=3.0)
    alone = prior.sample({"text": short[:1]}, sampling, seeds[:1])
    assert torch.equal(prior.sample({"text": short}, sampling, seeds)[:1], alone)
    assert torch.equal(prior.sample({"text": mixed}, sampling, seeds)[:1], alone)
    nats = [prior.nats_per_image(codes, {"text": each}, whole(3))[0] for each in (short, mixed)]
    torch.testing.assert_close(nats[0], nats[1], rtol=1e-6, atol=0)


def test_tokens_beyond_the_end_of_a_caption_say_nothing():
    prior = build("causal", "text").double()
    text = prior.conditions["text"]
    context = prior.conditions({"text": text.parse("a red star")}, 1)
    noisy = Context(1, None, context.pooled, None, context.sequence.clone(), context.present)
    noisy.sequence[:, 3:] = 100.0
    inputs = torch.tensor([[0, 1, 2, 3, 4, 0]])
    assert torch.equal(prior.network(inputs, noisy), prior.network(inputs, context))
    noisy.sequence[:, 2] = 100.0
    assert not torch.equal(prior.network(inputs, noisy), prior.network(inputs, context))


@pytest.mark.parametrize("model", NETWORKS)
def test_cached_equals_uncached_with_all_conditions(model):
    prior = build(model, *ALL).double()
    network, codes = prior.network, codes_of(4).flatten(1)
    context = prior.conditions(prior.conditions.complete(given_values(4, *ALL), 4), 4)
    with torch.no_grad():
        if model == "masked":
            codes[:, ::2] = network.mask_token_id
            masked = codes == network.mask_token_id
            expected = network(codes, context)[masked]
            found = MaskedPredictor(network, context)(codes, masked.flatten().nonzero()[:, 0])
        else:
            ordered, context = codes[:, network.order], context.in_order(network.order)
            expected = network(ordered, context)
            decoder = PixelCNNDecoder if model == "pixelcnn" else CausalTransformerDecoder
            step = decoder(network, context).step
            found = torch.stack([step(ordered[:, cell - 1] if cell else None) for cell in range(CELLS)], 1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model", NETWORKS)
def test_the_encoder_is_trained_by_the_codes_alone(model):
    prior, values = build(model, "text").train(), given_values(4, "text")
    prior(codes_of(4), values, whole(4), 0.0).backward()
    missing = [name for name, p in prior.conditions.named_parameters() if p.grad is None or not p.grad.any()]
    unseen = {"class.unused"} if model != "pixelcnn" else set()
    assert not set(missing) - unseen


def test_the_codes_of_captions_are_learned(whole_batch):
    prior, codes, values = build("causal", "text", dropout=0.0), codes_of(3), given_values(3, "text")
    for parameter in prior.parameters():
        nn.init.normal_(parameter, std=0.1)
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-2)
    for step in range(120):
        loss = prior.train()(codes, values, whole_batch(3, step), 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02
    samples = prior.eval().sample(values, SamplingConfig(temperature=0.5), image_seeds(0, 0, 3))
    assert torch.equal(samples, codes)


def test_several_captions_take_turns():
    text = build("causal", "text").conditions["text"]

    class Split:
        def read_captions(self, rows):
            return [("a red star", "a blue ring"), ("a red ring",), (), ("a star", "", "a ring")]

    values = text.read(Split(), torch.arange(4))
    assert values.shape == (4, 2, 8)
    drawn = [text.one_of_each(values, BatchRandom(seed, slice(0, 4), 4)) for seed in range(60)]
    firsts = [sum(torch.equal(each[i, 0], values[i, 0]) for each in drawn) for i in range(4)]
    assert 20 < firsts[0] < 40
    assert firsts[1] == 60
    assert firsts[2] == 60
    assert 20 < firsts[3] < 40
    half = text.one_of_each(values[2:], BatchRandom(7, slice(2, 4), 4))
    assert torch.equal(half, text.one_of_each(values, BatchRandom(7, slice(0, 4), 4))[2:])


def test_guidance_of_several_conditions_has_a_scale_each():
    generator = torch.Generator().manual_seed(0)
    both, first, none = torch.randn(3, 4, CODES, generator=generator)
    branches = Branches(join_contexts([Context(4)] * 3), (3.0, 2.0))
    found = branches.combine(torch.cat([both, first, none]))
    torch.testing.assert_close(found, none + 2 * (first - none) + 3 * (both - first))
    equal = Branches(join_contexts([Context(4)] * 3), (2.0, 2.0)).combine(torch.cat([both, first, none]))
    torch.testing.assert_close(equal, none + 2 * (both - none))


@pytest.mark.parametrize("model", NETWORKS)
def test_guidance_leads_away_from_a_negative_prompt(model):
    with refuses("negative prompt", "no effect", "above 1"):
        negative = {"text": build(model, "text").conditions["text"].parse("a blue ring")}
        build(model, "text").sample(None, SamplingConfig(), [0], negative=negative)
    prior = build(model, "text")
    values, seeds = prior.conditions["text"].parse("a red star"), image_seeds(0, 0, 1)
    sampling = SamplingConfig(guidance_scale=4.0)
    same = prior.sample({"text": values}, sampling, seeds, negative={"text": values})
    assert torch.equal(same, prior.sample({"text": values}, SamplingConfig(), seeds)), "nothing is left to lead away"
    ring = prior.conditions["text"].parse("a blue ring")
    many = image_seeds(0, 0, 16)
    values, ring = values.expand(16, -1, -1), ring.expand(16, -1, -1)
    away, plain = (prior.sample({"text": values}, sampling, many, negative=n) for n in ({"text": ring}, None))
    assert not torch.equal(away, plain)


@pytest.mark.parametrize("model", NETWORKS)
def test_a_saved_prior_says_the_same(model, tmp_path):
    prior, values = build(model, *ALL), given_values(4, *ALL)
    prior.save_pretrained(tmp_path / "model")
    loaded = Prior.from_pretrained(tmp_path / "model")
    assert loaded.config == prior.config
    expected = prior.nats_per_image(codes_of(4), values, whole(4))
    assert torch.equal(loaded.nats_per_image(codes_of(4), values, whole(4)), expected)


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_prompts_that_cannot_be_read_are_refused():
    prior = build("causal", "text")
    for prompt, named in (
        ("", ("prompt ''", "Omit")),
        ("a purple star", ("'purple'", "ring", "Use")),
        ("a red star, a red star, a red star", ("11 tokens", "at most 8", "fewer words")),
    ):
        with refuses(*named):
            prior.parse("text", [prompt])


def test_conditions_that_were_not_trained_are_refused():
    with refuses("prompt", "without text", "Omit"):
        build("causal", "class").parse("text", ["a red star"])
    with refuses("condition 'map'", "only text", "Omit"):
        build("causal", "text").sample({"map": torch.zeros(1, 8, 12)}, SamplingConfig(), [0])


def test_maps_and_vectors_of_another_form_are_refused():
    prior = build("causal", "map", "vector")
    with refuses("map", "8x12", "(8, 8)", "Resize"):
        prior.parse("map", [np.zeros((8, 8), dtype=int)])
    with refuses("map", "label 7", "0, 1, 2", "255"):
        prior.parse("map", [np.full((8, 12), 7)])
    with refuses("map", "whole numbers", "float64"):
        prior.parse("map", [np.zeros((8, 12))])
    with refuses("map", "whole numbers", "0 to 255"):
        prior.parse("map", [np.full((8, 12), -1)])
    with refuses("vector", "2 numbers", "'a'"):
        prior.parse("vector", [["a", "b"]])
    with refuses("vector", "2 finite numbers", "(3,)", "Give"):
        prior.parse("vector", [[1, 2, 3]])
    assert prior.parse("map", [np.full((8, 12), NO_LABEL)]).shape == (1, 8, 12)
