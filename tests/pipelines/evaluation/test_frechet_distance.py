"""The Frechet distance against another way to compute it, in float64, and the features of Inception."""

import hashlib

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance

from pipelines.evaluation.distances import frechet_distance
from pipelines.evaluation.judges import InceptionFeatures, OwnFeatures
from pipelines.evaluation.reconstructions import ReconstructionJudge
from pipelines.evaluation.shared_work import SharedWork
from stage1_tokenizer.features.feature_network import FeatureNetwork, FeatureNetworkConfig
from twostage.core.data.shapes import draw_shapes


def reference_distance(x: np.ndarray, y: np.ndarray) -> float:
    """tr (A B)^(1/2) is the sum of the singular values of L'M, where A = L L' and B = M M'."""
    first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    roots = np.linalg.cholesky(first).T @ np.linalg.cholesky(second)
    traces = np.trace(first) + np.trace(second) - 2 * np.linalg.svd(roots, compute_uv=False).sum()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + traces


class Pixels(torch.nn.Module):
    """Takes the pixels themselves for features."""

    num_features, channels, protocol = 40, 1, {"network": "the pixels", "hash": "0" * 64}

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.flatten(1).double()


def test_the_distance_has_the_precision_of_float64():
    x, y = torch.randint(0, 256, (2, 300, 1, 5, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    distances = ReconstructionJudge(Pixels(), 300, SharedWork())
    for places in torch.arange(300).split(77):
        distances.update(x[places], y[places], places)
    found = distances.compute(300)
    assert found.figures.rfid == pytest.approx(
        reference_distance(*(z.flatten(1).double().numpy() for z in (x, y))), rel=1e-9
    )
    assert "warning" in found.protocol["rfid"]
    few = ReconstructionJudge(Pixels(), 81, SharedWork())
    few.update(x[:81], y[:81], torch.arange(81))
    assert few.compute(81).figures.by_key().keys() == {"rfid"}, "a half has fewer images than it needs"


def test_images_that_come_back_as_they_were_have_no_distance():
    x = torch.randint(0, 256, (300, 1, 5, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    distances = ReconstructionJudge(Pixels(), 300, SharedWork())
    distances.update(x, x, torch.arange(300))
    figures = distances.compute(300).figures
    assert figures.rfid == pytest.approx(0, abs=1e-6)
    assert figures.rfid_of_halves > 100, "of 255 levels"


def test_inception_features_are_those_of_torch_fidelity(tmp_path, monkeypatch):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    with monkeypatch.context() as patch:  # only an instance knows the shapes, and it wants weights
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        peer = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], "none")
    torch.save(peer.state_dict(), tmp_path / "weights.pth")
    network = InceptionFeatures(tmp_path / "weights.pth")
    pixels = torch.randint(0, 256, (2, 3, 20, 24), dtype=torch.uint8)
    features, logits = peer(pixels)
    torch.testing.assert_close(network(pixels), features.double())
    torch.testing.assert_close(network.logits(network(pixels)), logits)
    torch.testing.assert_close(network(pixels[:, :1]), peer(pixels[:, :1].expand(-1, 3, -1, -1))[0].double())
    assert network.protocol["hash"] == hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()
    assert "NOT the published" in network.protocol["network"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> tuple[OwnFeatures, torch.Tensor]:
    """A network of 24 features, and 800 drawn images."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("features")
    config = FeatureNetworkConfig(image_size=(16, 16), channels=3, class_names=["a", "b"], widths=[8, 24])
    FeatureNetwork(config).save_pretrained(folder)
    return OwnFeatures(folder), torch.from_numpy(draw_shapes(0, 800, (16, 16), 3, 0))


def test_two_halves_of_a_set_are_as_far_apart_as_torch_fidelity_and_torchmetrics_say(drawn):
    network, images = drawn
    halves = [network(images[rows]) for rows in torch.randperm(800, generator=torch.Generator()).split(400)]
    found = frechet_distance(*halves, torch.device("cpu"))
    statistics = [fid_features_to_statistics(features) for features in halves]
    peer = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert found == pytest.approx(peer, rel=1e-3)
    metric = FrechetInceptionDistance(feature=network)
    for rows, real in zip(torch.randperm(800, generator=torch.Generator()).split(400), (True, False), strict=True):
        metric.update(images[rows], real=real)
    assert found == pytest.approx(metric.compute().item(), rel=1e-3)
    assert found > 1e-3, "halves are not the same"


def test_a_permuted_copy_has_no_distance(drawn):
    network, images = drawn
    features = network(images)
    permuted = features[torch.randperm(800, generator=torch.Generator().manual_seed(1))]
    assert frechet_distance(features, permuted, torch.device("cpu")) == pytest.approx(0, abs=1e-3)
    halves = frechet_distance(features[::2], features[1::2], torch.device("cpu"))
    assert frechet_distance(features, permuted, torch.device("cpu")) < 1e-3 * halves
