"""Folder names that YAML would read as something else are used as written."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images
from twostage.core.machine.command import print_once

NAMES = ["my pics #2", "2024", "12:30", "on", "[wip]", "photos: summer", "null", " spaced "]
SHORT = ["run.trackers=[]", "train.max_steps=1", "train.batch_size=4", "model.bottleneck.codebook_size=8"]


@pytest.fixture(autouse=True)
def _own_machine(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TWOSTAGE_DATA", raising=False)


def write_sheets(folder: Path, colour: str) -> None:
    for i in range(12):
        file = folder / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), colour).save(file)


def facts_of(source: str) -> dict:
    return load_images(DataConfig(source=source, image_size=16)).identity()


@pytest.mark.parametrize("name", NAMES)
def test_a_training_uses_the_folders_as_written(name, works, configs):
    for other in {name.partition("#")[0].strip(), name.strip()} - {name, ""}:  # how YAML would read it
        write_sheets(Path(other), "red")
    write_sheets(Path(name), "blue")
    words = ["train-tokenizer", configs / "tokenizer.yaml", *SHORT, f"run.dir=try {name}", "data.num_images=null"]
    works(*words, f"data.source={name}")
    run = Path(f"try {name}")
    assert [path for path in Path().iterdir() if path.name.startswith("try")] == [run]
    sources = json.loads((run / "sources.json").read_text())["sources"]
    assert sources["data.source"] == {"place": str(Path(name).absolute()), "facts": facts_of(name)}
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert (stored["run"]["dir"], stored["data"]["source"]) == (f"try {name}", name)
    assert "nothing left to do" in works("train-tokenizer", run / "config.yaml")


def test_commands_that_take_a_source_as_an_option(works, runs):
    write_sheets(Path("my pics"), "red")
    write_sheets(Path("my pics #2"), "blue")
    works("inspect", "my pics #2", "--json", "found.json")
    assert json.loads(Path("found.json").read_text())["used"]["train"][0].startswith("my pics #2/")
    works("encode", runs.tokenizer, "--data", "my pics #2", "--out", "codes #2")
    manifest = json.loads(Path("codes #2/manifest.json").read_text())
    assert (manifest["source"], manifest["images"]["facts"]) == ("my pics #2", facts_of("my pics #2"))
    works("train-features", "my pics #2", "--epochs", 1, "--width", 2, "--batch-size", 4, "--out", "net #2")
    assert yaml.safe_load(Path("net #2/config.yaml").read_text())["data"]["source"] == "my pics #2"


def test_replaced_keys_are_printed_at_the_start(works, configs):
    words = ["train-tokenizer", configs / "tokenizer.yaml", *SHORT[:3], "run.dir=run", "data.num_images=32"]
    said = works(*words, "model.bottleneck.type=lookup_free", "train.epochs=1").splitlines()
    assert said[:2] == [
        "train.epochs=1: replaces train.max_steps=1",
        "model.bottleneck.type=lookup_free: the config had type vector; dropped codebook_size",
    ]


def test_only_one_process_prints(monkeypatch, capsys):
    for rank in ("0", "1", "2"):
        monkeypatch.setenv("RANK", rank)
        print_once(f"of {rank}")
    assert capsys.readouterr().out == "of 0\n"
