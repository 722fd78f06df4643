"""A prior that starts from another one draws what that one draws, under the names that both have."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from messages import assert_names, refuses
from torch import Tensor, nn

from stage2_prior.codes import TokenizerReference
from stage2_prior.networks.causal_transformer import CausalTransformerConfig
from stage2_prior.prior import Prior
from stage2_prior.prior_training import PriorTrainingConfig, train
from stage2_prior.start_from import start_from
from twostage.core.conditions.condition import ConditionConfig
from twostage.core.conditions.map_condition import MapConditionConfig
from twostage.core.conditions.text_condition import TextConditionConfig
from twostage.core.conditions.vector_condition import VectorConditionConfig
from twostage.core.conditions.vocabulary import Vocabulary

TRAINING = (train, PriorTrainingConfig)  # what `start` starts
CODES = torch.randint(5, (4, 2, 3), generator=torch.Generator().manual_seed(2))


def nats(prior: Prior, given: dict[str, Tensor]) -> Tensor:
    return prior.log_likelihood(
        CODES, {name: values.repeat(4, *[1] * (values.ndim - 1)) for name, values in given.items()}
    )


@pytest.mark.parametrize("model", ["causal_transformer", "pixelcnn"])
def test_classes_are_taken_over_by_name(model, tiny_prior, tmp_path):
    earlier = tiny_prior(class_names=["cat", "dog"], model=model)
    earlier.save_pretrained(tmp_path / "earlier")
    prior = tiny_prior(class_names=["dog", "owl", "cat"], model=model, trained=False)
    said = start_from(prior, str(tmp_path / "earlier"))
    for name, row in {"dog": 0, "cat": 2, "none": 3, "owl": 1}.items():
        before = {"cat": 0, "dog": 1}.get(name, 2)
        torch.testing.assert_close(
            nats(prior, {"class": torch.tensor([row])}), nats(earlier, {"class": torch.tensor([before])})
        )
    assert_names(said, "the same classes: dog, cat; new classes: owl")


def conditioned(captions: list[str], units: str, mean: float, labels: tuple[int, ...], prior: Prior) -> Prior:
    vocabulary = Vocabulary.learned_from(captions, units, 270)  # type: ignore[arg-type]
    conditions: list[ConditionConfig] = [
        TextConditionConfig(units=units, max_length=8, depth=1, vocabulary=vocabulary),  # type: ignore[arg-type]
        VectorConditionConfig(mean=(mean, 1.0), std=(2.0, mean)),
        MapConditionConfig(labels=labels, size=(8, 12)),
    ]
    made = Prior(prior.config.model_copy(update={"conditions": conditions}))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4)
    return made.eval()


@pytest.mark.parametrize("units", ["words", "byte_pairs"])
def test_conditions_mean_the_same(units, tiny_prior, tmp_path):
    earlier = conditioned(["a red star", "a blue ring"], units, 1.0, (0, 3), tiny_prior())
    earlier.save_pretrained(tmp_path / "earlier")
    prior = conditioned(["a green ring", "a red ring", "a star"], units, 3.0, (3, 4, 0), tiny_prior())
    said = start_from(prior, str(tmp_path / "earlier"))
    labels = np.full((8, 12), 3)
    labels[:4] = 0
    for kind, value in {"vector": [0.5, -2.0], "map": labels}.items():
        given = [{kind: each.parse(kind, [value])} for each in (prior, earlier)]
        torch.testing.assert_close(nats(prior, given[0]), nats(earlier, given[1]))
    if units == "words":
        given = [{"text": each.parse("text", ["a red ring"])} for each in (prior, earlier)]
        torch.testing.assert_close(nats(prior, given[0]), nats(earlier, given[1]))
        assert_names(said, "4 of 5 tokens of captions are the same", "2 of 3 labels of maps are the same")
    else:
        assert_names(said, "tokens of captions are the same", "the same conditions: text, vector, map")


def test_another_form_is_refused(tiny_prior, tmp_path):
    tiny_prior().save_pretrained(tmp_path / "earlier")
    source = str(tmp_path / "earlier")
    other = CausalTransformerConfig(hidden_size=16, depth=3, num_heads=2, dropout=0.5)
    with refuses("init_from", source, "model.depth: was 2, now 3", "init_from="):
        start_from(tiny_prior(model=other), source)
    stranger = tiny_prior()
    stranger.config = stranger.config.model_copy(update={"tokenizer": TokenizerReference(hash="f" * 64, path="runs/x")})
    with refuses("init_from", source, "0123456789ab", "f" * 12, "runs/tokenizer", "init_from="):
        start_from(stranger, source)
    deeper = conditioned(["a"], "words", 1.0, (0,), tiny_prior())
    deeper.save_pretrained(tmp_path / "text")
    text = TextConditionConfig(
        units="words", max_length=9, depth=1, vocabulary=Vocabulary.learned_from(["a"], "words", 9)
    )
    longer = Prior(deeper.config.model_copy(update={"conditions": [text]}))
    with refuses("init_from", str(tmp_path / "text"), "conditions.text.positions", "condition", "init_from="):
        start_from(longer, str(tmp_path / "text"))
    with refuses("init_from", str(tmp_path / "none"), "no such folder"):
        start_from(tiny_prior(), str(tmp_path / "none"))


def test_a_run_starts_from_another(tiny_prior, tmp_path, write_codes, start: Callable[[dict], Path], capsys):
    rng = np.random.default_rng(0)
    grids = {name: rng.integers(0, 5, (16, 2, 3)) for name in ("train", "val")}
    write_codes(tmp_path / "codes", grids, 5, ["cat", "owl"], {name: np.arange(16) % 2 for name in grids})
    earlier = tiny_prior(class_names=["cat", "dog"])
    earlier.save_pretrained(tmp_path / "earlier")
    document = {
        "run": {"dir": str(tmp_path / "run"), "trackers": []},
        "codes": str(tmp_path / "codes"),
        "init_from": str(tmp_path / "earlier"),
        "train": {"batch_size": 8, "max_steps": 1, "lr": 1e-12, "ema_decay": 0.9, "checkpoint_every": 1},
    }
    trained = Prior.from_pretrained(start(document))
    cat = {"class": torch.tensor([0])}
    torch.testing.assert_close(nats(trained, cat), nats(earlier, cat))
    assert_names(capsys.readouterr().out, "the same classes: cat", "new classes: owl", "dropped classes: dog")
    assert trained.config.model == earlier.config.model, "the model group was not given"
    (tmp_path / "earlier").rename(tmp_path / "gone")
    document |= {"model": trained.config.model.model_dump(mode="json"), "train": document["train"] | {"max_steps": 2}}
    start(document)
    assert "Resuming from step 1" in capsys.readouterr().out, "without the prior that it started from"
