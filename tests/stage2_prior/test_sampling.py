import math

import pytest
import torch
from messages import refuses

from stage2_prior.sampling import (
    Branches,
    CodeNoise,
    choose,
    filter_logits,
    guidance_at,
    gumbel_noise,
    image_seeds,
    uniform_noise,
)
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.conditions.context import Context
from twostage.core.config.sections import parse_config

ALMOST_1 = 1 - 2**-53  # the largest number that the noise can have


def random_logits(rows: int = 6, codes: int = 9) -> torch.Tensor:
    return 2 * torch.randn(rows, codes, generator=torch.Generator().manual_seed(0))


def draw(logits: torch.Tensor, count: int, **sampling: object) -> torch.Tensor:
    """``count`` samples from one row of logits, with evenly spaced noise."""
    filtered = filter_logits(logits.expand(count, -1), SamplingConfig(**sampling))
    return choose(filtered, (torch.arange(count, dtype=torch.double) + 0.5) / count)


def guide(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float, share: float = 1.0) -> torch.Tensor:
    """The guided logits of one condition."""
    logits = torch.cat([conditional, unconditional])
    return Branches(Context(len(logits)), (scale,)).combine(logits, share)


# --- seeds and noise ------------------------------------------------------------------------------------------------


def test_an_images_seed_does_not_depend_on_where_a_batch_begins():
    assert image_seeds(3, 0, 10)[4:7] == image_seeds(3, 4, 3)
    assert len({*image_seeds(3, 0, 100), *image_seeds(4, 0, 100)}) == 200


def test_the_noise_of_codes_depends_only_on_an_images_seed_and_gives_the_distribution():
    seeds = image_seeds(0, 0, 400)
    noise = CodeNoise(seeds, 5).next(50)
    assert torch.equal(CodeNoise(seeds[10:12], 5).next(50), noise[10:12])
    parts = CodeNoise(seeds, 5)
    assert torch.equal(torch.cat([parts.next(1), parts.next(49)], 1), noise)
    shares = torch.tensor([0.1, 0.0, 0.45, 0.05, 0.4])
    counts = (shares.log() + noise).argmax(-1).flatten().bincount(minlength=5)
    torch.testing.assert_close(counts / counts.sum(), shares, atol=0.01, rtol=0)
    assert noise.isfinite().all()


def test_the_noise_of_codes_is_a_hash_that_starts_anywhere():
    def splitmix(seed: int, number: int) -> int:
        """Output ``number``, from 1, as Steele, Lea and Flood 2014 write it."""
        z = (seed + number * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    assert splitmix(1234567, 1) == 6457827717110365317  # as others publish it
    seeds, codes = [0, 7, 2**62 + 3], 5
    noise = CodeNoise(seeds, codes).next(6)
    for image, seed in enumerate(seeds):
        for cell, code in ((0, 0), (2, 3), (5, 4)):
            bits = splitmix(seed, cell * 3 + code // 2 + 1) >> 32 * (code % 2)
            uniform = (bits % 2**23 + 0.5) / 2**23
            assert noise[image, cell, code].item() == pytest.approx(-math.log(-math.log(uniform)), rel=1e-5)
    assert torch.equal(CodeNoise(seeds, codes).at(torch.tensor([5, 2])), noise[:, [5, 2]])
    later = CodeNoise(seeds, codes)
    later.next(1)
    later.skip(3)
    assert torch.equal(later.next(2), noise[:, 4:])
    later = CodeNoise(seeds, 2**15)  # more than a block
    later.skip(3)
    assert torch.equal(later.next(1), CodeNoise(seeds, 2**15).next(4)[:, 3:])


def test_the_noise_of_codes_is_finite_whatever_the_bits():
    smallest, largest = gumbel_noise(torch.tensor([0, -1], dtype=torch.int32)).tolist()  # no bit, all bits
    assert smallest == pytest.approx(-math.log(24 * math.log(2)))
    assert largest == pytest.approx(24 * math.log(2), rel=1e-4)  # an infinite number would choose any code
    gumbel = CodeNoise(image_seeds(0, 0, 4), 4096).next(500).double()
    assert gumbel.mean().item() == pytest.approx(0.57722, abs=0.002)
    assert gumbel.var().item() == pytest.approx(math.pi**2 / 6, abs=0.004)


def test_noise_is_uniform_and_depends_only_on_a_rows_seed():
    seeds = image_seeds(0, 0, 50)
    noise = uniform_noise(seeds, 400)
    assert torch.equal(uniform_noise(seeds[10:12], 400), noise[10:12])
    assert torch.equal(uniform_noise(seeds[:1], 7), noise[:1, :7])
    assert 0 <= noise.min() < 0.001
    assert 0.999 < noise.max() < 1
    assert (noise.flatten().histc(10, 0, 1) / noise.numel() - 0.1).abs().max() < 0.01
    assert abs(torch.corrcoef(noise[:2])[0, 1]) < 0.2


# --- guidance -------------------------------------------------------------------------------------------------------


def test_guidance_of_1_is_the_conditional_model():
    conditional, unconditional = random_logits(), random_logits().flip(0)
    assert torch.equal(guide(conditional, unconditional, 1.0), conditional)


@pytest.mark.parametrize("scale", [0.0, 0.3, 2.5, 10.0])
def test_guidance_is_unconditional_plus_scaled_difference(scale):
    conditional, unconditional = random_logits(), random_logits().flip(0)
    expected = unconditional + scale * (conditional - unconditional)
    torch.testing.assert_close(guide(conditional, unconditional, scale), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [3.0, 3.0, 3.0]), ("linear", [1.0, 1.5, 3.0]), ("cosine", [1.0, 2 - 2**-0.5, 3.0])],
)
def test_guidance_grows_by_its_schedule(schedule, expected):
    sampling = SamplingConfig(guidance_scale=3.0, guidance_schedule=schedule)
    one, nothing = torch.ones(1, 1), torch.zeros(1, 1)  # their guided logit is the scale
    scales = [guide(one, nothing, 3.0, guidance_at(step, 5, sampling)).item() for step in (0, 1, 4)]
    assert scales == pytest.approx(expected)
    assert guidance_at(0, 1, sampling) == 1.0  # fully grown: the only step is the last one


# --- temperature, top-k, top-p --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{"temperature": 1e-4}, {"top_k": 1}, {"top_p": 1e-6}])
def test_the_safest_settings_choose_the_most_likely_code(sampling):
    for row in random_logits():
        assert (draw(row, 50, **sampling) == row.argmax()).all()


@pytest.mark.parametrize("sampling", [{}, {"top_k": 4096}, {"top_p": 1.0}, {"top_k": 4096, "top_p": 1.0}])
def test_the_widest_settings_change_nothing(sampling):
    logits = random_logits(20, 4096)
    assert torch.equal(filter_logits(logits, SamplingConfig(**sampling)), logits)


def test_temperature_divides():
    torch.testing.assert_close(filter_logits(random_logits(), SamplingConfig(temperature=2.0)), random_logits() / 2)


@pytest.mark.parametrize("k", [1, 3, 9])
def test_top_k_keeps_the_k_most_likely_codes(k):
    kept = filter_logits(random_logits(), SamplingConfig(top_k=k)).isfinite()
    assert (kept.sum(1) == k).all()
    assert kept.gather(1, random_logits().topk(k).indices).all()


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.3, [1]), (0.5, [1]), (0.51, [1, 3]), (0.79, [1, 3]), (0.81, [0, 1, 3]), (0.99, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_fewest_codes_that_hold_the_probability(top_p, kept):
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    filtered = filter_logits(logits, SamplingConfig(top_p=top_p))
    assert filtered.isfinite()[0].nonzero().flatten().tolist() == kept
    assert torch.equal(filtered[0, kept], logits[0, kept])


def test_top_k_keeps_exactly_k_codes_despite_ties():
    assert filter_logits(torch.zeros(3, 9), SamplingConfig(top_k=2)).isfinite().sum(1).tolist() == [2, 2, 2]


def test_top_p_applies_after_temperature_and_top_k():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    for sampling, kept in [({"top_k": 2, "top_p": 0.55}, [0]), ({"top_p": 0.55}, [0, 1]),
                           ({"temperature": 0.1, "top_p": 0.55}, [0])]:  # fmt: skip
        filtered = filter_logits(logits, SamplingConfig(**sampling))
        assert filtered.isfinite()[0].nonzero().flatten().tolist() == kept


def test_filtering_does_not_change_its_argument():
    logits = random_logits()
    filter_logits(logits, SamplingConfig(temperature=0.5, top_k=3, top_p=0.5))
    assert torch.equal(logits, random_logits())


@pytest.mark.parametrize("key", ["temperature", "top_k", "top_p"])
def test_zero_is_refused(key):
    with refuses(key, "got 0"):
        parse_config(SamplingConfig, {key: 0}, "sampling")


# --- choosing -------------------------------------------------------------------------------------------------------


def test_frequencies_follow_the_distribution():
    shares = torch.tensor([0.1, 0.0, 0.45, 0.05, 0.4])
    counts = draw(shares.log(), 2000).bincount(minlength=5)
    torch.testing.assert_close(counts / 2000, shares, atol=0.001, rtol=0)
    noise = uniform_noise([5], 20_000)[0]
    counts = choose(shares.log().expand(20_000, -1), noise).bincount(minlength=5)
    torch.testing.assert_close(counts / 20_000, shares, atol=0.015, rtol=0)


@pytest.mark.parametrize("noise", [0.0, ALMOST_1])
@pytest.mark.parametrize("impossible", [[], [0], [4], [0, 1, 3, 4]])
def test_excluded_codes_are_not_chosen_even_at_the_ends(noise, impossible):
    logits = torch.zeros(1, 5)
    logits[:, impossible] = -torch.inf
    possible = [code for code in range(5) if code not in impossible]
    assert choose(logits, torch.tensor([noise], dtype=torch.double)).item() == possible[0 if noise == 0 else -1]


def test_the_largest_noise_never_chooses_an_excluded_code():
    logits = random_logits(200, 50)
    logits[:, 40:] = -torch.inf
    noise = torch.full((200,), ALMOST_1, dtype=torch.double)
    assert (choose(logits, noise) == 39).all()


def test_a_rows_code_depends_on_its_own_noise_only():
    logits, noise = random_logits(), uniform_noise(image_seeds(0, 0, 6), 1)[:, 0]
    alone = [choose(logits[row : row + 1], noise[row : row + 1]).item() for row in range(6)]
    assert choose(logits, noise).tolist() == alone


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"temperature": 0}, ("got 0", "more than 0 (at least 1e-06", "top_k=1 (--top-k 1)")),
        ({"temperature": 0.0}, ("top_k=1 (--top-k 1)",)),
        ({"temperature": "0"}, ("top_k=1 (--top-k 1)",)),
        ({"temperature": -0.5}, ("got -0.5", "more than 0")),
        ({"temperature": 1e-300}, ("at least 1e-06",)),
        ({"temperature": 1e300}, ("got 1e+300", "at most 1e+06")),
        ({"temperature": float("nan")}, ("finite", "nan")),
        ({"temperature": float("inf")}, ("finite", "inf")),
        ({"temperature": None}, ("number", "got None")),
        ({"top_k": 0}, ("got 0", "at least 1", "Omit")),
        ({"top_k": -3}, ("got -3", "at least 1")),
        ({"top_k": 2.5}, ("integer", "got 2.5")),
        ({"top_k": True}, ("integer", "got True")),
        ({"top_p": 0}, ("got 0", "above 0 and at most 1", "0.9", "top_k=1 (--top-k 1)")),
        ({"top_p": 95}, ("got 95", "above 0 and at most 1", "For 95 percent, use 0.95")),
        ({"top_p": 1.01}, ("got 1.01", "above 0 and at most 1")),
        ({"top_p": -0.1}, ("got -0.1", "above 0")),
        ({"guidance_scale": -1}, ("got -1", "0 (ignores the class) to 1e+06")),
        ({"guidance_scale": 1e300}, ("got 1e+300",)),
        ({"num_steps": 0}, ("got 0", "at least 1", "Omit")),
        ({"choice_temperature": -1}, ("got -1", "expected 0")),
        ({"choice_temperature": 9, "cell_choice": "halton"}, ("9", "halton", "Remove choice_temperature")),
    ],
    ids=str,
)
def test_an_impossible_setting_names_what_to_use_instead(given, named):
    with refuses("the sampling options", *given, *named):
        parse_config(SamplingConfig, given, "the sampling options")


@pytest.mark.parametrize("given", [{"temperature": 1e-6}, {"temperature": 1e6}, {"guidance_scale": 1e6}, {"top_p": 1}])
def test_extreme_settings_give_finite_probabilities(given):
    sampling = parse_config(SamplingConfig, given, "the sampling options")
    logits = 40 * random_logits()
    guided = guide(logits, logits.flip(-1), sampling.guidance_scale)
    assert not filter_logits(guided, sampling).isnan().any()
    assert filter_logits(guided, sampling).softmax(-1).isfinite().all()


def test_the_smallest_temperature_is_top_k_1():
    logits, noise = random_logits(), torch.rand(random_logits().shape[:-1], dtype=torch.float64)
    drawn = [
        choose(filter_logits(logits, SamplingConfig(**given)), noise) for given in ({"temperature": 1e-6}, {"top_k": 1})
    ]
    assert torch.equal(*drawn)
