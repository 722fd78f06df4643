import json

import pytest

from stage1_tokenizer.diagnosis import Diagnosis

HEALTHY = {"codebook_usage": 0.9, "perplexity": 400.0, "discriminator_accuracy": 0.7, "kl": 20.0, "active_share": 0.8}
SICK = [
    (
        {"codebook_usage": 0.12, "perplexity": 9.3},
        5,
        ["codebook", "12%", "9.3", "Try a, b or c"],
    ),
    ({"discriminator_accuracy": 0.501}, 10, ["at chance", "50%", "loss.adversarial.lr"]),
    ({"discriminator_accuracy": 0.999}, 10, ["discriminator wins", "99.9%", "lecam_weight"]),
    ({"kl": 0.01}, 5, ["posterior collapse", "0.010 nats", "kl_weight"]),
    ({"active_share": 0.05}, 3, ["posterior collapse", "5%", "latent_channels"]),
]


@pytest.fixture
def reported():
    return []


def watch(reported, facts):
    return Diagnosis("a, b or c", facts, reported.append)


@pytest.mark.parametrize(("metrics", "patience", "words"), SICK, ids=[str(s[0]) for s in SICK])
def test_a_lasting_problem_is_reported_once(metrics, patience, words, reported):
    facts = {}
    diagnosis = watch(reported, facts)
    for step in range(patience - 1):
        diagnosis.observe(step, HEALTHY | metrics)
    assert reported == []
    diagnosis.observe(70, HEALTHY | metrics)
    assert len(reported) == 1
    assert reported[0].startswith("step 70: ")
    assert all(word in reported[0] for word in words)
    for step in range(30):
        diagnosis.observe(100 + step, HEALTHY | metrics)
    assert len(reported) == 1


@pytest.mark.parametrize(("metrics", "patience", "words"), SICK, ids=[str(s[0]) for s in SICK])
def test_a_passing_problem_is_not_reported(metrics, patience, words, reported):
    diagnosis = watch(reported, {})
    for step in range(40):
        diagnosis.observe(step, HEALTHY | metrics if step % patience else HEALTHY)
    assert reported == []


def test_a_resumed_run_continues_counting_and_does_not_repeat(reported):
    facts: dict = {}
    for step in range(3):
        watch(reported, facts).observe(step, {"kl": 0.0})
        facts = json.loads(json.dumps(facts))
    diagnosis = watch(reported, facts)
    diagnosis.observe(3, {"kl": 0.0})
    assert reported == []
    diagnosis.observe(4, {"kl": 0.0})
    facts = json.loads(json.dumps(facts))
    for step in range(20):
        watch(reported, facts).observe(5 + step, {"kl": 0.0})
    assert len(reported) == 1


def test_missing_metrics_are_ignored(reported):
    for step in range(20):
        watch(reported, {}).observe(step, {"loss": 1.0})
    assert reported == []
