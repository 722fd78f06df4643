import itertools
import json
import math

import pytest
import torch
from messages import refuses
from torch import nn

from stage2_prior.codes import CodeCache
from stage2_prior.prior import Prior, ReplaceSchedule, prior_config, replace_codes, replace_prob_at
from stage2_prior.sampling import image_seeds
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.conditions.context import Context
from twostage.core.config.sections import parse_config
from twostage.core.runs.model_folder import save_model_folder
from twostage.core.training.random import BatchRandom

PETS = ["cat", "dog"]
TYPES = ["causal_transformer", "masked_transformer", "parallel_transformer", "pixelcnn"]


# --- replacement of codes -------------------------------------------------------------------------------------------


def test_the_requested_share_is_replaced_by_uniform_codes(whole_batch):
    codes = torch.full((5000, 10), 3)
    shares = replace_codes(codes, 0.4, 8, whole_batch(5000)).flatten().bincount(minlength=8) / codes.numel()
    expected = torch.full((8,), 0.4 / 8)  # 3 itself is among the replacements
    expected[3] += 0.6
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.005)


def test_replacements_cover_exactly_the_codebook(whole_batch):
    replaced = replace_codes(torch.zeros(500, 10, dtype=torch.long), 1.0, 7, whole_batch(500))
    assert replaced.unique().tolist() == list(range(7))
    assert replaced.dtype == torch.long


def test_nothing_is_replaced_at_0(whole_batch):
    codes = torch.arange(12).view(2, 6)
    assert replace_codes(codes, 0.0, 12, whole_batch(2)) is codes


def test_replacement_depends_on_the_image_not_on_the_process(random_codes, whole_batch):
    codes = random_codes(8).flatten(1)
    whole = replace_codes(codes, 0.5, 5, whole_batch(8))
    halves = [replace_codes(codes[rows], 0.5, 5, BatchRandom(0, rows, 8)) for rows in (slice(0, 4), slice(4, 8))]
    assert torch.equal(torch.cat(halves), whole)
    assert not torch.equal(replace_codes(codes, 0.5, 5, whole_batch(8, seed=1)), whole)


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_a_constant_replacement_does_not_change(progress):
    assert replace_prob_at(progress, 0.2) == 0.2


@pytest.mark.parametrize(
    ("shape", "shares"), [("linear", [0.4, 0.3, 0.2, 0.1, 0.0]), ("cosine", [0.4, 0.341421, 0.2, 0.058579, 0.0])]
)
def test_a_replacement_schedule_goes_from_start_to_end(shape, shares):
    schedule = ReplaceSchedule(start=0.4, end=0.0, shape=shape)
    assert [replace_prob_at(i / 4, schedule) for i in range(5)] == pytest.approx(shares, abs=1e-6)


def test_a_replacement_schedule_may_rise():
    assert replace_prob_at(0.5, ReplaceSchedule(start=0.0, end=0.5)) == 0.25


def test_a_share_above_1_is_refused():
    with refuses("start", "1.5"):
        parse_config(ReplaceSchedule, {"start": 1.5, "end": 0.0}, "replace_prob")


# --- the loss -------------------------------------------------------------------------------------------------------


def test_the_first_loss_is_that_of_uniform_codes(tiny_prior, random_codes, whole_batch):
    prior = tiny_prior(trained=False, class_names=PETS)
    loss = prior(random_codes(4), torch.tensor([0, 1, 0, 1]), whole_batch(4), 0.0)
    assert loss.item() == pytest.approx(math.log(5), rel=1e-6)


def test_the_true_codes_are_predicted_from_the_replaced_ones(tiny_prior, random_codes, whole_batch):
    prior, codes = tiny_prior(replace_prob=0.7, class_dropout_prob=0.0), random_codes(4)
    inputs = replace_codes(codes.flatten(1), 0.7, 5, whole_batch(4))
    logits = prior.network(inputs, Context(4)).flatten(0, 1)
    of_true, of_inputs = (nn.functional.cross_entropy(logits, target.flatten()) for target in (codes, inputs))
    loss = prior.train()(codes, None, whole_batch(4), 0.0)
    torch.testing.assert_close(loss, of_true)
    assert abs(loss - of_inputs) > 0.01


@pytest.mark.parametrize("model", TYPES)
def test_evaluation_replaces_no_code_and_hides_no_class(model, tiny_prior, random_codes, whole_batch):
    codes, labels = random_codes(4), torch.tensor([0, 1, 1, 0])
    careless = tiny_prior(model=model, class_names=PETS, replace_prob=1.0, class_dropout_prob=1.0).eval()
    plain = tiny_prior(model=model, class_names=PETS, replace_prob=0.0, class_dropout_prob=0.0).eval()
    expected = plain.nats_per_image(codes, labels, whole_batch(4))
    assert torch.equal(careless.nats_per_image(codes, labels, whole_batch(4)), expected)
    trained_on = plain(codes, labels, whole_batch(4), 0.0)
    assert not torch.equal(careless(codes, labels, whole_batch(4), 0.0), trained_on)


def test_replacement_follows_its_schedule(tiny_prior, random_codes, whole_batch):
    codes, scheduled = random_codes(4), tiny_prior(replace_prob={"start": 0.8, "end": 0.2}, class_dropout_prob=0.0)
    for progress, share in ((0.0, 0.8), (0.5, 0.5), (1.0, 0.2)):
        constant = tiny_prior(replace_prob=share, class_dropout_prob=0.0)
        expected = constant(codes, None, whole_batch(4), 0.3)
        torch.testing.assert_close(scheduled(codes, None, whole_batch(4), progress), expected)


@pytest.mark.parametrize("prob", [0.0, 0.3, 1.0])
def test_the_requested_share_of_images_is_trained_without_its_class(prob, tiny_prior, random_codes, whole_batch):
    count = 300
    prior = tiny_prior(class_names=[f"class {i}" for i in range(count)], class_dropout_prob=prob)
    prior(random_codes(count), torch.arange(count), whole_batch(count), 0.0).backward()
    used = prior.network.class_embedding.weight.grad.abs().sum(1) > 0
    assert used[:count].float().mean().item() == pytest.approx(1 - prob, abs=0.08)
    assert used[count] == (prob > 0)


def test_images_without_labels_have_no_class(tiny_prior, random_codes):
    prior, codes = tiny_prior(class_names=PETS).eval(), random_codes(4)
    no_class = torch.full((4,), prior.num_classes)
    assert torch.equal(prior.log_likelihood(codes, None), prior.log_likelihood(codes, no_class))
    assert not torch.equal(prior.log_likelihood(codes, None), prior.log_likelihood(codes, torch.zeros(4).long()))


def test_a_prior_without_classes_refuses_labels(tiny_prior, random_codes):
    with refuses("condition 'class'", "no conditions", "Omit"):
        tiny_prior().log_likelihood(random_codes(4), torch.tensor([0, 1, 5, 9]))


# --- the likelihood -------------------------------------------------------------------------------------------------


def test_log_likelihood_is_the_sum_over_the_codes(tiny_prior, random_codes, whole_batch):
    prior, codes, labels = tiny_prior(class_names=PETS).eval(), random_codes(4), torch.tensor([0, 1, 1, 0])
    log_probabilities = prior.network(codes.flatten(1), Context(4, labels)).double().log_softmax(-1)
    expected = log_probabilities.gather(2, codes.flatten(1)[..., None]).flatten(1).sum(1)
    likelihood = prior.log_likelihood(codes, labels)
    torch.testing.assert_close(likelihood.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    nats_per_code = prior.nats_per_image(codes, labels, whole_batch(4)).mean().item() / 6
    assert -likelihood.mean().item() / 6 == pytest.approx(nats_per_code, rel=1e-5)


def test_the_probabilities_of_all_grids_sum_to_1(tiny_prior):
    prior = tiny_prior(codebook_size=2, grid=(2, 2), class_names=PETS).eval()
    grids = torch.tensor(list(itertools.product([0, 1], repeat=4))).view(16, 2, 2)
    for label in (0, 1, 2):
        probabilities = prior.log_likelihood(grids, torch.full((16,), label)).double().exp()
        assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
        assert probabilities.max() > 1.3 / 16


def test_a_masked_transformer_has_a_bound_but_no_exact_likelihood(tiny_prior, random_codes, whole_batch):
    prior = tiny_prior(model="masked_transformer").eval()
    assert not prior.exact_likelihood
    assert prior.nats_per_image(random_codes(4), None, whole_batch(4)).shape == (4,)
    with refuses("model.type 'masked_transformer'", "nats_per_image"):
        prior.log_likelihood(random_codes(4), None)


# --- learning and sampling ------------------------------------------------------------------------------------------


def test_an_overfitted_batch_is_sampled(tiny_prior, random_codes, whole_batch):
    names = [f"class {i}" for i in range(6)]
    prior, codes = tiny_prior(trained=False, class_names=names, class_dropout_prob=0.0), random_codes(6)
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-2)
    for step in range(80):
        loss = prior(codes, torch.arange(6), whole_batch(6, step), 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02
    samples = prior.eval().sample(torch.arange(6), SamplingConfig(temperature=0.5), image_seeds(0, 0, 6))
    assert torch.equal(samples, codes)


def test_samples_are_grids_that_depend_on_seed_and_label_only(tiny_prior):
    prior = tiny_prior(grid=(3, 2), class_names=PETS).eval()
    labels, seeds, sampling = torch.tensor([0, 1] * 4), image_seeds(0, 0, 8), SamplingConfig(guidance_scale=2.0)
    samples = prior.sample(labels, sampling, seeds)
    assert samples.shape == (8, 3, 2)
    assert 0 <= samples.min() <= samples.max() < 5
    assert torch.equal(prior.sample(labels[5:7], sampling, seeds[5:7]), samples[5:7])
    assert not torch.equal(prior.sample(labels, sampling, image_seeds(1, 0, 8)), samples)


def test_samples_without_labels_have_no_class(tiny_prior):
    prior, seeds = tiny_prior(class_names=PETS).eval(), image_seeds(0, 0, 20)
    unlabelled = prior.sample(None, SamplingConfig(), seeds)
    assert torch.equal(unlabelled, prior.sample(torch.full((20,), 2), SamplingConfig(), seeds))
    assert not torch.equal(unlabelled, prior.sample(torch.zeros(20).long(), SamplingConfig(), seeds))


def test_guidance_needs_classes(tiny_prior):
    with refuses("guidance_scale 2.0", "no classes", "guidance_scale 1"):
        tiny_prior().sample(None, SamplingConfig(guidance_scale=2.0), [0])


@pytest.mark.parametrize(
    ("model", "sampling", "named"),
    [
        ("causal_transformer", {"top_k": 6}, ("top_k 6", "5", "codebook")),
        ("causal_transformer", {"num_steps": 4}, ("num_steps 4", "masked_transformer", "is a causal_transformer")),
        ("pixelcnn", {"mask_schedule": "cosine"}, ("mask_schedule 'cosine'", "masked_transformer", "is a pixelcnn")),
        ("pixelcnn", {"weights": "int8"}, ("weights 'int8'", "causal_transformer and masked", "is a pixelcnn")),
        ("masked_transformer", {"num_steps": 7}, ("num_steps 7", "6", "grid")),
        ("parallel_transformer", {"num_steps": 7}, ("num_steps 7", "6", "grid")),
    ],
)
def test_settings_that_this_prior_cannot_use_are_refused(model, sampling, named, tiny_prior):
    tiny_prior(model=model).check_sampling(SamplingConfig(top_k=5))
    with refuses(*named):
        tiny_prior(model=model).check_sampling(SamplingConfig(**sampling))


def test_labels_out_of_range_are_refused(tiny_prior):
    with refuses("labels: got 3", "0 to 1, or 2 for no class"):
        tiny_prior(class_names=PETS).sample(torch.tensor([2, 3]), SamplingConfig(), [0, 1])
    with refuses("condition 'class'", "no conditions", "Omit"):
        tiny_prior().sample(torch.tensor([0, 1]), SamplingConfig(), [0, 1])
    with refuses("condition 'class'", "2 images", "(1,)"):
        tiny_prior(class_names=PETS).sample(torch.tensor([0]), SamplingConfig(), [0, 1])


# --- known codes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", TYPES)
def test_every_prior_keeps_codes_that_come_first(model, tiny_prior, random_codes):
    prior, given, seeds = tiny_prior(model=model).eval(), random_codes(6, seed=3), image_seeds(0, 0, 6)
    known = torch.where(torch.arange(6).view(2, 3) < torch.arange(6)[:, None, None], given, -1)  # 0 ... 5 of them
    codes = prior.sample(None, SamplingConfig(), seeds, known)
    assert torch.equal(codes[known >= 0], known[known >= 0])
    assert 0 <= codes.min() <= codes.max() < 5
    free = prior.sample(None, SamplingConfig(), seeds)
    assert torch.equal(codes[0], free[0])
    assert not torch.equal(codes[1:], free[1:])
    assert torch.equal(prior.sample(None, SamplingConfig(), seeds, given), given)


def test_only_masked_and_parallel_transformers_keep_any_codes(tiny_prior, random_codes):
    known = torch.where(torch.tensor([[True, False, True], [False, True, True]]), random_codes(2), -1)
    for model in ("masked_transformer", "parallel_transformer"):
        codes = tiny_prior(model=model).eval().sample(None, SamplingConfig(), [0, 1], known)
        assert torch.equal(codes[known >= 0], known[known >= 0])
    for model in ("causal_transformer", "pixelcnn"):
        with refuses("known codes", "image 0", model, "masked or parallel transformer"):
            tiny_prior(model=model).sample(None, SamplingConfig(), [0, 1], known)


def test_known_codes_of_another_shape_or_codebook_are_refused(tiny_prior, random_codes):
    prior = tiny_prior()
    with refuses("known codes", "(2, 2, 3)", "got (1, 2, 3)"):
        prior.sample(None, SamplingConfig(), [0, 1], random_codes(1))
    with refuses("known codes", "0 to 4", "from 0 to 7"):
        prior.sample(None, SamplingConfig(), [0], torch.tensor([[[0, 7, 1], [1, 1, 1]]]))


def test_progress_counts_every_code(tiny_prior):
    for model in TYPES:
        told: list[int] = []
        tiny_prior(model=model).eval().sample(None, SamplingConfig(), [0, 1, 2], on_progress=told.append)
        assert sum(told) == 3 * 6
        assert len(told) > 1


def test_guidance_needs_class_dropout(tiny_prior):
    prior = tiny_prior(class_names=PETS, class_dropout_prob=0.0)
    with refuses("guidance_scale 0.5", "loss.class_dropout_prob=0", "guidance_scale 1"):
        prior.sample(torch.tensor([0]), SamplingConfig(guidance_scale=0.5), [0])
    assert prior.sample(torch.tensor([0]), SamplingConfig(), [0]).shape == (1, 2, 3)


# --- on disk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", TYPES)
def test_every_prior_samples_the_same_after_saving_and_loading(model, tiny_prior, tmp_path):
    prior = tiny_prior(model=model, class_names=PETS).eval()
    prior.save_pretrained(tmp_path)
    samples = prior.sample(torch.tensor([0, 1]), SamplingConfig(), [0, 1])
    assert torch.equal(Prior.from_pretrained(tmp_path).sample(torch.tensor([0, 1]), SamplingConfig(), [0, 1]), samples)


@pytest.fixture
def saved(tiny_prior, tmp_path):
    tiny_prior(class_names=PETS).save_pretrained(tmp_path / "run" / "model")
    return tmp_path / "run" / "model"


def test_a_saved_prior_gives_the_same_likelihoods_and_samples(saved, tiny_prior, random_codes):
    prior, codes, labels = tiny_prior(class_names=PETS).eval(), random_codes(4), torch.tensor([0, 1, 2, 0])
    for path in (saved, saved.parent):
        loaded = Prior.from_pretrained(path)
        assert not loaded.training
        assert loaded.config == prior.config
        assert torch.equal(loaded.log_likelihood(codes, labels), prior.log_likelihood(codes, labels))
        seeds = image_seeds(0, 0, 4)
        samples = prior.sample(labels, SamplingConfig(), seeds)
        assert torch.equal(loaded.sample(labels, SamplingConfig(), seeds), samples)


def test_a_tokenizer_is_not_taken_for_a_prior(saved):
    save_model_folder(saved, "tokenizer", {}, {"weight": torch.zeros(1)})
    with refuses(saved, "a tokenizer", "expected a prior"):
        Prior.from_pretrained(saved)


def test_weights_of_another_grid_are_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"grid": [3, 3]}))
    with refuses("config.json", "positions"):
        Prior.from_pretrained(saved)


def test_the_stored_config_describes_the_codes(tiny_prior, write_codes, random_codes, tmp_path):
    splits = {"train": random_codes(10).numpy(), "val": random_codes(4, seed=1).numpy()}
    labels = {name: codes[:, 0, 0] % 2 for name, codes in splits.items()}
    manifest = write_codes(tmp_path / "codes", splits, 5, PETS, labels)
    prior = tiny_prior()
    config = prior_config(prior.config.model, None, prior.config.loss, CodeCache(tmp_path / "codes"))
    assert config.untrained_classes == ()
    assert (config.codebook_size, config.grid, config.class_names) == (5, (2, 3), PETS)
    assert (config.image_size, config.channels, config.tokenizer) == ((8, 8), 3, manifest.tokenizer)
    assert config.unigram_nats_per_code == manifest.unigram_nats_per_code["val"]
