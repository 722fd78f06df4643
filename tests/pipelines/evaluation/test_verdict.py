"""The verdict: each finding at its threshold, with its sentence."""

import pytest
from messages import assert_names

from pipelines.evaluation.verdict import verdict

GOOD = {
    "images": 10_000, "psnr": 25.0, "codebook_size": 512, "codebooks": 1, "codes_used": 512, "perplexity": 470.0,
    "entropy_nats_per_code": 6.15, "cells": 64, "code_bits_per_pixel": 0.56, "lpips": None,
    "recognised": 0.71, "recognised_originals": 0.73, "rfid": 4.2, "rfid_of_halves": 5.1,
}  # fmt: skip
OF_JUDGE = ("recognised", "recognised_originals", "rfid", "rfid_of_halves")
WITHOUT_JUDGE = {name: value for name, value in GOOD.items() if name not in OF_JUDGE}


def test_a_good_tokenizer_is_ready_and_it_says_why():
    assert verdict(GOOD).ready is True
    (sentence,) = verdict(GOOD).sentences
    assert_names(sentence, "Ready for stage two", "PSNR 25.0 dB", "71.0% recognised", "73.0% of the originals")
    assert_names(
        sentence, "Frechet distance 4.2", "halves of the originals: 5.1", "twostage encode, then twostage train-prior"
    )
    by_distance = verdict(WITHOUT_JUDGE | {"rfid": 4.2})
    assert by_distance.ready is True
    assert_names(by_distance.sentences[0], "Ready for stage two", "PSNR 25.0 dB", "codes and Frechet distance 4.2")


def test_without_an_independent_judge_there_is_no_verdict():
    """PSNR and the use of the codes were good where a network recognised 47% (73% of the originals)."""
    for figures, not_evidence, words in [
        (WITHOUT_JUDGE, {}, "no independent network judged"),
        (GOOD | dict.fromkeys(OF_JUDGE), {}, "no independent network judged"),
        (GOOD, {"recognised": "why", "rfid": "why"}, "is one that the tokenizer was trained against"),
        (WITHOUT_JUDGE | {"rfid": 0.0}, {"rfid": "why"}, "is one that the tokenizer was trained against"),
        (WITHOUT_JUDGE | {"lpips": 0.1}, {"lpips": "why"}, "no independent network judged"),
        (WITHOUT_JUDGE | {"recognised": 0.4, "recognised_originals": 0.45}, {}, "hardly recognises the originals"),
        (GOOD | {"recognised_originals": 0.49}, {}, "the judging network hardly recognises the originals"),
    ]:
        found = verdict(figures, not_evidence)
        assert found.ready is None
        assert words in found.sentences[0]
        assert "Ready" not in " ".join(found.sentences)
        assert "Frechet distance" not in " ".join(found.sentences), "no evidence, so no reason"
        assert "--features runs/NAME" in found.sentences[1]
        assert "--seed" in found.sentences[1]
    broken = verdict(GOOD | {"psnr": 12.0}, {"recognised": "why", "rfid": "why"})
    assert broken.ready is False, "what PSNR says against it holds whoever judged"


@pytest.mark.parametrize(
    ("changes", "ready", "words"),
    [
        ({"psnr": 17.9}, False, ["PSNR is 17.9 dB, below 18"]),
        ({"codes_used": 255, "perplexity": 200.0}, False, ["collapsing", "revive_below", "codebook_size", "ema_decay"]),
        ({"codes_used": 256, "perplexity": 200.0}, True, []),
        ({"codes_used": 100, "perplexity": 80.0, "images": 79}, True, ["at least 80 images"]),
        ({"codebooks": 2, "codes_used": 511, "perplexity": 200.0}, False, ["511 of 1024 codes are used"]),
        ({"codebooks": 2, "codes_used": 1024, "perplexity": 128.0}, True, []),
        ({"entropy_nats_per_code": 0.62, "perplexity": 1.9}, False, ["say almost nothing", "train.lr"]),
        ({"perplexity": 127.9}, True, ["A few codes do most of the work", "revive_below"]),
        ({"cells": 1025}, False, ["1025 cells", "channel_mult"]),
        ({"cells": 1024}, True, []),
        ({"code_bits_per_pixel": 2.25}, True, ["2.25 bits per pixel"]),
        ({"code_bits_per_pixel": 0.01}, True, ["0.010 bits per pixel"]),
        ({"psnr": 10.0, "cells": 4096}, False, ["PSNR", "4096 cells"]),
        ({"recognised": 0.47}, False, ["recognises 47.0% of the reconstructions and 73.0% of the originals"]),
        ({"recognised": 0.585}, True, []),
        ({"rfid": 52.0}, True, ["more than 10 times"]),
        ({"rfid": 52.0, "rfid_of_halves": None}, True, []),
    ],
)
def test_each_finding_has_its_sentence(changes, ready, words):
    found = verdict(GOOD | changes)
    assert found.ready == ready
    assert all(word in " ".join(found.sentences[1:]) for word in words)
    assert bool(found.sentences[1:]) == bool(words)
    assert found.sentences[0].startswith("Ready" if ready else "Not ready")


def test_a_continuous_latent_is_not_ready():
    found = verdict({"images": 100, "psnr": 30.0, "active_units": 20, "latent_units": 100})
    assert not found.ready
    assert len(found.sentences) == 2
    assert "model.bottleneck.type=vector" in found.sentences[1]
    collapsed = verdict({"images": 100, "psnr": 30.0, "active_units": 19, "latent_units": 100})
    assert "19 of 100 latent units are active" in collapsed.sentences[2]
    assert "loss.kl_weight" in collapsed.sentences[2]
