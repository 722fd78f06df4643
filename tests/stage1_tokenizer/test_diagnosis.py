import json

import pytest

from stage1_tokenizer.diagnosis import Diagnosis

HEALTHY = {"codebook_usage": 0.9, "perplexity": 400.0, "discriminator_accuracy": 0.7, "kl": 20.0, "active_share": 0.8}
SICK = [
    (
        {"codebook_usage": 0.12, "perplexity": 9.3},
        5,
        ["the codebook is collapsing: 12% of the codes", "9.3", "Try a, b or c"],
    ),
    ({"discriminator_accuracy": 0.501}, 10, ["at chance", "50%", "loss.adversarial.lr"]),
    ({"discriminator_accuracy": 0.999}, 10, ["wins outright", "99.9%", "lecam_weight"]),
    ({"kl": 0.01}, 5, ["posterior collapse", "0.010 nats", "kl_weight"]),
    ({"active_share": 0.05}, 3, ["5% of the latent's units", "latent_channels"]),
]


@pytest.fixture
def said():
    return []


def watch(said, facts):
    return Diagnosis("a, b or c", facts, said.append)


@pytest.mark.parametrize(("metrics", "patience", "words"), SICK, ids=[str(s[0]) for s in SICK])
def test_what_holds_for_a_while_is_said_once(metrics, patience, words, said):
    facts = {}
    diagnosis = watch(said, facts)
    for step in range(patience - 1):
        diagnosis.observe(step, HEALTHY | metrics)
    assert said == []
    diagnosis.observe(70, HEALTHY | metrics)
    assert len(said) == 1
    assert said[0].startswith("step 70: ")
    assert all(word in said[0] for word in words)
    for step in range(30):
        diagnosis.observe(100 + step, HEALTHY | metrics)
    assert len(said) == 1


@pytest.mark.parametrize(("metrics", "patience", "words"), SICK, ids=[str(s[0]) for s in SICK])
def test_what_passes_is_not_said(metrics, patience, words, said):
    diagnosis = watch(said, {})
    for step in range(40):
        diagnosis.observe(step, HEALTHY | metrics if step % patience else HEALTHY)
    assert said == []


def test_a_restart_goes_on_counting_and_does_not_repeat(said):
    facts: dict = {}
    for step in range(3):
        watch(said, facts).observe(step, {"kl": 0.0})
        facts = json.loads(json.dumps(facts))
    diagnosis = watch(said, facts)
    diagnosis.observe(3, {"kl": 0.0})
    assert said == []
    diagnosis.observe(4, {"kl": 0.0})
    facts = json.loads(json.dumps(facts))
    for step in range(20):
        watch(said, facts).observe(5 + step, {"kl": 0.0})
    assert len(said) == 1


def test_metrics_that_a_family_does_not_have_are_no_reason(said):
    for step in range(20):
        watch(said, {}).observe(step, {"loss": 1.0})
    assert said == []
