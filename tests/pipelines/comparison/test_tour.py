"""The whole tour with trainings of a few steps: it resumes without training again, and describes every family."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from messages import refuses

from pipelines.comparison import tour_families
from pipelines.comparison.tour import open_plan, steps_for, take_tour
from pipelines.comparison.tour_families import FAMILIES, document_of, merged
from pipelines.comparison.tour_page import random_latents
from pipelines.evaluation.samples import SampleRequest
from stage1_tokenizer.tokenizer_training import TokenizerConfig
from stage2_prior.prior_training import PriorTrainingConfig
from twostage.core.config.sections import parse_config
from twostage.core.runs.run_folder import read_metrics

DATA = {"image_size": [16, 16], "num_images": 160}
SHORT: dict[str, Any] = {"minutes": 10, "num_images": 3, "request": SampleRequest(40), "max_steps": 3, "data": DATA}


@pytest.fixture(scope="module", autouse=True)
def _one_process():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "1000")  # one thread
        yield


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The folder of a tour, and what was found on it."""
    out = tmp_path_factory.mktemp("tour") / "tour"
    return out, take_tour(out, **SHORT)


def written(out: Path) -> dict[str, float]:
    """When the weights of each run were written."""
    return {file.parts[-3]: file.stat().st_mtime_ns for file in out.glob("*/model/model.safetensors")}


def test_every_family_is_trained_measured_and_described(told):
    out, comparison = told
    assert set(written(out)) == {"judge", "critic", *FAMILIES}
    assert not (out / "timing").exists()
    page = (out / "compare.html").read_text(encoding="utf-8")
    places = [page.index(f"<h2>{number}. {family.title}") for number, family in enumerate(FAMILIES.values(), 1)]
    assert places == sorted(places)
    assert page.count("data:image/png;base64,") == len(FAMILIES) + 1
    document = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    assert [model["name"] for model in document["models"]] == list(FAMILIES)
    for model in document["models"]:
        expected = {"nats_per_code"} if FAMILIES[model["name"]].is_prior else {"psnr", "ssim"}
        assert expected < model["figures"].keys()
    assert document["tour"]["codes_of"] in ("vqvae", "vqgan")
    for name, steps in document["tour"]["steps"].items():
        assert read_metrics(out / name / "metrics.jsonl")[-1]["step"] == steps
    assert (out / "compare.png").stat().st_size > 1000
    assert [model.samples is not None for model in comparison.models] == [False] * 2 + [True] * 2 + [False] * 2 + [
        True
    ] * 3


def test_the_same_tour_again_trains_nothing_again(told, capsys):
    out, _ = told
    before, steps = written(out), json.loads((out / "tour.json").read_text())["steps"]
    (out / "compare.html").unlink()
    take_tour(out, **SHORT)
    assert written(out) == before
    assert json.loads((out / "tour.json").read_text())["steps"] == steps
    assert (out / "compare.html").is_file()
    assert capsys.readouterr().out.count("nothing left to do") == len(FAMILIES) + 2


def test_another_tour_in_the_same_folder_is_refused(told):
    out, _ = told
    with refuses("--out", out, "minutes 10", "not 2", "another --out"):
        take_tour(out, minutes=2, data=DATA)


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with refuses("--out", tmp_path, "not a tour"):
        take_tour(tmp_path, data=DATA)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_too_little_time_for_a_step(tmp_path, new_process):
    plan = open_plan(tmp_path / "tour", {"source": "shapes", **DATA}, 1e-9, 0, 3)
    with refuses("--minutes 1e-09", "Autoencoder (AE)", "at least --minutes"):
        steps_for(plan, "ae")


def test_random_latents_belong_to_the_seed(told):
    _, comparison = told
    model = comparison.models[0].tokenizer
    pictures = random_latents(model, comparison, seed=1)
    assert pictures.shape == comparison.originals.shape
    assert torch.equal(pictures, random_latents(model, comparison, seed=1))
    assert not torch.equal(pictures, random_latents(model, comparison, seed=2))


@pytest.mark.parametrize("name", FAMILIES)
def test_configurations_are_those_of_the_trainings(name):
    document = merged(document_of(name), {"run": {"dir": "x"}, "train": {"max_steps": 1}})
    if name == "vqgan":
        document = merged(document, {"loss": {"perceptual": {"path": "x"}}})
    if FAMILIES[name].is_prior:
        config = parse_config(PriorTrainingConfig, document | {"codes": "x"}, name)
        assert config.model.type == {"gpt": "causal_transformer", "maskgit": "masked_transformer"}.get(name, name)
    else:
        config = parse_config(TokenizerConfig, document, name)
        assert bool(config.loss.adversarial) == (name == "vqgan")
        assert bool(config.loss.corruption) == (name == "dae")
    for file in FAMILIES[name].file.split(", "):
        assert (Path(tour_families.__file__).parents[2] / file).is_file()


def test_merging_keeps_groups_of_one_type_and_replaces_others():
    base = {"a": {"type": "x", "b": 1, "c": 2}, "d": 3}
    assert merged(base, {"a": {"b": 5}}) == {"a": {"type": "x", "b": 5, "c": 2}, "d": 3}
    assert merged(base, {"a": {"type": "y", "e": 1}}) == {"a": {"type": "y", "e": 1}, "d": 3}
    assert base == {"a": {"type": "x", "b": 1, "c": 2}, "d": 3}
