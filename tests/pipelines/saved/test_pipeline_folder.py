"""An incomplete pipeline folder is refused with what it lacks."""

import json
import shutil
from pathlib import Path

import pytest
from messages import assert_names

from pipelines.drawing.two_stage import TwoStagePipeline
from twostage.core.errors import InputError


@pytest.fixture
def folder(pipeline: TwoStagePipeline, tmp_path: Path) -> Path:
    pipeline.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def refused(folder: Path | str) -> str:
    with pytest.raises(InputError) as raised:
        TwoStagePipeline.from_pretrained(folder)
    return str(raised.value)


def test_every_missing_file_is_named(folder):
    (folder / "prior" / "model.safetensors").unlink()
    (folder / "tokenizer" / "config.json").unlink()
    message = refused(folder)
    assert "tokenizer/config.json is missing; prior/model.safetensors is missing" in message
    shutil.rmtree(folder / "prior")
    assert "prior/config.json is missing" in refused(folder)


def test_a_changed_byte_is_found(folder):
    file = folder / "prior" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "prior/model.safetensors has the hash" in refused(folder)


def test_no_pipeline(folder, twostage, tmp_path):
    (folder / "pipeline.json").unlink()
    assert "holds no pipeline (pipeline.json is missing)" in refused(folder)
    for verb in (("generate", "--out", tmp_path / "out"), ("reconstruct",), ("export", "--out", tmp_path / "out")):
        ended = twostage(verb[0], folder, *verb[1:])
        assert ended.code == 2
        assert "holds no pipeline (pipeline.json is missing)" in ended.err
    assert "no such folder" in refused(tmp_path / "nothing")


def test_other_formats(folder):
    file = folder / "pipeline.json"
    document = json.loads(file.read_text())
    for change, said in (
        ({"format_version": 3}, "written in format 3, but this version of twostage reads at most 2"),
        ({"kind": "other"}, "kind 'other'"),
        ({"sha256": ["a"]}, "`sha256`"),
        ({"sha256": {"../secret": "0"}}, "'../secret'"),
    ):
        file.write_text(json.dumps(document | change))
        assert said in refused(folder)
    file.write_text(json.dumps({"format_version": 1, "kind": "two_stage_pipeline"}))
    TwoStagePipeline.from_pretrained(folder)  # what earlier versions wrote


def test_a_hub_id_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    message = refused("somebody/something")
    assert_names(message, "somebody/something", tmp_path / "hub", "copy the pipeline's folder")
