"""The verdict: each finding at its threshold, with its sentence."""

import pytest

from pipelines.evaluation.verdict import verdict

GOOD = {
    "images": 10_000, "psnr": 25.0, "codebook_size": 512, "codebooks": 1, "codes_used": 512, "perplexity": 470.0,
    "entropy_nats_per_code": 6.15, "cells": 64, "code_bits_per_pixel": 0.56, "lpips": None,
}  # fmt: skip


def test_a_good_tokenizer_is_ready():
    assert verdict(GOOD).ready
    assert verdict(GOOD).sentences == ["Ready for stage two: twostage encode, then twostage train-prior."]


@pytest.mark.parametrize(
    ("changes", "ready", "words"),
    [
        ({"psnr": 17.9}, False, ["PSNR is 17.9 dB, below 18"]),
        ({"codes_used": 255, "perplexity": 200.0}, False, ["collapsing", "revive_below", "codebook_size", "ema_decay"]),
        ({"codes_used": 256, "perplexity": 200.0}, True, []),
        ({"codes_used": 100, "perplexity": 80.0, "images": 79}, True, ["at least 80 images"]),
        ({"codebooks": 2, "codes_used": 511, "perplexity": 200.0}, False, ["511 of 1024 codes are used"]),
        ({"codebooks": 2, "codes_used": 1024, "perplexity": 128.0}, True, []),
        ({"entropy_nats_per_code": 0.62, "perplexity": 1.9}, False, ["next to nothing"]),
        ({"perplexity": 127.9}, True, ["Few codes do most of the work"]),
        ({"cells": 1025}, False, ["1025 cells", "channel_mult"]),
        ({"cells": 1024}, True, []),
        ({"code_bits_per_pixel": 2.25}, True, ["2.25 bits per pixel"]),
        ({"code_bits_per_pixel": 0.01}, True, ["0.010 bits per pixel"]),
        ({"psnr": 10.0, "cells": 4096}, False, ["PSNR", "4096 cells"]),
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
