"""Kernel distance, Inception score, precision and recall against torch-fidelity on the same features."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kernel_mmd, kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from pipelines.evaluation.distances import (
    NUM_SUBSETS,
    inception_score,
    kernel_distance,
    num_splits,
    precision_recall,
    subset_size,
)
from pipelines.evaluation.shared_work import SharedWork
from stage1_tokenizer.features.feature_network import FeatureNetwork, FeatureNetworkConfig
from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images
from twostage.core.data.shapes import CLASS_NAMES
from twostage.core.images.conversion import to_float
from twostage.core.training.random import seed_for


@pytest.fixture(scope="module")
def sets() -> tuple[torch.Tensor, torch.Tensor]:
    """Features of drawn images, and of others with some noise on them."""
    torch.manual_seed(0)
    config = FeatureNetworkConfig(image_size=(16, 16), channels=3, class_names=list(CLASS_NAMES), widths=[8, 16])
    network, train = FeatureNetwork(config), load_images(DataConfig(image_size=16, num_images=700)).splits["train"]
    images = to_float(train.read(torch.arange(700)))
    images[400:] += 0.3 * torch.randn(300, 3, 16, 16)
    with torch.no_grad():
        features = network.features(images)
    return features[400:], features[:400]


def test_the_kernel_distance_is_that_of_torch_fidelity(sets):
    images, real = (features.double() for features in sets)
    found, deviation = kernel_distance(*sets, size=100, work=SharedWork())
    options = {"kid_subset_size": 100, "kid_kernel": "poly", "kid_kernel_poly_degree": 3, "verbose": False}
    options |= {"kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1.0, "rng_seed": 1}
    peer = kid_features_to_metric(images, real, kid_subsets=100, **options)
    assert abs(found - peer["kernel_inception_distance_mean"]) < peer["kernel_inception_distance_std"]
    each = []
    for subset in range(NUM_SUBSETS):  # and on the same subsets to the last digits
        generator = torch.Generator().manual_seed(seed_for("kernel distance", subset))
        chosen = [x[torch.randperm(len(x), generator=generator)[:100]].numpy() for x in (real, images)]
        each.append(kernel_mmd(*chosen, **options))
    assert found == pytest.approx(np.mean(each), rel=1e-9)
    assert deviation == pytest.approx(np.std(each), rel=1e-9)
    assert found > deviation, "noise was not seen"
    alike, deviation = kernel_distance(sets[1][:200], sets[1][200:], 100, SharedWork())
    assert abs(alike) < deviation


@pytest.mark.parametrize(("images", "expected"), [(50_000, 1000), (1000, 500), (5, 2)])
def test_subsets_differ(images, expected):
    assert subset_size(images) == expected


def test_precision_and_recall_are_those_of_torch_fidelity(sets):
    options = {"prc_neighborhood": 3, "prc_batch_size": 64, "verbose": False}
    for images, real in (sets, sets[::-1]):
        found = precision_recall(images, real, SharedWork())
        peer = prc_features_to_metric(images.double(), real.double(), save_cpu_ram=True, **options)
        assert found == pytest.approx((peer["precision"], peer["recall"]), abs=1e-6)
        assert 0.05 < min(found) < 0.95, "a figure that says nothing"
    assert precision_recall(sets[0], sets[0].flip(0), SharedWork()) == (1.0, 1.0)
    assert precision_recall(sets[0], sets[1] + 1e4, SharedWork()) == (0.0, 0.0)


def test_the_inception_score_is_that_of_torch_fidelity():
    logits = 3 * torch.randn(99, 8, generator=torch.Generator().manual_seed(0))
    assert num_splits(99) == 1
    peer = isc_features_to_metric(logits, splits=1)["inception_score_mean"]
    assert inception_score(logits) == pytest.approx((peer, 0.0), rel=1e-9)


def test_the_inception_score_of_many_images_has_splits():
    logits = 3 * torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    found, deviation = inception_score(logits)
    peer = isc_features_to_metric(logits, splits=num_splits(1000))
    assert num_splits(1000) == 10
    assert found == pytest.approx(peer["inception_score_mean"], abs=3 * deviation)
    assert 0.3 < deviation / peer["inception_score_std"] < 3
    order = torch.arange(1000) % 8
    sure = torch.full((1000, 8), -1e4).scatter(1, order.sort().values[:, None], 1e4)
    assert inception_score(sure)[0] == pytest.approx(8, rel=0.05), "sorted by class, and chances of exactly 0"
    assert inception_score(torch.zeros(1000, 8))[0] == pytest.approx(1)
