"""A network that a tokenizer was trained against is no judge of it, wherever a copy lies; another one is."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from messages import refuses
from safetensors.torch import load_file, save_file

from pipelines.evaluation.judges import OwnFeatures, not_evidence
from pipelines.saved.model_card import CardFields
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.autoencoder_config import AutoencoderConfig, PerceptualNetwork
from stage1_tokenizer.features.feature_network import FeatureNetwork, FeatureNetworkConfig
from twostage.core.config.sections import parse_config
from twostage.core.data.shapes import CLASS_NAMES

NAMES = ["recognised", "rfid"]


def make_network(folder: Path, seed: int, widths: tuple[int, ...] = (8, 12)) -> Path:
    torch.manual_seed(seed)
    config = FeatureNetworkConfig(image_size=(16, 16), channels=3, class_names=list(CLASS_NAMES), widths=list(widths))
    FeatureNetwork(config).save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("independence")


@pytest.fixture(scope="module")
def critic(root) -> Path:
    return make_network(root / "runs" / "critic", 0)


@pytest.fixture(scope="module")
def judge(root) -> Path:
    """Of the same data and architecture, another seed."""
    return make_network(root / "runs" / "judge", 1)


@pytest.fixture(scope="module")
def trained(root, critic, configs, twostage) -> Path:
    """A tokenizer that was really trained against the critic, and then moved away from it."""
    run = root / "runs" / "trained"
    loss = f"loss={{perceptual: {{type: features, path: {critic}, weight: 0.1}}}}"
    steps = ["train.max_steps=2", "train.validate_every=2", "train.checkpoint_every=1"]
    ended = twostage("train-tokenizer", configs / "tokenizer.yaml", f"run.dir={run}", loss, *steps)
    assert ended.code == 0, ended.err
    return run


def config_of(*networks: PerceptualNetwork, perceptual: dict | None = None) -> AutoencoderConfig:
    document = {"image_size": [16, 16], "channels": 3, "model": {}, "loss": {"perceptual": perceptual}}
    document |= {"trained_against": [network.model_dump() for network in networks]} if networks else {}
    return parse_config(AutoencoderConfig, document, "test")


def found(config: AutoencoderConfig, features: Path, run: Path | str = "runs/tokenizer") -> dict[str, str]:
    return not_evidence(config, run, OwnFeatures(features), "my images", NAMES)


# --- what a model remembers -----------------------------------------------------------------------------------------


def test_a_training_remembers_its_network_and_the_hash_stays_what_it_was(trained, critic, runs):
    document = json.loads((trained / "model" / "config.json").read_text())
    assert "trained_against" not in json.loads((runs.tokenizer / "model" / "config.json").read_text())
    network = FeatureNetwork.from_pretrained(critic)
    assert document["trained_against"] == [{"type": "features", "path": str(critic), "hash": network.features_hash()}]
    model = Autoencoder.from_pretrained(trained)
    before = model.content_hash()
    model.config = model.config.model_copy(update={"trained_against": []})
    assert model.content_hash() == before == document["hash"]


def test_a_folder_of_an_earlier_version_loads_and_names_the_network_of_its_loss(trained, critic, tmp_path):
    run = shutil.copytree(trained, tmp_path / "earlier")
    file = run / "model" / "config.json"
    document = json.loads(file.read_text())
    del document["trained_against"]
    document["loss"] |= {"perceptual": {"type": "features", "path": str(critic), "weight": 0.1}, "adversarial": None}
    file.write_text(json.dumps(document))
    model = Autoencoder.from_pretrained(run)
    assert model.content_hash() == document["hash"]
    assert model.config.trained_against == [PerceptualNetwork(type="features", path=str(critic))]
    assert found(model.config, critic, run).keys() == set(NAMES)


def test_a_decoder_trained_further_remembers_both_networks(trained, critic, judge, configs, twostage, tmp_path):
    """And a run that went on from a checkpoint, too."""
    words = [f"init_from={trained}", "train.parts=decoder", "train.checkpoint_every=1", "train.validate_every=1"]
    run = tmp_path / "further"
    words += [f"loss={{perceptual: {{type: features, path: {judge}, weight: 0.1}}}}", f"run.dir={run}"]
    for _ in range(2):
        ended = twostage("train-tokenizer", configs / "tokenizer.yaml", *words, "train.max_steps=2")
        assert ended.code == 0, ended.err
        config = Autoencoder.from_pretrained(run).config
        shutil.rmtree(run / "model")
        shutil.rmtree(run / "checkpoints" / "step_00000002")
    assert [network.path for network in config.trained_against] == [str(critic), str(judge)]
    assert found(config, critic)
    assert found(config, judge)


def test_a_weight_of_zero_trains_against_nothing(critic):
    assert config_of(perceptual={"type": "lpips", "weight": 0}).trained_against == []
    assert config_of(perceptual={"type": "features", "path": str(critic), "weight": 0.0}).trained_against == []
    assert config_of().trained_against == []
    assert [network.type for network in config_of(perceptual={"type": "lpips"}).trained_against] == ["lpips"]


# --- the same or another --------------------------------------------------------------------------------------------


def with_other_head(critic: Path, folder: Path) -> Path:
    """The same features, other class names and another last layer."""
    network = FeatureNetwork.from_pretrained(critic)
    torch.nn.init.zeros_(network.head.weight)
    network.config = network.config.model_copy(update={"class_names": [*CLASS_NAMES[:-1], "other"]})
    network.save_pretrained(folder)
    return folder


def test_the_same_weights_are_known_wherever_they_lie(critic, judge, trained, tmp_path, monkeypatch):
    config = Autoencoder.from_pretrained(trained).config
    copied = shutil.copytree(critic, tmp_path / "another name")
    (tmp_path / "link").symlink_to(critic)
    monkeypatch.chdir(critic.parent)
    same = [critic, critic / "model", copied, copied / "model", tmp_path / "link", Path("critic"), Path("./critic/")]
    same.append(with_other_head(critic, tmp_path / "head"))
    for features in same:
        reasons = found(config, features)
        assert reasons.keys() == set(NAMES), features
        assert "trained against" in reasons["rfid"]
        assert "twostage train-features 'my images' --seed 1 --width 48 --out runs/judge" in reasons["rfid"]
    slightly = tmp_path / "slightly"
    shutil.copytree(critic / "model", slightly)
    state = load_file(slightly / "model.safetensors")
    name = next(name for name in state if name.startswith("layers."))
    save_file({**state, name: state[name] + 1e-3}, slightly / "model.safetensors")
    wider = make_network(tmp_path / "wider", 0, (48, 12))
    for features in (judge, slightly, wider):
        assert found(config, features) == {}, features
    assert not_evidence(config, trained, None, "x", NAMES) == {}


def test_another_network_put_in_the_place_of_the_first_is_another(critic, trained, tmp_path):
    """The hash counts, not the path."""
    config = Autoencoder.from_pretrained(trained).config
    (network,) = config.trained_against
    moved = config.model_copy(update={"trained_against": [network.model_copy(update={"path": str(tmp_path / "a")})]})
    make_network(tmp_path / "a", 7)
    assert found(moved, tmp_path / "a") == {}
    assert found(moved, critic)


def test_without_a_hash_the_folder_is_looked_for_and_then_its_name_counts(critic, judge, tmp_path, monkeypatch):
    run = tmp_path / "project" / "runs" / "tokenizer"
    run.mkdir(parents=True)
    shutil.copytree(critic, tmp_path / "project" / "runs" / "features")
    shutil.copytree(critic, tmp_path / "copy")
    shutil.copytree(judge, tmp_path / "elsewhere" / "features")

    def by(path: str) -> AutoencoderConfig:
        return config_of(perceptual={"type": "features", "path": path})

    assert found(by("runs/features"), tmp_path / "copy", run), "found above the run"
    assert found(by("runs/features"), tmp_path / "elsewhere" / "features", run) == {}, "other weights, the same name"
    shutil.rmtree(tmp_path / "project" / "runs" / "features")
    assert found(by("runs/features"), tmp_path / "copy", run) == {}, "it is gone, and this has another name"
    assert found(by("runs/features"), tmp_path / "elsewhere" / "features" / "model", run), "it is gone: by the name"
    assert found(by("/gone/features/model"), tmp_path / "elsewhere" / "features", run)
    assert found(config_of(perceptual={"type": "lpips"}), critic, run) == {}


# --- what is said ---------------------------------------------------------------------------------------------------


def test_evaluate_warns_and_refuses_the_verdict(trained, critic, judge, twostage, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    ended = twostage("evaluate", run, "--features", shutil.copytree(critic, tmp_path / "copy"))
    assert ended.code == 0, ended.err
    document = json.loads((run / "evaluation" / "evaluation.json").read_text())
    reason = document["protocol"]["not_evidence"]["rfid"]
    assert document["protocol"]["not_evidence"].keys() == {"recognised", "rfid", "rfid_perturbed"}
    assert document["figures"]["rfid"] is not None
    assert document["verdict"]["ready"] is not True
    assert "Ready" not in ended.out
    report = (run / "evaluation" / "evaluation.html").read_text()
    for words in (ended.out, report):
        assert "Warning: recognised, Frechet distance, from perturbed codes: not evidence of quality, because " in words
        assert "--seed 1 --width 48" in words
        assert "not evidence of quality, see above" in words or "(not evidence of quality)" in words
    assert (
        f"Warning: recognised, Frechet distance, from perturbed codes: not evidence of quality, because {reason}.\n"
        in ended.out
    )

    ended = twostage("evaluate", run, "--features", judge)
    document = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert document["protocol"]["not_evidence"] == {}
    assert document["protocol"]["trained_against"][0]["path"] == str(critic)
    assert "evidence" not in ended.out
    figures = document["figures"]
    assert 0 <= figures["recognised"] <= 1
    assert 0 <= figures["recognised_originals"] <= 1


def test_the_prior_of_such_a_tokenizer_is_judged_the_same_way(runs, critic, judge, twostage, tmp_path):
    tokenizer = shutil.copytree(runs.tokenizer, tmp_path / "tokenizer")
    file, network = tokenizer / "model" / "config.json", FeatureNetwork.from_pretrained(critic)
    record = {"type": "features", "path": "runs/gone", "hash": network.features_hash()}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trained_against": [record]}))
    prior = shutil.copytree(runs.prior, tmp_path / "prior")
    judged = {"class_accuracy", "frechet_distance", "kernel_distance", "inception_score", "precision", "recall"}
    for features, expected in ((critic, judged), (judge, set())):
        words = ["--features", features, "--num-samples", 40, "--temperature", 5, "--tokenizer", tokenizer]
        ended = twostage("evaluate", prior, *words)
        assert ended.code == 0, ended.err
        document = json.loads((prior / "evaluation" / "evaluation.json").read_text())
        assert judged <= {name for name, value in document["figures"].items() if value is not None}
        assert document["protocol"]["not_evidence"].keys() == expected
        assert ("Warning: class accuracy, Frechet distance, kernel distance" in ended.out) == bool(expected)
        assert ("not evidence of quality" in (prior / "evaluation" / "evaluation.html").read_text()) == bool(expected)


def test_compare_marks_the_figures_of_that_model_alone(trained, runs, critic, twostage, tmp_path):
    out = tmp_path / "compare"
    ended = twostage("compare", trained, runs.tokenizer, "--features", critic, "--num-images", 4, "--out", out)
    assert ended.code == 0, ended.err
    marked, plain = json.loads((out / "compare.json").read_text())["models"]
    assert marked["not_evidence"].keys() == {"recognised", "rfid"}
    assert plain["not_evidence"] == {}
    assert ended.out.count(" *") == 2
    assert "* trained: not evidence of quality, because " in ended.out
    assert "* trained: not evidence of quality, because " in (out / "compare.html").read_text()


def test_a_model_card_warns_beside_the_figures(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    for doubts in ({}, {"rfid": "runs/critic is the network that it was trained against"}, None):
        protocol = {"data": {"source": "shapes", "split": "test", "images": 64, "chosen": "all", "sha256": "0" * 64}}
        protocol |= {"not_evidence": doubts} if doubts is not None else {}  # as an earlier version wrote it
        document = {"figures": {"psnr": 20.0, "rfid": 2.1}, "protocol": protocol}
        records = {"evaluation/tokenizer.json": json.dumps(document).encode()}
        pipeline.write_card(tmp_path, records, CardFields(None, None, "me/mine"))
        card = (tmp_path / "README.md").read_text()
        warning = "not evidence of quality, because runs/critic is the network that it was trained against."
        assert (f"Warning: Frechet distance: {warning}" in card) == bool(doubts)
        assert "| Frechet distance | 2.1 |" in card


def test_lpips_that_was_optimised_is_no_evidence(runs, twostage, monkeypatch, tmp_path):
    run = shutil.copytree(runs.tokenizer, tmp_path / "run")

    class Distance(torch.nn.Module):
        def forward(self, decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
            return (decoded - images).abs().mean()

    monkeypatch.setattr("pipelines.evaluation.reconstructions.build_perceptual", lambda *_: Distance())
    (tmp_path / "vgg16-397923af.pth").write_bytes(b"weights")
    for networks, expected in (([], set()), ([{"type": "lpips"}], {"lpips"})):
        file = run / "model" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"trained_against": networks}))
        ended = twostage("evaluate", run, "--weights-dir", tmp_path)
        assert ended.code == 0, ended.err
        document = json.loads((run / "evaluation" / "evaluation.json").read_text())
        assert document["protocol"]["not_evidence"].keys() == expected
        assert document["figures"]["lpips"] is not None
        assert (
            "Warning: LPIPS: not evidence of quality, because the tokenizer was trained to lower LPIPS" in ended.out
        ) == bool(expected)


@pytest.mark.parametrize("value", [["x"], [{"type": "vgg"}], {"type": "lpips"}, 3])
def test_a_damaged_record_is_a_sentence(runs, tmp_path, value):
    run = shutil.copytree(runs.tokenizer, tmp_path / "run")
    file = run / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trained_against": value}))
    with refuses("trained_against"):
        Autoencoder.from_pretrained(run)
