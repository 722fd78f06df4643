"""The figures of `evaluate` for priors against plain computations, what it refuses, its protocol."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from messages import assert_names, refuses
from other_priors import PARALLEL
from PIL import Image
from torch.nn import functional as F

from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.evaluation.evaluate_prior import evaluate_prior
from pipelines.evaluation.evaluation_report import Evaluation
from pipelines.evaluation.judged_images import RealImages
from pipelines.evaluation.judges import OwnFeatures
from pipelines.evaluation.likelihood import NUM_SCALE_IMAGES, fit_likelihood, min_scale, standard_error
from pipelines.evaluation.measurement import HeldOutImages, figures_of
from pipelines.evaluation.samples import SAMPLE_FIGURES, SampleRequest, Samples, Stopwatch, measure_samples
from pipelines.evaluation.shared_work import SharedWork
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.features.feature_network import FeatureNetwork, FeatureNetworkConfig
from stage1_tokenizer.losses.objective import ObjectiveConfig
from stage2_prior.codes import CodeCache
from stage2_prior.networks.masked_transformer import MaskedTransformerConfig
from stage2_prior.prior import Prior
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.conditions.context import Context
from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images
from twostage.core.images.conversion import to_float

CELLS, PIXELS = 16, 3 * 16 * 16
NUM_SAMPLES = 37  # not a whole number of batches
SAMPLING = SamplingConfig(temperature=1.3, guidance_scale=1.5)


@pytest.fixture(scope="module", autouse=True)
def _one_process():
    """And one thread, as the command has in these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "1000")
        yield


@pytest.fixture(scope="module")
def data():
    return load_images(DataConfig(image_size=16, num_images=320))


@pytest.fixture(scope="module")
def features(tmp_path_factory, data) -> Path:
    """A feature network that has learned something about shapes."""
    torch.manual_seed(0)
    network = FeatureNetwork(
        FeatureNetworkConfig(image_size=(16, 16), channels=3, class_names=data.class_names, widths=[16, 24])
    )
    optimizer, train = torch.optim.Adam(network.parameters(), lr=1e-2), data.splits["train"]
    for step in range(60):
        rows = torch.arange(step * 32, step * 32 + 32) % len(train)
        loss = F.cross_entropy(network(to_float(train.read(rows))), train.read_labels(rows))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("features")
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def evaluation(runs, features) -> Evaluation:
    request = SampleRequest(NUM_SAMPLES, 3, SAMPLING)
    return evaluate_prior(runs.prior, features=features, samples=request, batch_size=16)


@pytest.fixture(scope="module")
def figures(evaluation) -> dict:
    return evaluation.figures


@pytest.fixture(scope="module")
def masked(runs, tmp_path_factory) -> Path:
    """A masked transformer over the same codes, untrained but not uniform."""
    config = Prior.from_pretrained(runs.prior).config
    model = MaskedTransformerConfig(hidden_size=16, depth=1, num_heads=2, dropout=0.0)
    torch.manual_seed(0)
    prior = Prior(config.model_copy(update={"model": model}))
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("masked")
    prior.save_pretrained(folder)
    return folder


@pytest.fixture
def cache(runs, tmp_path) -> Path:
    """A copy of the code cache."""
    return shutil.copytree(runs.codes, tmp_path / "cache")


def rewrite(cache: Path, **changes: object) -> None:
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps(manifest | changes))


# --- codes ----------------------------------------------------------------------------------------------------------


def test_the_cost_of_held_out_codes(runs, figures):
    cache = CodeCache(runs.codes)
    rows = torch.arange(64)
    indices, labels = cache.validation.read(rows), cache.validation.read_labels(rows)
    nats = -Prior.from_pretrained(runs.prior).log_likelihood(indices, labels).double().mean().item()
    counts = np.bincount(cache.splits["train"].codes.ravel(), minlength=16) + 1
    unigram = -np.log(counts / counts.sum())[indices.numpy()].mean()
    assert figures["images"] == 64
    for prefix, per_code in {"": nats / CELLS, "unigram_": unigram, "uniform_": math.log(16)}.items():
        assert figures[f"{prefix}nats_per_code"] == pytest.approx(per_code, rel=1e-5)
        assert figures[f"{prefix}nats_per_image"] == pytest.approx(per_code * CELLS, rel=1e-5)
        assert figures[f"{prefix}bits_per_code"] == pytest.approx(per_code / math.log(2), rel=1e-5)
        assert figures[f"{prefix}bits_per_dim"] == pytest.approx(per_code * CELLS / math.log(2) / PIXELS, rel=1e-5)
    assert figures["nats_per_code"] < figures["unigram_nats_per_code"] < figures["uniform_nats_per_code"]
    assert not [name for name in figures if "bound" in name or "error" in name]


@pytest.mark.parametrize("batch_size", [7, 100])
def test_the_batch_size_changes_no_exact_figure(runs, figures, batch_size):
    again = evaluate_prior(runs.prior, batch_size=batch_size).figures
    for name in ("nats_per_code", "chain_rule_nats_per_image"):
        assert again[name] == pytest.approx(figures[name], rel=1e-5)


def test_some_of_the_codes_are_spread_over_the_split(runs):
    found = evaluate_prior(runs.prior, num_images=16)
    split, rows = CodeCache(runs.codes).validation, torch.arange(0, 64, 4)
    indices, labels = split.read(rows), split.read_labels(rows)
    nats = -Prior.from_pretrained(runs.prior).log_likelihood(indices, labels).mean().item()
    assert found.figures["nats_per_image"] == pytest.approx(nats, rel=1e-5)
    assert found.protocol["codes"]["chosen"] == "spread evenly over 64"
    assert found.protocol["data"]["images"] == 16


def test_a_parallel_transformer_names_the_groups_of_its_likelihood(runs, tmp_path):
    config = Prior.from_pretrained(runs.prior).config
    prior = Prior(config.model_copy(update={"model": PARALLEL.model_copy(update={"num_steps": 3})}))
    torch.nn.init.normal_(prior.network.head_weight)
    prior.save_pretrained(tmp_path)
    found = evaluate_prior(tmp_path, runs.codes, num_images=16)
    split, rows = CodeCache(runs.codes).validation, torch.arange(0, 64, 4)
    nats = -prior.eval().log_likelihood(split.read(rows), split.read_labels(rows)).mean().item()
    assert found.figures["nats_per_image"] == pytest.approx(nats, rel=1e-5)
    assert found.protocol["likelihood"]["kind"] == PARALLEL.model_copy(update={"num_steps": 3}).likelihood(config.grid)
    assert_names(found.table(), "exact chain rule over 3 groups")


def test_a_masked_transformer_has_a_bound_and_says_so(runs, masked):
    found = evaluate_prior(masked, runs.codes, batch_size=16)
    figures, prior = found.figures, Prior.from_pretrained(masked)
    assert "nats_per_code" not in figures
    assert found.protocol["likelihood"]["kind"].startswith("upper bound")
    split, rows = CodeCache(runs.codes).validation, torch.arange(64)
    indices, context = split.read(rows), Context(64, split.read_labels(rows))
    nats, generator = [], torch.Generator().manual_seed(1)
    for _ in range(150):  # the sum over one random order, written out
        orders = torch.rand(64, CELLS, generator=generator).argsort(1).argsort(1)
        count = int(torch.randint(1, CELLS + 1, (), generator=generator))
        hidden = orders < count
        logits = prior.network(indices.flatten(1).masked_fill(hidden, 16), context).detach()
        cost = F.cross_entropy(logits.flatten(0, 1), indices.flatten(), reduction="none").view(64, CELLS)
        nats.append((cost * hidden).sum(1).mean() * CELLS / count)
    expected, error = torch.stack(nats).mean() / CELLS, torch.stack(nats).std() / len(nats) ** 0.5 / CELLS
    stated = figures["nats_per_code_standard_error"]
    assert 0 < stated < 0.05 * figures["nats_per_code_bound"]
    assert abs(figures["nats_per_code_bound"] - expected) < 4 * math.hypot(stated, error)
    assert figures["prior_nats_per_image"] == pytest.approx(figures["nats_per_image_bound"], rel=1e-5), "same draws"


def test_the_standard_error_is_that_of_independent_batches():
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(500, 4, 8, generator=generator, dtype=torch.double)  # 500 experiments of 4 batches
    nats = 10 + shared.repeat_interleave(3, 1)  # of 3 images each, which draw the same
    means = nats.mean((1, 2))
    stated = torch.tensor([standard_error(one, 3) for one in nats])
    assert means.std().item() == pytest.approx(stated.mean().item(), rel=0.1)


# --- images ---------------------------------------------------------------------------------------------------------


def test_the_whole_model_costs_codes_and_what_they_leave_open(runs, data, evaluation):
    figures, model = evaluation.figures, Autoencoder.from_pretrained(runs.tokenizer)

    def errors(split: str) -> np.ndarray:
        images = to_float(data.splits[split].read(torch.arange(len(data.splits[split]))))
        with torch.no_grad():
            return (model.run_decoder(model.encode(images).z) - images).double().numpy()

    variance = np.square(errors("train")).mean()
    expected = 0.5 * (np.square(errors("test")) / variance + np.log(2 * np.pi * variance)).sum((1, 2, 3)).mean()
    assert figures["reconstruction_nats_per_image"] == pytest.approx(expected, rel=1e-4)
    assert figures["prior_nats_per_image"] == pytest.approx(figures["nats_per_image"], rel=1e-6)
    total = figures["reconstruction_nats_per_image"] + figures["prior_nats_per_image"]
    assert figures["chain_rule_nats_per_image"] == pytest.approx(total, rel=1e-12)
    bits = total / math.log(2) / PIXELS + math.log2(255 / 2)
    assert figures["chain_rule_bits_per_dim"] == pytest.approx(bits, rel=1e-9)
    assert 0 < bits < 9, "8 are enough for any image, but its tokenizer has seen 40 steps"
    about = evaluation.protocol["chain_rule"]
    assert about["likelihood"] == "Gaussian"
    assert about["scale"] == pytest.approx(math.sqrt(variance), rel=1e-5)
    assert "320 training images" in about["scale_of"]
    assert about["bound"].startswith("-log p(x | class) <=")
    assert "the images given their class" in evaluation.table()
    assert about["note"] in evaluation.table()
    assert_names(about["note"], "density", "discrete pixels")
    assert NUM_SCALE_IMAGES > 320


@pytest.mark.parametrize(("kind", "expected"), [("l1", "mean"), ("bce", None)])
def test_the_scale_of_other_likelihoods(runs, data, kind, expected):
    model, split = Autoencoder.from_pretrained(runs.tokenizer), data.splits["test"]
    model.config = model.config.model_copy(update={"loss": ObjectiveConfig(reconstruction=kind)})
    fitted = fit_likelihood(model, split, torch.arange(64), SharedWork(10))
    if expected is None:
        assert fitted == model.config.loss
        return
    images = to_float(split.read(torch.arange(64)))
    with torch.no_grad():
        error = (model.run_decoder(model.encode(images).z) - images).abs().mean().item()
    assert fitted.likelihood_scale == pytest.approx(error, rel=1e-5)
    assert error > min_scale(8)


def test_without_the_tokenizer_codes_are_measured_and_the_reason_is_said(runs, tmp_path):
    prior = Prior.from_pretrained(runs.prior)
    gone = prior.config.tokenizer.model_copy(update={"path": str(tmp_path / "gone")})
    prior.config = prior.config.model_copy(update={"tokenizer": gone})
    prior.save_pretrained(tmp_path / "run" / "model")
    found = evaluate_prior(tmp_path / "run", runs.codes)
    assert found.figures["nats_per_code"] > 0
    assert found.figures["chain_rule_nats_per_image"] is None
    assert f"{tmp_path / 'gone'}" in found.protocol["not_measured"]["chain_rule_nats_per_image"]
    assert "weights_sha256" not in found.protocol["tokenizer"]
    again = evaluate_prior(tmp_path / "run", runs.codes, runs.tokenizer)
    assert again.figures["chain_rule_nats_per_image"] > 0


def test_without_the_images_samples_are_still_judged(runs, cache, features, tmp_path):
    rewrite(cache, source=str(tmp_path / "gone"))
    found = evaluate_prior(runs.prior, cache, features=features, samples=SampleRequest(8))
    assert found.figures["class_accuracy"] is not None
    assert len(found.protocol["tokenizer"]["weights_sha256"]) == 64, "its decoder made the samples"
    assert found.figures["inception_score"] > 1
    for name in ("chain_rule_nats_per_image", "frechet_distance", "precision", "neighbour_distance_ratio"):
        assert found.figures[name] is None
        assert "gone" in found.protocol["not_measured"][name]
    with refuses(tmp_path / "gone"):
        evaluate_prior(runs.prior, cache, source=str(tmp_path / "gone"))


# --- samples --------------------------------------------------------------------------------------------------------


def reference_distance(x: np.ndarray, y: np.ndarray) -> float:
    """By the trace of (a^1/2 b a^1/2)^1/2, whose matrices are symmetric: a feature may be the same for all images."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    values, vectors = np.linalg.eigh(a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ b @ root).clip(0)).sum()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b) - 2 * shared


def test_samples_are_judged_as_a_plain_computation_judges_them(runs, data, features, evaluation):
    figures, network = evaluation.figures, FeatureNetwork.from_pretrained(features)
    options = SAMPLING.model_dump(exclude_defaults=True)
    output = TwoStagePipeline.from_runs(runs.prior)(NUM_SAMPLES, seed=3, output_type="pt", **options)

    def judged(pixels: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
        with torch.no_grad():
            found = torch.cat([network.features(to_float(image[None])) for image in pixels])
            return found.double().numpy(), network.head(found).argmax(1)

    of_samples, classes = judged(output.images)
    assert output.labels == [i % 8 for i in range(NUM_SAMPLES)]
    assert figures["class_accuracy"] == pytest.approx((classes == torch.tensor(output.labels)).double().mean().item())
    held_out = torch.arange(NUM_SAMPLES) * 64 // NUM_SAMPLES
    of_real, classes = judged(data.splits["test"].read(held_out))
    real = (classes == data.splits["test"].read_labels(held_out)).double().mean().item()
    assert figures["class_accuracy_real"] == pytest.approx(real)
    assert real > 0.4, "learned nothing"
    of_train, _ = judged(data.splits["train"].read(torch.arange(320)))
    assert figures["frechet_distance"] == pytest.approx(reference_distance(of_train, of_samples), rel=1e-3)
    assert figures["frechet_distance_real"] == pytest.approx(reference_distance(of_train, of_real), rel=1e-3)
    assert figures["frechet_distance"] > figures["frechet_distance_real"], "the floor"
    near = [np.linalg.norm(x[:, None] - of_train, axis=2).min(1) for x in (of_samples, of_real)]
    assert figures["neighbour_distance_ratio"] == pytest.approx(np.median(near[0]) / np.median(near[1]), rel=0.05)
    assert figures["training_copies"] == 0
    assert figures["samples"] == NUM_SAMPLES
    assert figures["distinct_samples"] == len(torch.unique(output.images.flatten(1), dim=0))
    assert figures["codes_per_s"] > 0


def test_more_copies_than_one_in_a_hundred_are_refused(pipeline, data, features):
    network, greedy = OwnFeatures(features), SamplingConfig(top_k=1)  # the same grid for each image of a class
    images = HeldOutImages.choose(DataConfig(image_size=16, num_images=320), data, "test", None)

    def measured(num_samples: int, sampling: SamplingConfig) -> Samples:
        work = SharedWork(100)
        real = RealImages.judge(network, images, num_samples, work)
        return measure_samples(pipeline, network, SampleRequest(num_samples, 0, sampling), work, real)

    refused = measured(24, greedy)
    figures = figures_of(refused.measurements)
    assert figures.keys() == {"samples", "distinct_samples", "codes_per_s"}
    assert figures["distinct_samples"] <= 8
    copies = 24 - figures["distinct_samples"]
    (counts,) = refused.measurements
    assert counts.missing == dict.fromkeys(SAMPLE_FIGURES, f"{copies} of the samples are copies of others")
    assert_names(refused.refusal, f"{copies} of the 24 samples", "1%", "here top_k 1", "Try a higher temperature")
    assert refused.neighbours is None
    for temperature in (1.0, 1.15, 1.3):
        found = measured(100, SamplingConfig(temperature=temperature))
        figures = figures_of(found.measurements)
        assert (found.refusal is None) == (figures["distinct_samples"] >= 99)
        assert (found.refusal is None) == ("frechet_distance" in figures)


def test_too_many_copies_end_the_command_and_codes_are_still_measured(runs, features, twostage, tmp_path):
    run = shutil.copytree(runs.prior, tmp_path / "run")
    ended = twostage("evaluate", run, "--features", features, "--num-samples", 24, "--top-k", 1)
    assert ended.code == 2
    [sentence] = [line for line in ended.err.split("\r")[-1].splitlines() if "error" in line]
    assert "of the 24 samples are copies of others" in sentence
    assert_names(sentence, run / "evaluation" / "evaluation.json")
    written = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert written["figures"]["nats_per_code"] > 0
    assert written["figures"]["chain_rule_nats_per_image"] > 0
    assert {name for name, value in written["figures"].items() if value is None} == set(SAMPLE_FIGURES)
    assert written["protocol"]["samples"]["refused"] in sentence
    assert written["protocol"]["samples"]["duplicates"] >= 16
    assert (run / "evaluation" / "samples.png").exists(), "to see what is wrong"
    assert not (run / "evaluation" / "neighbours.png").exists()
    assert "copies of others" in (run / "evaluation" / "evaluation.html").read_text()


def test_a_network_of_other_classes_gives_distances_alone(runs, tmp_path):
    config = FeatureNetworkConfig(image_size=(8, 8), channels=3, class_names=["a", "b"], widths=[8])
    torch.manual_seed(0)
    FeatureNetwork(config).save_pretrained(tmp_path)
    found = evaluate_prior(runs.prior, features=tmp_path, samples=SampleRequest(20), num_images=8)
    assert found.figures["class_accuracy"] is None
    assert_names(found.protocol["not_measured"]["class_accuracy"], "a, b", "circle")
    assert found.figures["frechet_distance"] > 0
    assert 1 <= found.figures["inception_score"] <= 2, "its own two classes"
    assert "the network's own 2" in found.protocol["inception_score"]["classes"]


def test_the_watch_stops_when_the_last_code_is_drawn(monkeypatch):
    clock = iter([1.0, 3.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    watch = Stopwatch(10, torch.device("cpu"))
    for _ in range(3):
        watch(3.1)
    assert watch.seconds == 0
    watch(0.7)
    assert watch.seconds == 2


# --- the protocol and the command -----------------------------------------------------------------------------------


def test_the_protocol_says_how_it_was_measured(runs, features, data, evaluation):
    protocol = evaluation.protocol
    digest = lambda path: hashlib.sha256((path / "model" / "model.safetensors").read_bytes()).hexdigest()  # noqa: E731
    assert protocol["prior"] == {
        "path": str(runs.prior), "type": "causal_transformer", "weights_sha256": digest(runs.prior)
    }  # fmt: skip
    assert protocol["tokenizer"] == {
        "path": str(runs.tokenizer),
        "hash": Autoencoder.from_pretrained(runs.tokenizer).content_hash(),
        "weights_sha256": digest(runs.tokenizer),
    }
    indices = CodeCache(runs.codes).validation.read(torch.arange(64))
    grids = b"".join(hashlib.sha256(grid.numpy().tobytes()).digest() for grid in indices)
    expected = {"path": str(runs.codes), "split": "test", "rows": 64, "chosen": "all"}
    assert protocol["codes"].items() >= (expected | {"sha256": hashlib.sha256(grids).hexdigest()}).items()
    images = data.splits["test"].read(torch.arange(64))
    pixels = b"".join(hashlib.sha256(image.numpy().tobytes()).digest() for image in images)
    expected = {"source": "shapes", "split": "test", "images": 64, "sha256": hashlib.sha256(pixels).hexdigest()}
    assert protocol["data"].items() >= expected.items()
    assert protocol["likelihood"]["kind"] == "exact"
    assert "(ln 2 x 16 x 16 x 3)" in protocol["likelihood"]["bits_per_dim"]
    assert protocol["samples"]["seed"] == 3
    assert protocol["samples"]["sampling"] == SAMPLING.model_dump(mode="json")
    distance = protocol["frechet_distance"]
    assert distance["hash"] == FeatureNetwork.from_pretrained(features).content_hash()
    assert (distance["training_images"], distance["held_out_images"]) == (320, NUM_SAMPLES)
    assert "37 images for 24 features" in distance["warning"]
    assert protocol["kernel_distance"].items() >= {"subsets": 100, "subset_size": NUM_SAMPLES // 2}.items()
    expected = {"neighbours": 3, "samples": NUM_SAMPLES, "training_images": NUM_SAMPLES}
    assert protocol["precision_recall"].items() >= expected.items()
    assert protocol["inception_score"]["splits"] == 1
    for name in ("kernel_distance", "precision_recall", "inception_score", "neighbours"):
        assert protocol[name]["network"] == distance["network"]
    assert protocol["not_measured"] == {}
    assert protocol.keys() >= {"image_size", "channels", "batch_size", "device", "versions", "processes"}


def test_the_command_writes_and_says_everything(runs, features, twostage, tmp_path):
    run = shutil.copytree(runs.prior, tmp_path / "run")
    words = ["--num-samples", 40, "--guidance-scale", 1.5, "--temperature", 1.3, "--json", tmp_path / "out.json"]
    ended = twostage("evaluate", run, "--features", features, *words)
    assert ended.code == 0, ended.err
    written = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert written == json.loads((tmp_path / "out.json").read_text())
    assert written.keys() == {"figures", "protocol"}
    assert written["protocol"]["samples"]["sampling"]["guidance_scale"] == 1.5
    assert list(written["figures"])[:3] == ["parameters", "images", "nats_per_code"]
    said = ["nats per code  ", "unigram", "uniform", "whole model, at most", "class accuracy", "codes per second"]
    for words in [*said, "kernel distance", "Inception score", "precision", "recall", "nearest training image"]:
        assert words in ended.out
    with Image.open(run / "evaluation" / "samples.png") as picture:
        assert picture.width == 8 * 100 + 4, "one class a column"
    with Image.open(run / "evaluation" / "neighbours.png") as picture:
        assert (picture.width, picture.height) == (9 * 100 + 4, 8 * 118 + 4), "two samples of each class, two a row"
    page = (run / "evaluation" / "evaluation.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    for words in (
        "kernel distance",
        written["protocol"]["codes"]["sha256"],
        f"{written['figures']['recall']:.2%}",
    ):
        assert words in page


def test_without_a_network_it_says_what_to_do(runs, twostage, tmp_path):
    run = shutil.copytree(runs.prior, tmp_path / "run")
    ended = twostage("evaluate", run, "--num-images", 5)
    assert ended.code == 0, ended.err
    lines = {line[:28].strip(): line[28:] for line in ended.out.splitlines()}
    assert_names(lines["class accuracy"], "not measured: as above")
    assert_names(lines["drawn at"], "not measured", "--features runs/NAME", "--inception FILE")
    assert not (run / "evaluation" / "samples.png").exists()


def test_mistakes_cost_one_sentence(runs, cache, features, changed_tokenizer, twostage):
    def refused(*words: object) -> str:
        ended = twostage("evaluate", *words)
        assert ended.code == 2, ended
        assert ended.err.startswith("error: ")
        assert ended.err.count("\n") == 1
        return ended.err

    prior, other = runs.prior, changed_tokenizer("encoder")
    found, expected = (Autoencoder.from_pretrained(path).content_hash()[:12] for path in (other, runs.tokenizer))
    needs_network = ("--num-samples 500", "--seed 3", "--temperature 0.8", "--features runs/NAME")
    for words, parts in (
        ((prior, "--codes", cache / "no"), (cache / "no", "twostage encode")),
        ((prior / "model" / "..", "--codes", runs.tokenizer), (runs.tokenizer, "not a code cache", "twostage encode")),
        ((prior, "--split", "val"), ("--split val", "train", "test")),
        ((prior, "--weights-dir", cache), ("--weights-dir", cache, "tokenizers", prior)),
        ((runs.tokenizer, "--codes", cache), ("--codes", cache, "priors", runs.tokenizer)),
        ((runs.tokenizer, "--top-k", 3), ("--top-k 3", "priors")),
        ((prior, "--top-k", 99, "--features", features), ("top_k 99", "16")),
        ((prior, "--num-samples", 500, "--seed", 3, "--temperature", 0.8), needs_network),
        ((prior, "--features", features, "--inception", "x"), ("--features", features, "--inception x")),
        ((prior, "--tokenizer", other), (found, expected)),
    ):
        assert_names(refused(*words), *parts)
    hashes = {"hash": "f" * 64, "path": "runs/other"}
    for key, value, parts in (
        ("tokenizer", hashes, ("f" * 12, prior, expected)),
        ("codebook_size", 32, ("codebook_size 32", prior)),
        ("class_names", ["a"], ("class_names ['a']", prior)),
    ):
        shutil.copy(runs.codes / "manifest.json", cache)
        rewrite(cache, **{key: value})
        assert_names(refused(prior, "--codes", cache), *parts, "--codes DIR")
    assert not (prior / "evaluation").exists()


def test_damaged_codes_are_refused(runs, cache):
    codes = np.load(cache / "train.codes.npy")
    codes[5, 0, 1] = 16
    np.save(cache / "train.codes.npy", codes)
    with refuses("row 5", "code 16", "0 to 15"):
        evaluate_prior(runs.prior, cache)


def test_codes_of_another_grid_are_refused(runs, cache):
    for file in cache.glob("*.codes.npy"):
        np.save(file, np.load(file)[:, :, :2])
    rewrite(cache, grid=[4, 2])
    with refuses("grid 4x2", runs.prior, "4x4", "--codes DIR"):
        evaluate_prior(runs.prior, cache)
