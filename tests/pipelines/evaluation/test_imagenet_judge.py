"""Models judged in ImageNet features: the figures, the classes by a linear probe, and the words around them."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from messages import refuses
from PIL import Image
from torch.nn import functional as F

from pipelines.evaluation.distances import frechet_distance
from pipelines.evaluation.evaluate_tokenizer import evaluate_tokenizer
from pipelines.evaluation.judged_images import judge_training_images
from pipelines.evaluation.judges import ImageNetFeatures, not_evidence, open_judge
from pipelines.evaluation.linear_probe import PENALTY, fit_linear_probe
from pipelines.evaluation.measurement import HeldOutImages
from pipelines.evaluation.shared_work import SharedWork
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.autoencoder_config import PerceptualNetwork
from stage1_tokenizer.features.imagenet_network import JUDGE_WEIGHTS, LOSS_WEIGHTS
from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images
from twostage.core.data.shapes import CLASS_NAMES
from twostage.core.data.spread import spread
from twostage.core.images.conversion import to_float, to_uint8
from twostage.core.machine.installation import pip_install

pytest.importorskip("timm", reason="needs the extra imagenet")

MIN_SIDE = 48


@pytest.fixture(scope="module", autouse=True)
def _cheap():
    """Images are enlarged less, and commands have one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.evaluation.judges.IMAGENET_MIN_SIDE", MIN_SIDE)
        patch.setenv("LOCAL_WORLD_SIZE", "1000")
        yield


@pytest.fixture(scope="module")
def judge() -> ImageNetFeatures:
    return ImageNetFeatures()


@pytest.fixture(scope="module")
def evaluated(runs, twostage, tmp_path_factory) -> tuple[str, dict]:
    """The output and evaluation.json of the tokenizer."""
    run = shutil.copytree(runs.tokenizer, tmp_path_factory.mktemp("judged") / "run")
    ended = twostage("evaluate", run, "--features", "imagenet", "--split", "train", "--num-images", 220)
    assert ended.code == 0, ended.err
    return ended.out, json.loads((run / "evaluation" / "evaluation.json").read_text())


# --- the probe ------------------------------------------------------------------------------------------------------


def test_the_probe_is_the_optimum_of_logistic_regression():
    """At which the gradient of its objective is zero."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    features = torch.randn(60, 5, generator=generator) * 4 + 3 + labels[:, None]
    weight, bias = fit_linear_probe(features, labels, 3)
    assert torch.equal(weight, fit_linear_probe(features, labels, 3)[0])
    mean, deviation = features.double().mean(0), features.double().std(0, unbiased=False)
    wrong = F.linear(features, weight, bias).double().softmax(1) - F.one_hot(labels, 3)
    slope = wrong.T @ ((features - mean) / deviation) / 60 + PENALTY * weight * deviation
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-4, rtol=0)
    torch.testing.assert_close(wrong.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-4, rtol=0)


def test_a_feature_without_variance_is_harmless():
    features = torch.stack([torch.arange(8.0), torch.full((8,), 2.0)], 1)
    labels = (torch.arange(8) > 3).long()
    weight, bias = fit_linear_probe(features, labels, 2)
    assert torch.equal(F.linear(features, weight, bias).argmax(1), labels)


@pytest.mark.parametrize(
    ("labels", "names", "found"),
    [
        (None, None, "none"),
        (torch.ones(4, dtype=torch.long), ["cat", "dog"], "1 (dog)"),
        (torch.zeros(4), None, "none"),
    ],
)
def test_fewer_than_two_classes_are_no_probe(labels, names, found):
    judge = ImageNetFeatures()
    judge.fit(torch.randn(4, judge.num_features), labels, names)
    assert judge.no_classes == f"a linear probe needs training images of at least 2 classes, and found {found}"
    assert judge.class_names is None
    assert not judge.has_logits


# --- what it sees ---------------------------------------------------------------------------------------------------


def test_grey_rgb_and_transparent_images_of_any_size(judge):
    pixels = torch.randint(0, 256, (3, 4, 20, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    grey = pixels[:, :1]
    assert judge(grey).shape == (3, judge.num_features)
    torch.testing.assert_close(judge(grey), judge(grey.repeat(1, 3, 1, 1)))
    opaque, hidden = pixels.clone(), pixels.clone()
    opaque[:, 3], hidden[:, 3] = 255, 0
    torch.testing.assert_close(judge(opaque), judge(pixels[:, :3]))
    torch.testing.assert_close(judge(hidden)[0], judge(hidden)[1])


def test_the_probe_learns_training_images_and_knows_others():
    config, judge = DataConfig(image_size=16, num_images=320), ImageNetFeatures()
    images = HeldOutImages.choose(config, load_images(config), None, 80)
    judge_training_images(judge, images, SharedWork(64))
    labels = images.split.read_labels(images.rows)
    assert labels is not None
    assert (judge.logits(judge(images.split.read(images.rows))).argmax(1) == labels).float().mean() > 0.6
    assert "logistic regression" in judge.protocol["classes"]
    assert "320 training images" in judge.protocol["classes"]


# --- what evaluate writes -------------------------------------------------------------------------------------------


def test_the_figures_are_in_its_features(evaluated, runs, judge):
    figures, model = evaluated[1]["figures"], Autoencoder.from_pretrained(runs.tokenizer)
    pixels = load_images(DataConfig(image_size=16, num_images=320)).splits["train"].read(spread(320, 220))
    decoded = torch.cat([to_uint8(model.reconstruct(to_float(part))) for part in pixels.split(64)])
    expected = frechet_distance(judge(pixels), judge(decoded), torch.device("cpu"))
    assert figures["rfid"] == pytest.approx(expected, rel=1e-3)
    assert figures["recognised"] is None
    assert "use a held-out --split" in evaluated[0]


def test_nobody_takes_them_for_fids(evaluated):
    output, document = evaluated
    assert "Frechet distance            " in output
    assert "Frechet distances are measured with ImageNet features (EfficientNet-lite2" in output
    assert "They are not FIDs" in output
    assert "rFID" not in output + json.dumps(document["protocol"]["rfid"]["network"])
    protocol = document["protocol"]["rfid"]
    assert protocol["hash"] == JUDGE_WEIGHTS.sha256
    assert f"shorter side of {MIN_SIDE} pixels" in protocol["resize"]


def test_a_folder_of_one_class_has_no_probe_but_distances(runs, tmp_path):
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 220)):
        (tmp_path / split / "cat").mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / "cat" / f"{i}.png")
    document = evaluate_tokenizer(runs.tokenizer, str(tmp_path), features="imagenet").document()
    assert document["figures"]["rfid"] > 0
    assert document["figures"]["recognised"] is None
    assert "at least 2 classes, and found 1 (cat)" in document["protocol"]["not_measured"]["recognised"]


def test_samples_of_a_prior_are_judged(runs, twostage, tmp_path):
    run = shutil.copytree(runs.prior, tmp_path / "run")
    words = ["--features", "imagenet", "--num-samples", 220, "--temperature", 3, "--tokenizer", runs.tokenizer]
    ended = twostage("evaluate", run, *words)
    assert ended.code == 0, ended.err
    document = json.loads((run / "evaluation" / "evaluation.json").read_text())
    figures, protocol = document["figures"], document["protocol"]
    assert figures["class_accuracy"] <= figures["class_accuracy_real"]
    assert figures["class_accuracy_real"] > 0.8
    for name in ("frechet_distance", "kernel_distance", "precision", "recall", "inception_score"):
        assert figures[name] is not None, name
    assert figures["kernel_distance"] > figures["kernel_distance_real"]
    assert protocol["frechet_distance"]["hash"] == JUDGE_WEIGHTS.sha256
    assert protocol["inception_score"]["classes"].startswith(f"the network's own {len(CLASS_NAMES)} classes")
    assert "They are not FIDs" in ended.out
    assert "KID" not in ended.out


def test_compare_takes_it_too(runs, twostage, tmp_path):
    ended = twostage("compare", runs.tokenizer, "--features", "imagenet", "--num-images", 4, "--out", tmp_path)
    assert ended.code == 0, ended.err
    comparison = json.loads((tmp_path / "compare.json").read_text())
    assert comparison["protocol"]["features"]["hash"] == JUDGE_WEIGHTS.sha256
    assert comparison["models"][0]["figures"]["recognised_originals"] > 0.8


# --- independence, and what is missing ------------------------------------------------------------------------------


def test_a_tokenizer_is_judged_by_another_network_than_its_loss(configs, twostage, tmp_path, judge):
    run = tmp_path / "run"
    words = [f"run.dir={run}", "loss={perceptual: {type: imagenet, weight: 0.1}}", "train.max_steps=2"]
    words += ["train.validate_every=2", "train.checkpoint_every=2"]
    ended = twostage("train-tokenizer", configs / "tokenizer.yaml", *words)
    assert ended.code == 0, ended.err
    config = Autoencoder.from_pretrained(run).config
    assert config.trained_against == [PerceptualNetwork(type="imagenet", hash=LOSS_WEIGHTS.sha256)]
    assert judge.protocol["hash"] != LOSS_WEIGHTS.sha256
    assert not_evidence(config, run, judge, "x", ["rfid"]) == {}


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with refuses("--features imagenet", "timm", pip_install("imagenet")):
        open_judge(None, "imagenet", 3)
