"""What lies at a path is found once: the kind of the model, its run, and its tokenizer."""

import shutil
from pathlib import Path

import pytest
from messages import refuses

from pipelines.saved.saved_model import SavedModel


@pytest.mark.parametrize("kind", ["tokenizer", "prior"])
def test_a_run_folder_and_its_model_folder_are_the_same_model(runs, kind):
    run = getattr(runs, kind)
    for path in (run, str(run / "model")):
        found = SavedModel.find(path)
        assert (found.kind, found.folder, found.home) == (kind, run / "model", run)
        assert found.run
        assert found.default_output("sheet.png") == run / "sheet.png"


def test_a_model_folder_outside_of_a_run_has_no_run(runs, tmp_path):
    shutil.copytree(runs.tokenizer / "model", tmp_path / "alone")
    found = SavedModel.find(tmp_path / "alone")
    assert (found.kind, found.home, found.run) == ("tokenizer", tmp_path / "alone", None)
    with refuses(tmp_path / "alone", "--data SOURCE"):
        found.training_data()
    assert found.training_data("shapes").size == (16, 16)


def test_a_pipeline_folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline")
    found = SavedModel.find(tmp_path / "pipeline")
    assert (found.kind, found.run, found.default_output("sheet.png")) == ("pipeline", None, Path("sheet.png"))
    where, tokenizer = found.open_tokenizer()
    assert (where.kind, where.path) == ("tokenizer", tmp_path / "pipeline")
    assert tokenizer.content_hash() == pipeline.tokenizer.content_hash()


def test_a_run_is_never_downloaded(monkeypatch):
    monkeypatch.setattr("pipelines.saved.saved_model.download_pipeline", lambda name: pytest.fail(f"downloads {name}"))
    with refuses("somebody/something: no such folder"):
        SavedModel.find_run("somebody/something")
    with refuses("runs/nothing: no such folder"):
        SavedModel.find("runs/nothing")


def test_the_kind_of_a_damaged_model_is_unknown(runs, tmp_path):
    shutil.copytree(runs.prior / "model", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{")
    assert SavedModel.find(tmp_path / "model").kind is None


def test_a_prior_finds_its_tokenizer(runs):
    where, tokenizer = SavedModel.find(runs.prior).open_tokenizer()
    assert (where.kind, Path(where.path).resolve()) == ("tokenizer", runs.tokenizer.resolve())
    assert where.training_data().source == "shapes"
    assert len(where.held_out_images()) > 0
    assert tokenizer.codebook_size == 16
