"""A model folder returns what was saved, or one message about what is wrong with it."""

import hashlib
import json
import pickle
from pathlib import Path

import pytest
import torch
from messages import assert_names, refuses
from torch import nn

from twostage.core.errors import InputError
from twostage.core.files import file_sha256, write_json
from twostage.core.runs.model_folder import fill, find_model_folder, hash_tensors, load_model_folder, save_model_folder

CONFIG = {"grid": [4, 4], "model": {"type": "conv"}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "first" / "model"
    save_model_folder(folder, "tokenizer", CONFIG, {"weight": torch.arange(6.0).view(2, 3).T, "bias": torch.zeros(2)})
    return folder


def test_round_trip(folder):
    for path in (folder, folder.parent):  # a model folder, a run folder
        config, state = load_model_folder(path, "tokenizer")
        assert config == CONFIG
        assert torch.equal(state["weight"], torch.arange(6.0).view(2, 3).T)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_saving_again_replaces(folder):
    save_model_folder(folder, "tokenizer", {"grid": [8, 8]}, {"weight": torch.ones(1)})
    config, state = load_model_folder(folder, "tokenizer")
    assert (config, list(state)) == ({"grid": [8, 8]}, ["weight"])


def test_the_wrong_kind_is_refused(folder):
    with refuses(f"{folder}: is a tokenizer", "expected a prior"):
        load_model_folder(folder, "prior")


def test_another_format_is_refused(folder):
    content = json.loads((folder / "config.json").read_text()) | {"format_version": 2}
    write_json(folder / "config.json", content)
    with refuses(f"{folder}: written in format 2", "at most 1", "Update twostage"):
        load_model_folder(folder, "tokenizer")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_file_is_one_line(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:-5])
    with pytest.raises(InputError) as error:
        load_model_folder(folder, "tokenizer")
    assert_names(str(error.value), folder, name, "damaged", "opy the model again")
    assert "\n" not in str(error.value)


def test_missing_weights_are_named(folder):
    (folder / "model.safetensors").unlink()
    with refuses(f"{folder}: incomplete", "expected model.safetensors", "Copy the model again"):
        load_model_folder(folder, "tokenizer")


def test_pickled_weights_are_never_run(folder, tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was run",)

    (folder / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    with refuses(f"{folder}: damaged", "model.safetensors"):
        load_model_folder(folder, "tokenizer")
    assert not (tmp_path / "was run").exists()


def test_a_missing_model_has_a_reason(tmp_path):
    with refuses(f"{tmp_path}/none: no such folder", "expected a run folder"):
        find_model_folder(tmp_path / "none")
    with refuses(f"{tmp_path}: no trained model", f"expected {tmp_path}/model/config.json"):
        find_model_folder(tmp_path)
    (tmp_path / "config.yaml").touch()
    with refuses("no trained model", "not reached its first checkpoint"):
        find_model_folder(tmp_path)


def test_weights_must_fit_the_module():
    module = nn.Linear(3, 2)
    state = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    fill(module, state, "runs/x")
    assert module.weight.sum() == 6
    with refuses("runs/x: the weights do not fit config.json", "size mismatch", "Copy the model again"):
        fill(module, state | {"weight": torch.ones(2, 4)}, "runs/x")
    with refuses('Missing key(s) in state_dict: "bias"'):
        fill(module, {"weight": torch.ones(2, 3)}, "runs/x")


def test_json_is_replaced_at_once(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_hash_is_of_the_bytes_in_their_order(tmp_path):
    one, two = torch.tensor([[1, 2], [3, 4]]).T, torch.tensor([0.5], requires_grad=True)
    content = b"start" + b"one" + b"".join(n.to_bytes(8, "little") for n in (1, 3, 2, 4)) + b"two" + b"\x00\x00\x00\x3f"
    assert hash_tensors([("one", one), ("two", two)], "start") == hashlib.sha256(content).hexdigest()
    assert hash_tensors([("two", two), ("one", one)], "start") != hash_tensors([("one", one), ("two", two)], "start")
    (tmp_path / "file").write_bytes(content)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()
