"""Runs resume bit for bit after a move, from any folder, and with paths written in any way; trained models find their
data. Other content is refused."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from messages import assert_names
from PIL import Image

from stage1_tokenizer.autoencoder import Autoencoder

TOKENIZER = """
run: {dir: runs/tok, trackers: []}
data: {source: zh, image_size: 8, validation_share: 0.1}
model:
  latent_channels: 4
  backbone: {type: conv, channels: 4, channel_mult: [1, 1], num_res_blocks: [0, 0]}
  bottleneck: {type: vector, codebook_size: 8}
train: {batch_size: 8, max_steps: 4, lr: 1.0e-2, log_every: 1, checkpoint_every: 2, validate_every: 4,
        keep_checkpoints: 9}
"""
PRIOR = """
run: {dir: runs/gpt, trackers: []}
codes: codes/tok
model: {type: causal_transformer, hidden_size: 8, depth: 1, num_heads: 1, dropout: 0}
train: {batch_size: 8, max_steps: 4, lr: 1.0e-2, log_every: 1, checkpoint_every: 2, validate_every: 4,
        keep_checkpoints: 9}
"""


def write_sheets(folder: Path, seed: int, plain: bool = False) -> Path:
    """24 images of 8 x 8 in two classes; plain images have files of one size."""
    for i in range(24):
        file = folder / "ab"[i % 2] / f"{i:02d}.{'bmp' if plain else 'png'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng([seed, i]).integers(0, 256, (8, 8, 3), np.uint8)).save(file)
    return folder


def weights(run: Path) -> bytes:
    files = [run / "model/model.safetensors", *sorted((run / "checkpoints/step_00000004").glob("*.safetensors"))]
    return b"".join(file.read_bytes() for file in files)


@pytest.fixture(scope="module")
def trained(twostage, tmp_path_factory) -> Path:
    """A project whose runs ended without an interruption."""
    root = tmp_path_factory.mktemp("trained") / "project"
    write_sheets(root / "zh", 0)
    (root / "tokenizer.yaml").write_text(TOKENIZER)
    (root / "prior.yaml").write_text(PRIOR)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("XDG_CACHE_HOME", str(root.parent / "cache"))
        patch.delenv("TWOSTAGE_DATA", raising=False)
        for words in (["train-tokenizer", "tokenizer.yaml"], ["encode", "runs/tok"], ["train-prior", "prior.yaml"]):
            ended = twostage(*words)
            assert ended.code == 0, ended.err
    return root


@pytest.fixture
def project(trained, tmp_path, monkeypatch) -> Iterator[Path]:
    """A copy of it, interrupted after step 2, as the current folder; the original is moved away."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TWOSTAGE_DATA", raising=False)
    hidden = trained.with_name("hidden")
    shutil.copytree(trained, tmp_path / "project", symlinks=True)
    for run in ("tok", "gpt"):
        shutil.rmtree(tmp_path / "project/runs" / run / "checkpoints/step_00000004")
    trained.rename(hidden)
    monkeypatch.chdir(tmp_path / "project")
    yield tmp_path / "project"
    hidden.rename(trained)


@pytest.fixture(scope="module")
def ended(trained) -> dict[str, bytes]:
    """The weights and the last checkpoint of both runs."""
    return {run: weights(trained / "runs" / run) for run in ("tok", "gpt")}


@pytest.fixture
def refused(twostage) -> Callable[..., str]:
    def refused(*words: object) -> str:
        ended = twostage(*words)
        assert ended.code == 2, ended
        assert "Traceback" not in ended.err
        assert ended.err.count("error: ") == 1
        return ended.err[ended.err.index("error: ") :]

    return refused


def link(name: str, target: str) -> Callable[[Path], None]:
    return lambda project: (project / name).symlink_to(target)


def move(*pairs: str) -> Callable[[Path], None]:
    def move(project: Path) -> None:
        for pair in pairs:
            old, new = pair.split(" > ")
            (project / new).parent.mkdir(parents=True, exist_ok=True)
            (project / old).rename(project / new)

    return move


def nothing(project: Path) -> None:
    pass


# --- the same command, with paths written in another way ------------------------------------------------------------

SPELLINGS: list[tuple[Callable[[Path], None], list[str]]] = [
    (nothing, ["run.dir=runs/tok/", "data.source=zh/"]),
    (nothing, ["run.dir=./runs/tok", "data.source=./zh"]),
    (nothing, ["run.dir={root}/runs/tok", "data.source={root}/zh"]),
    (nothing, ["run.dir=runs/../runs//tok", "data.source=runs/../zh/."]),
    (nothing, ["run.dir=~/project/runs/tok", "data.source=~/project/zh"]),
    (link("pictures", "zh"), ["data.source=pictures"]),
    (link("elsewhere", "runs"), ["run.dir=elsewhere/tok"]),
    (link("../other name", "project"), ["run.dir=../other name/runs/tok", "data.source=../other name/zh"]),
    (move("runs/tok > runs/renamed"), ["run.dir=runs/renamed"]),
    (move("runs/tok > ../archive/2024 #1/tok"), ["run.dir=../archive/2024 #1/tok"]),
    (move("zh > ../data/zh"), ["data.source=../data/zh"]),
    (move("zh > ../data/Photos #2"), ["data.source=../data/Photos #2"]),
    (move("runs/tok > moved", "zh > images"), ["run.dir=moved", "data.source=images"]),
]


@pytest.mark.parametrize(("before", "overrides"), SPELLINGS)
def test_a_tokenizer_resumes_however_its_paths_are_written(project, ended, works, before, overrides):
    before(project)
    overrides = [override.format(root=project) for override in overrides]
    said = works("train-tokenizer", "tokenizer.yaml", *overrides)
    assert "Resuming from step 2" in said
    given = dict(override.split("=") for override in overrides)
    run = Path(given.get("run.dir", "runs/tok")).expanduser()
    assert weights(run) == ended["tok"]
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert Path(stored["run"]["dir"]).samefile(run), "config.yaml says where things are now"
    assert Path(stored["data"]["source"]).samefile(Path(given.get("data.source", "zh")).expanduser())
    assert "nothing left to do" in works("train-tokenizer", "tokenizer.yaml", *overrides)
    assert "nothing left to do" in works("train-tokenizer", run / "config.yaml")


@pytest.mark.parametrize(
    ("before", "overrides"),
    [
        (nothing, ["run.dir=runs/gpt/", "codes=codes/tok/"]),
        (nothing, ["run.dir={root}/runs/gpt", "codes={root}/codes/tok"]),
        (nothing, ["run.dir=./runs/./gpt", "codes=./codes/../codes/tok"]),
        (link("linked", "codes/tok"), ["codes=linked"]),
        (move("codes/tok > ../codes of tok", "runs/gpt > gpt 2"), ["codes=../codes of tok", "run.dir=gpt 2"]),
    ],
)
def test_a_prior_resumes_however_its_paths_are_written(project, ended, works, before, overrides):
    before(project)
    overrides = [override.format(root=project) for override in overrides]
    assert "Resuming from step 2" in works("train-prior", "prior.yaml", *overrides)
    run = Path(dict(override.split("=") for override in overrides).get("run.dir", "runs/gpt"))
    assert weights(run) == ended["gpt"]


def test_a_moved_project_resumes_and_ends_the_same(project, ended, works, tmp_path, monkeypatch):
    moved = project.rename(tmp_path / "Another Place")
    monkeypatch.chdir(moved)
    works("train-tokenizer", "tokenizer.yaml")
    works("train-prior", "prior.yaml")
    assert {run: weights(moved / "runs" / run) for run in ("tok", "gpt")} == ended


def test_codes_of_the_same_images_at_another_path_are_the_same(project, ended, works):
    shutil.rmtree("codes")
    works("encode", "runs/tok/", "--data", project / "zh", "--out", "codes/tok")
    works("train-prior", "prior.yaml")
    assert weights(project / "runs/gpt") == ended["gpt"]


# --- other content --------------------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("source", ["other", "zh", "shapes"])
def test_other_images_are_refused(project, refused, tmp_path, monkeypatch, source, begun):
    if not begun:
        shutil.rmtree("runs/tok/checkpoints")
    before = snapshot(project / "runs/tok")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # where `zh` is another folder
    write_sheets(Path("other"), 1)
    write_sheets(Path("zh"), 1)
    words = ["train-tokenizer", project / "tokenizer.yaml", f"run.dir={project}/runs/tok", f"data.source={source}"]
    error = refused(*words)
    assert f"data.source {source}: holds different images than when the run in {project}/runs/tok began (" in error
    assert "Nothing was changed" in error
    assert snapshot(project / "runs/tok") == before


def test_other_images_with_the_same_names_and_file_sizes_are_refused(project, works, refused):
    write_sheets(project / "red", 1, plain=True)
    write_sheets(project / "blue", 2, plain=True)
    words = ["train-tokenizer", "tokenizer.yaml", "run.dir=run", "data.in_memory_gb=0"]
    works(*words, "data.source=red")
    assert "(sample.train: " in refused(*words, "data.source=blue")
    (project / "red").rename(project / "moved")
    assert "nothing left to do" in works(*words, "data.source=moved")


def test_a_name_and_a_folder_of_that_name_are_not_confused(project, works, refused, tmp_path, monkeypatch):
    monkeypatch.setenv("TWOSTAGE_DATA", str(tmp_path / "sets"))
    write_sheets(tmp_path / "sets/flowers", 1)
    words = ["train-tokenizer", "tokenizer.yaml", "run.dir=named"]
    works(*words, "data.source=flowers")
    shutil.rmtree("named/checkpoints")
    write_sheets(project / "flowers", 2)
    assert "data.source flowers: holds different images" in refused(*words, "data.source=flowers")
    works(*words, f"data.source={tmp_path}/sets/flowers")
    write_sheets(project / "shapes", 3)
    works("train-tokenizer", "tokenizer.yaml", "run.dir=drawn", "data.source=shapes", "data.num_images=16")
    words = ["train-tokenizer", "tokenizer.yaml", "run.dir=drawn", "data.num_images=16"]
    assert "holds different images" in refused(*words, "data.source=./shapes")
    assert "nothing left to do" in works(*words, "data.source=shapes")


def test_other_codes_of_the_same_tokenizer_are_refused(project, works, refused):
    write_sheets(project / "other", 1)
    works("encode", "runs/tok", "--data", "other", "--out", "codes/other")
    assert "codes codes/other: holds different codes than when the run in runs/gpt began (" in refused(
        "train-prior", "prior.yaml", "codes=codes/other"
    )


@pytest.mark.parametrize("begun", [True, False])
def test_feature_networks_and_initial_models_count_by_their_weights(project, works, refused, begun):
    for seed in (0, 1):
        works(
            "train-features",
            "./zh",
            "--epochs",
            1,
            "--width",
            2,
            "--batch-size",
            8,
            "--seed",
            seed,
            "--out",
            f"features_{seed}",
        )
    words = ["train-tokenizer", "tokenizer.yaml", "run.dir=run", "init_from=runs/tok/"]
    features = "loss.perceptual={type: features, path: %s}"
    works(*words, features % "features_0")
    if not begun:
        shutil.rmtree("run/checkpoints")
    refusal = refused(*words, features % "features_1")
    assert "loss.perceptual.path features_1: holds different weights than when the run in run began (" in refusal
    Path("features_0").rename("network")
    shutil.copytree("runs/tok", "start")
    words[-1] = "init_from=start"
    works(*words, features % "network")
    model = Autoencoder.from_pretrained("start")
    for parameter in model.parameters():
        parameter.data.mul_(2)
    model.save_pretrained("changed/model")
    assert "init_from changed: holds different weights" in refused(
        *words[:-1], "init_from=changed", features % "network"
    )


def test_a_run_without_sources_json_uses_its_checkpoints_and_paths(project, works, refused):
    """Without sources.json, only the configuration of a run is known."""
    Path("runs/tok/sources.json").unlink()
    shutil.rmtree("runs/tok/checkpoints")
    write_sheets(project / "other", 1)
    assert "data.source: was 'zh', now 'other'" in refused("train-tokenizer", "tokenizer.yaml", "data.source=other")
    works("train-tokenizer", "tokenizer.yaml")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("{", "sources.json: damaged: not valid JSON"),
        ("5", "sources.json: damaged: expected a JSON object, got int"),
        ({"format_version": 99}, "sources.json: written in format 99"),
        ({"sources": 5}, "sources.json has 1 mistake:\n  sources: "),
        (
            {"sources": {"data.source": 5}},
            "sources.json has 1 mistake:\n  sources.data.source: expected a group of keys",
        ),
        ({"sources": {"data.source": {"place": 3, "facts": {}}}}, "place: expected text, got 3"),
        ({"sources": {"data.source": {"place": None, "facts": {"train": 3}}}}, "holds different images than when"),
        ({"sources": {"data.source": {"place": "\0", "facts": {}}}}, "holds different images than when"),
    ],
)
def test_a_damaged_sources_json_is_one_message(project, refused, change, said):
    file = Path("runs/tok/sources.json")
    file.write_text(change if isinstance(change, str) else json.dumps(json.loads(file.read_text()) | change))
    for words in (["train-tokenizer", "tokenizer.yaml"], ["reconstruct", "runs/tok", "--out", "r.png"]):
        error = refused(*words)
        assert said in error or "--data SOURCE" in error


# --- trained models, used from another folder -----------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path, monkeypatch, project) -> Path:
    """Another folder, now the current one, with other content at `zh`, `runs/tok` and `codes/tok`."""
    folder = tmp_path / "elsewhere"
    (folder / "runs").mkdir(parents=True)
    write_sheets(folder / "zh", 7)
    shutil.copytree(project / "runs/tok", folder / "runs/tok")
    model = Autoencoder.from_pretrained(folder / "runs/tok")
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    model.save_pretrained(folder / "runs/tok/model")
    monkeypatch.chdir(folder)
    return folder


def test_every_command_finds_what_a_model_was_trained_with(elsewhere, project, works, refused):
    """The project was moved after training."""
    project = project.rename(project.with_name("moved"))
    gpt, tok = project / "runs/gpt", project / "runs/tok"
    works("generate", gpt, "--num-images", 2, "--out", "there")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        works("generate", "runs/gpt/", "--num-images", 2, "--out", "here")
    for name in ("000000.png", "000001.png"):
        assert (Path("there/images") / name).read_bytes() == (project / "here/images" / name).read_bytes()
    assert "2 were already there" in works("generate", f"{gpt}/../gpt/model", "--num-images", 2, "--out", "there")
    ratios = {works("reconstruct", path, "--out", "r.png").split(": ")[1] for path in (tok, gpt, f"{tok}/")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        ratios.add(works("reconstruct", "runs/tok", "--out", "r.png").split(": ")[1])
    assert len(ratios) == 1, "of the same images"
    works("evaluate", gpt)
    works("evaluate", tok)
    documents = [json.loads((run / "evaluation/evaluation.json").read_text()) for run in (gpt, tok)]
    assert documents[0]["figures"]["chain_rule_nats_per_image"] is not None
    assert documents[0]["protocol"]["data"]["sha256"] == documents[1]["protocol"]["data"]["sha256"]
    assert documents[0]["protocol"]["tokenizer"]["path"] == str(project / "runs/tok")
    works("compare", tok, gpt, "--num-images", 2, "--out", "compared")
    works("export", gpt, "--out", "exported")
    works("interpolate", tok, "--out", "between.png")
    image = next((project / "zh/a").iterdir())
    Image.linear_gradient("L").resize((8, 8)).save("mask.png")
    works("inpaint", gpt, image, "mask.png", "--num-images", 1, "--out", "inpainted")
    works("encode", tok, "--out", "codes/new")
    for name in ("train.codes.npy", "val.codes.npy"):
        assert (Path("codes/new") / name).read_bytes() == (project / "codes/tok" / name).read_bytes()
    assert "already contains the codes" in works("encode", tok, "--out", project / "codes/tok")
    refusal = refused("encode", tok, "--out", project / "codes/tok", "--data", "zh")
    assert "contains the codes of other images: 'zh' instead of 'zh'" in refusal


def test_a_wrong_tokenizer_of_the_right_name_is_never_used(elsewhere, project, refused):
    shutil.rmtree(project / "runs/tok")
    error = refused("generate", project / "runs/gpt", "--out", "out")
    assert "this prior was trained on the codes of the tokenizer" in error
    shutil.rmtree(elsewhere / "runs/tok")
    error = refused("generate", project / "runs/gpt", "--out", "out")
    assert_names(error, "runs/tok", f"{project}/runs/gpt", "--tokenizer runs/TOKENIZER")


@pytest.mark.parametrize("others", [1, 2])
def test_missing_images_are_not_replaced_by_others_of_the_same_name(elsewhere, project, refused, others):
    shutil.rmtree(project / "zh")
    if others == 2:
        write_sheets(project / "runs/zh", 8)
    error = refused("reconstruct", project / "runs/tok", "--out", "r.png")
    assert_names(error, "data.source zh", project / "runs/tok", "--data SOURCE")
    assert not Path("r.png").exists()


def test_a_run_of_an_earlier_version_with_two_candidates_needs_an_option(elsewhere, project, refused, works):
    (project / "runs/tok/sources.json").unlink()
    error = refused("reconstruct", project / "runs/tok", "--out", "r.png")
    assert_names(error, "data.source zh", f"{project}/runs/tok", f"zh or {project}/zh", "--data SOURCE")
    shutil.rmtree("zh")
    works("reconstruct", project / "runs/tok", "--out", "r.png")


def test_images_added_after_training_are_encoded_too(project, works):
    works("train-tokenizer", "tokenizer.yaml")  # the project was moved
    Image.new("RGB", (8, 8)).save("zh/a/new.png")
    works("encode", "runs/tok", "--out", "codes/new")
    assert json.loads(Path("codes/new/manifest.json").read_text())["splits"]["train"]["rows"] == 23


def test_codes_are_named_after_their_run_however_it_is_written(project, works, monkeypatch):
    shutil.rmtree("codes")
    monkeypatch.chdir("runs/tok")
    works("encode", ".")
    monkeypatch.chdir("samples")
    works("encode", "..")
    for codes in (project / "runs/tok/codes/tok", project / "runs/tok/samples/codes/tok"):
        assert (codes / "manifest.json").is_file()
