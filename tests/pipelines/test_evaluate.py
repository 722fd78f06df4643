"""The figures of `evaluate` against independent computations, its pictures, its protocol, its verdict."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from messages import assert_names
from PIL import Image
from scipy.linalg import sqrtm
from torch.nn import functional as F

from pipelines.evaluation.evaluate_tokenizer import evaluate_tokenizer
from pipelines.evaluation.reconstructions import ssim
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.features.feature_network import FeatureNetwork, FeatureNetworkConfig
from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images
from twostage.core.data.shapes import CLASS_NAMES
from twostage.core.images.conversion import to_float, to_uint8
from twostage.core.training.random import seed_for

ROOT = Path(__file__).parents[2]
NUM_FEATURES = 12


@pytest.fixture(scope="module", autouse=True)
def _one_process():
    """And one thread, as the command has in these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "1000")
        yield


@pytest.fixture(scope="module")
def originals() -> torch.Tensor:
    """What `runs.tokenizer` was validated on."""
    return load_images(DataConfig(image_size=16, num_images=320)).validation.read(torch.arange(64))


@pytest.fixture(scope="module")
def pictures(runs, originals) -> np.ndarray:
    """The 8-bit reconstructions of them, by another way than `evaluate` takes."""
    model = Autoencoder.from_pretrained(runs.tokenizer)
    decoded = torch.cat([model.decode_indices(model.encode(to_float(image[None])).indices) for image in originals])
    return np.clip(np.round((decoded.double().numpy() + 1) * 127.5), 0, 255)


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Path:
    """A feature network of another image size than the tokenizer's."""
    folder = tmp_path_factory.mktemp("features")
    torch.manual_seed(0)
    FeatureNetwork(
        FeatureNetworkConfig(image_size=(24, 24), channels=3, class_names=["a", "b"], widths=[8, NUM_FEATURES])
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def document(runs, features) -> dict:
    return evaluate_tokenizer(runs.tokenizer, features=features).document()


@pytest.fixture
def run(runs, tmp_path) -> Path:
    """A copy of the tokenizer's run folder."""
    return shutil.copytree(runs.tokenizer, tmp_path / "run")


@pytest.fixture
def offline(monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def numbers(document: dict) -> dict[str, float]:
    """The figures that were measured."""
    return {name: value for name, value in document["figures"].items() if value is not None}


# --- the figures ----------------------------------------------------------------------------------------------------


def test_psnr_is_the_mean_over_the_images(document, originals, pictures):
    error = ((originals.numpy() - pictures) ** 2).reshape(64, -1).mean(1)
    assert document["figures"]["images"] == 64
    assert document["figures"]["psnr"] == pytest.approx((10 * np.log10(255**2 / error)).mean(), rel=1e-5)


def test_ssim_is_the_mean_over_the_images(document, originals, pictures):
    expected = ssim(torch.from_numpy(pictures).byte(), originals).mean().item()
    assert document["figures"]["ssim"] == pytest.approx(expected, abs=1e-4)
    assert document["protocol"]["ssim"].startswith("Gaussian window 11x11,")


def reference_distance(x: np.ndarray, y: np.ndarray) -> float:
    covariances = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = sqrtm(covariances[0] @ covariances[1]).real
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)


def network_features(folder: Path, pixels: torch.Tensor) -> np.ndarray:
    """One image after the other, resized to what the network was made for."""
    network, found = FeatureNetwork.from_pretrained(folder), []
    with torch.no_grad():
        for image in to_float(pixels):
            resized = F.interpolate(image[None], (24, 24), mode="bilinear", antialias=True)
            found.append(network.features(resized)[0].double().numpy())
    return np.stack(found)


def test_the_frechet_distance_is_that_of_scipy(document, features, originals, pictures):
    x, y = network_features(features, originals), network_features(features, torch.from_numpy(pictures).byte())
    assert document["figures"]["rfid"] == pytest.approx(reference_distance(x, y), rel=1e-3), (
        "a pixel may round otherwise"
    )
    order = torch.randperm(64, generator=torch.Generator().manual_seed(seed_for("halves"))).numpy()
    halves = reference_distance(x[order < 32], x[order >= 32])
    assert document["figures"]["rfid_of_halves"] == pytest.approx(halves, rel=1e-3)


def test_perturbed_codes_are_neighbours_and_their_images_judged(runs, document, features, originals):
    """One of a code's 1 nearest others: the codebook has 16 codes. Image i loses 5/10, 6/10, ... of its codes."""
    model = Autoencoder.from_pretrained(runs.tokenizer)
    codes, book = model.encode(to_float(originals)).indices, model.bottleneck.codebook.double()
    nearest = (torch.cdist(book, book) + torch.eye(16) * 1e9).argmin(1)
    replaced = codes.clone()
    for row, share in enumerate([0.5, 0.6, 0.7, 0.8, 0.9] * 13):
        if row < 64:
            draws = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(seed_for(0, "perturbed codes", row)))
            replaced[row] = torch.where(draws[0] < share, nearest[codes[row]], codes[row])
    images = to_uint8(model.decode_indices(replaced))
    expected = reference_distance(network_features(features, originals), network_features(features, images))
    assert document["figures"]["rfid_perturbed"] == pytest.approx(expected, rel=1e-3)
    assert_names(document["protocol"]["rfid"]["perturbed"], "0.5, 0.6", "the 1 codes", "seed 0")


def test_codes_are_counted_over_the_whole_set(runs, document, originals):
    codes = Autoencoder.from_pretrained(runs.tokenizer).encode(to_float(originals)).indices.numpy()
    shares = np.unique(codes, return_counts=True)[1] / codes.size
    entropy = -(shares * np.log(shares)).sum()
    expected = {"codebook_size": 16, "codes_used": len(shares), "dead_codes": 16 - len(shares), "cells": 16}
    expected |= {"codebook_usage": len(shares) / 16, "perplexity": np.exp(entropy), "entropy_nats_per_code": entropy}
    expected |= {"code_bits_per_pixel": 4 * 16 / 256, "code_bits_per_dim": 4 * 16 / 768}
    assert {name: document["figures"][name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert "nats_per_image" not in document["figures"]


@pytest.mark.parametrize("batch_size", [7, 100])
def test_the_batch_size_changes_nothing(runs, features, document, batch_size):
    again = evaluate_tokenizer(runs.tokenizer, features=features, batch_size=batch_size)
    assert numbers(again.document()) == pytest.approx(numbers(document), rel=1e-4)
    assert again.protocol["data"] == document["protocol"]["data"]


def test_lpips_of_8_bit_images(runs, monkeypatch, tmp_path, originals, pictures):
    def build(config: object, channels: int, image_size: tuple[int, int], weights_dir: Path) -> torch.nn.Module:
        assert (channels, image_size, weights_dir) == (3, (16, 16), tmp_path)
        return Distance()

    class Distance(torch.nn.Module):
        def forward(self, decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
            assert torch.equal(to_float(to_uint8(decoded)), decoded), "not rounded to 8 bits"
            return (decoded - images).abs().mean()

    (tmp_path / "vgg16-397923af.pth").write_bytes(b"weights")
    monkeypatch.setattr("pipelines.evaluation.reconstructions.build_perceptual", build)
    found = evaluate_tokenizer(runs.tokenizer, weights_dir=tmp_path, batch_size=10)
    expected = np.abs(pictures - originals.numpy()).mean() * 2 / 255
    assert found.figures["lpips"] == pytest.approx(expected, rel=1e-5)
    assert found.protocol["lpips"]["hash"] == hashlib.sha256(b"weights").hexdigest()
    assert "lpips" not in found.protocol["not_measured"]


# --- the protocol ---------------------------------------------------------------------------------------------------


def test_the_protocol_says_how_it_was_measured(runs, features, document, originals):
    protocol = document["protocol"]
    digests = [hashlib.sha256(image.numpy().tobytes()).digest() for image in originals]
    expected = {"source": "shapes", "split": "test", "images": 64, "chosen": "all", "duplicates": 0}
    assert protocol["data"].items() >= expected.items()
    assert protocol["data"]["sha256"] == hashlib.sha256(b"".join(digests)).hexdigest()
    weights = (runs.tokenizer / "model" / "model.safetensors").read_bytes()
    assert protocol["tokenizer"] == {
        "path": str(runs.tokenizer),
        "hash": Autoencoder.from_pretrained(runs.tokenizer).content_hash(),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    assert protocol["rfid"]["hash"] == FeatureNetwork.from_pretrained(features).content_hash()
    assert "64 images for 12 features" in protocol["rfid"]["warning"]
    assert protocol["not_measured"].keys() == {"lpips", "recognised"}, "its classes are a and b"
    assert (protocol["trained_against"], protocol["not_evidence"]) == ([], {})
    assert protocol["versions"].keys() == {"python", "torch", "torchmetrics", "numpy", "pillow"}


def test_copies_are_counted_and_make_no_distance(runs, features, tmp_path):
    folder = tmp_path / "pictures" / "test"
    (tmp_path / "pictures" / "train").mkdir(parents=True)
    folder.mkdir()
    for i in range(20):
        Image.new("RGB", (16, 16), (10 * (i % 9), 90, 200)).save(folder / f"{i:02d}.png")
        Image.new("RGB", (16, 16), (10 * i, 0, 0)).save(tmp_path / "pictures" / "train" / f"{i:02d}.png")
    found = evaluate_tokenizer(runs.tokenizer, str(tmp_path / "pictures"), features=features)
    assert found.protocol["data"]["duplicates"] == 11
    assert found.figures["rfid"] is None
    assert_names(found.protocol["not_measured"]["rfid"], "9 different images", "12 features", "13")


def test_some_of_the_images_are_spread_over_the_split(runs, originals):
    data = evaluate_tokenizer(runs.tokenizer, num_images=16).protocol["data"]
    digests = [hashlib.sha256(image.numpy().tobytes()).digest() for image in originals[::4]]
    assert data["sha256"] == hashlib.sha256(b"".join(digests)).hexdigest()
    assert (data["images"], data["chosen"]) == (16, "spread evenly over 64")
    assert evaluate_tokenizer(runs.tokenizer, split="train", num_images=500).protocol["data"]["images"] == 320


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("offline")
def test_the_command_writes_and_says_everything(run, features, document, twostage, tmp_path):
    ended = twostage("evaluate", run, "--features", features, "--json", tmp_path / "out.json")
    assert ended.code == 0, ended.err
    written = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert written == json.loads((tmp_path / "out.json").read_text())
    assert written.keys() == {"figures", "protocol", "verdict"}
    assert written["figures"] == document["figures"]
    assert written["verdict"] == document["verdict"]
    assert written["verdict"].keys() == {"ready", "sentences"}
    for words in ["PSNR", "SSIM", "Frechet distance", "perplexity", "LPIPS                       not measured: "]:
        assert words in ended.out
    assert written["protocol"]["not_measured"]["lpips"] in ended.out
    assert all(sentence in ended.out for sentence in written["verdict"]["sentences"])


@pytest.mark.usefixtures("offline")
def test_without_a_network_it_says_what_to_do(run, twostage):
    ended = twostage("evaluate", run, "--num-images", 5)
    assert ended.code == 0, ended.err
    assert_names(ended.out, "not measured", "--features runs/NAME", "twostage train-features", "--inception FILE")
    with Image.open(run / "evaluation" / "worst.png") as picture:
        assert 500 < picture.width < 650, "five columns"


def tile(sheet: np.ndarray, row: int, column: int) -> np.ndarray:
    """One of the pictures of 16x16, each enlarged to 96, twelve in a row, with a caption below."""
    x, y = sheet.shape[1] - 1200 + 100 * column, 4 + 118 * row
    return sheet[y : y + 96 : 6, x : x + 96 : 6].transpose(2, 0, 1)


def test_the_worst_are_the_worst_and_the_typical_are_of_median_psnr(run, originals, pictures):
    evaluate_tokenizer(run, batch_size=9).write(run / "evaluation")
    error = ((originals.numpy() - pictures) ** 2).reshape(64, -1).mean(1)
    ratios, classes = 10 * np.log10(255**2 / error), np.arange(64) % len(CLASS_NAMES)
    nearest = []  # of each class: its images by how far their PSNR is from the class's median
    for number in range(len(CLASS_NAMES)):
        rows = np.flatnonzero(classes == number)
        median = np.sort(ratios[rows])[(len(rows) - 1) // 2]
        nearest.append(rows[np.abs(ratios[rows] - median).argsort(kind="stable")])
    typical = [rows[turn] for turn in range(2) for rows in nearest][:12]
    for name, rows in {"worst": np.argsort(-error, kind="stable")[:12], "typical": typical}.items():
        sheet = np.asarray(Image.open(run / "evaluation" / f"{name}.png"))
        for column, row in enumerate(rows):
            assert np.array_equal(tile(sheet, 0, column), originals[row].numpy())
            assert np.abs(tile(sheet, 1, column) - pictures[row]).max() <= 1


TWICE = """
import runpy, sys
for batch_size in ("64", "10"):  # of 64 images: one process has none; then each has some
    sys.argv = ["evaluate", RUN, "--features", FEATURES, "--batch-size", batch_size, "--json", f"{batch_size}.json"]
    try:
        runpy.run_module("pipelines.evaluate", run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise
"""


def test_two_processes_measure_what_one_does(run, features, document, tmp_path):
    script = tmp_path / "twice.py"
    script.write_text(f"RUN, FEATURES = {str(run)!r}, {str(features)!r}\n{TWICE}", encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", str(port), str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("SSIM") == 2, "said once each"
    for name, tolerance in {"64.json": 1e-9, "10.json": 1e-4}.items():  # other batches, other last bits
        found = json.loads((tmp_path / name).read_text())
        assert numbers(found) == pytest.approx(numbers(document), rel=tolerance)
        assert found["protocol"]["data"] == document["protocol"]["data"]


def test_mistakes_cost_one_sentence(runs, features, twostage, tmp_path):
    def refused(*words: object) -> str:
        ended = twostage("evaluate", *words)
        assert ended.code == 2, ended
        assert ended.err.startswith("error: ")
        assert ended.err.count("\n") == 1
        return ended.err

    tokenizer = runs.tokenizer
    (tmp_path / "code.pth").write_bytes(f"cos\nsystem\n(S'touch {tmp_path / 'owned'}'\ntR.".encode())
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    grey = tmp_path / "grey"
    FeatureNetwork(
        FeatureNetworkConfig(image_size=(16, 16), channels=1, class_names=["a"], widths=[8])
    ).save_pretrained(grey)
    for words, parts in (
        ((tmp_path / "nothing",), (tmp_path / "nothing", "no such folder")),
        ((tokenizer, "--split", "val"), ("--split val", "shapes", "train", "test")),
        ((tokenizer, "--inception", tmp_path / "no.pth"), ("no.pth: no such file", "pt_inception", "--features")),
        ((tokenizer, "--inception", tmp_path / "code.pth"), ("code.pth: not a file of weights", "pt_inception")),
        ((tokenizer, "--inception", tmp_path / "other.pth"), ("other.pth: other weights", "pt_inception")),
        ((tokenizer, "--inception", "x", "--features", features), ("--inception x", "--features", features)),
        ((tokenizer, "--features", runs.tokenizer), (runs.tokenizer, "tokenizer")),
        ((tokenizer, "--features", grey), ("--features", grey, "1 channels", "3", "--channels 3")),
        ((tokenizer, "--json", tmp_path), ("--json", tmp_path, "expected a file")),
    ):
        assert_names(refused(*words), *parts)
    assert not (tokenizer / "evaluation").exists()
    assert not (tmp_path / "owned").exists()
