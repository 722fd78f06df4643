"""`sweep`: every combination in its own run folder, one table; it resumes, and one that fails stops no other."""

import json

import pytest
from messages import assert_names, refuses

from pipelines.comparison.combinations import combinations, split_values

FEW = ["train.max_steps=2", "train.validate_every=2", "train.checkpoint_every=2", "run.trackers=[]"]


def test_values_are_split_at_commas_outside_brackets():
    assert split_values("[8, 8],16, '1,2'") == ["[8, 8]", "16", "'1,2'"]
    found, fixed = combinations(["train.lr=1e-3,1e-4", "data.source=shapes", "model.depth=2,4"])
    assert fixed == ["data.source=shapes"]
    assert [one.name for one in found] == [f"lr={lr},depth={depth}" for lr in ("1e-3", "1e-4") for depth in (2, 4)]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ([], ["got no key", "train.lr=1e-4,1e-3"]),
        (["train.lr=1"], ["train.lr=1", "several values"]),
        (["train.lr="], ["train.lr=", "key=value,value"]),
        (["train.lr=1,,2"], ["train.lr=1,,2", "missing value"]),
        (["train.lr=1,2,1"], ["train.lr=1,2,1", "value 1 twice", "Remove one"]),
        (["run.dir=a,b"], ["run.dir=a,b", "folder of its own"]),
        (["run.seed=0,1", "run.seed=2,3"], ["run.seed=2,3", "given twice", "at once"]),
        (["data.source=a/b,a b"], ["source=a_b", "two combinations"]),
    ],
)
def test_what_cannot_be_varied(settings, named):
    with refuses(*named):
        combinations(settings)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["train.log_every=1,2"], ["train.log_every=1", "no effect", "another key"]),
        (["train.lr=0.001,1e-3"], ["train.lr=0.001", "train.lr=1e-3", "same configuration"]),
        (["train.rate=1,2"], ["train.rate", "unknown key"]),
    ],
)
def test_a_key_without_effect(settings, named, twostage, configs, tmp_path):
    ended = twostage("sweep", configs / "tokenizer.yaml", *settings, "--out", tmp_path / "sweep")
    assert ended.code == 2
    assert_names(ended.err, *named)
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_trains_and_resumes(twostage, configs, tmp_path):
    files = ["--out", tmp_path / "sweep", "--json", tmp_path / "sweep.json"]
    few = [*FEW, "model.bottleneck.codebook_size=8"]
    words = ["sweep", configs / "tokenizer.yaml", "model.bottleneck.type=vector,finite_scalar", "train.lr=1e-3,1e-4"]
    words += [*few, *files]
    ended = twostage(*words)
    assert ended.code == 2, "finite_scalar has no codebook_size"
    assert_names(ended.err, "2 of 4 combinations failed", "type=finite_scalar, train.lr=1e-3", "codebook_size")
    runs = json.loads((tmp_path / "sweep.json").read_text())["runs"]
    assert [run["step"] for run in runs] == [2, 2, 0, 0]
    assert runs[1]["dir"] == str(tmp_path / "sweep" / "type=vector,lr=1e-4")
    assert {"loss", "psnr"} <= runs[1]["held_out"].keys()
    assert "lowest held-out loss" in ended.out
    again = twostage(*words)
    assert again.out.count("nothing left to do") == 2
    assert json.loads((tmp_path / "sweep.json").read_text())["runs"] == runs
    longer = twostage(
        *words[:2], "train.lr=1e-3,1e-4", *FEW, "train.max_steps=3", "model.bottleneck.codebook_size=8", *words[-4:]
    )
    assert longer.code == 0, longer.err
    assert [run["step"] for run in json.loads((tmp_path / "sweep.json").read_text())["runs"]] == [3, 3]


def test_a_sweep_of_priors(twostage, configs, runs, tmp_path):
    words = [configs / "prior.yaml", f"codes={runs.codes}", "run.seed=0,1", *FEW, f"run.dir={tmp_path / 'p'}"]
    ended = twostage("sweep", *words)
    assert ended.code == 0, ended.err
    assert_names(ended.out, "run.seed  step  loss", "lowest held-out loss", str(tmp_path / "p_sweep" / "seed="))
    assert (tmp_path / "p_sweep" / "seed=1" / "samples").is_dir()
