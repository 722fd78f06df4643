"""Nearest neighbours against the whole table of distances, and samples that are copies of training images."""

import numpy as np
import pytest
import torch

from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.evaluation.frechet import OwnFeatures
from pipelines.evaluation.neighbours import (
    OTHERS,
    POINTS,
    Neighbours,
    in_any_ball,
    nearest,
    neighbours_sheet,
    num_shown,
)
from pipelines.evaluation.prior_measurements import SampleFigures, measure_samples
from pipelines.evaluation.prior_table import memorising
from stage1_tokenizer.feature_network import FeatureNetwork, FeatureNetworkConfig
from stage2_prior.sampling import SamplingConfig
from twostage.core.data.dataset import DataConfig, ImageSplit, load_images
from twostage.core.data.shapes import CLASS_NAMES
from twostage.core.machine.processes import join_processes


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> OwnFeatures:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("features")
    config = FeatureNetworkConfig(image_size=(16, 16), channels=3, class_names=list(CLASS_NAMES), widths=[8])
    FeatureNetwork(config).save_pretrained(folder)
    return OwnFeatures(folder)


def test_blocks_give_what_the_whole_table_gives():
    generator = torch.Generator().manual_seed(0)
    points, others = (torch.randn(n, 3, generator=generator) for n in (POINTS + 44, 2 * OTHERS + 8))
    table = torch.cdist(points.double(), others.double())
    expected, expected_rows = table.sort(1)
    distances, rows = nearest(points, others, 3, join_processes())
    torch.testing.assert_close(distances, expected[:, :3])
    assert torch.equal(rows, expected_rows[:, :3])
    radii = 0.2 * torch.rand(len(others), generator=generator, dtype=torch.float64)
    share = in_any_ball(points, others, radii, join_processes())
    assert share == pytest.approx((table <= radii).any(1).double().mean().item(), abs=1e-12)
    assert 0.1 < share < 0.9


@pytest.mark.parametrize(
    ("samples", "classes", "expected"), [(99, 0, 16), (99, 8, 16), (99, 10, 10), (99, 1000, 16), (5, 2, 5)]
)
def test_each_class_is_pictured_as_often(samples, classes, expected):
    assert num_shown(samples, classes) == expected


def test_a_row_of_the_sheet_is_two_samples_and_their_neighbours():
    pixels = torch.arange(3 * 4, dtype=torch.uint8).mul(20).view(3, 4, 1, 1, 1).expand(3, 4, 1, 88, 88)
    sheet = neighbours_sheet(Neighbours(pixels[:, 0], pixels[:, 1:], torch.rand(3, 3)), ["a", "b"])
    shown = np.asarray(sheet)[4 : -18 : 92 + 18, 4:-4:92, 0]
    assert shown.tolist() == [[0, 20, 40, 60, 255, 80, 100, 120, 140], [160, 180, 200, 220, 255, 255, 255, 255, 255]]


def measured(pipeline: TwoStagePipeline, network: OwnFeatures, train: ImageSplit) -> SampleFigures:
    held_out = load_images(DataConfig(image_size=16, num_images=320)).splits["test"]
    sampling = SamplingConfig(temperature=1.3)
    return measure_samples(pipeline, network, 40, sampling, 0, 16, join_processes(), train, held_out)


def test_copies_of_training_images_are_found_and_said(pipeline, network):
    config = DataConfig(image_size=16, num_images=320)
    train = load_images(config).splits["train"]
    own = pipeline(40, seed=0, temperature=1.3, output_type="np").images.transpose(0, 3, 1, 2)
    half = np.concatenate([train.read(torch.arange(280)).numpy(), own])
    found = measured(pipeline, network, ImageSplit(None, half, None, config))
    assert found.figures["training_copies"] == 40
    assert found.figures["neighbour_distance_ratio"] == pytest.approx(0, abs=0.01), "rounding is left"
    assert torch.equal(found.neighbours.nearest[:, 0], found.neighbours.samples)
    assert torch.equal(found.neighbours.samples, torch.from_numpy(own[:16]))
    said = memorising(found.figures)
    assert said.startswith("this looks like memorising: samples are 0.00 times as far from training images as held-out")
    assert "40 of them are training images, pixel by pixel" in said
    new = measured(pipeline, network, train)
    assert new.figures["training_copies"] == 0
    assert memorising(new.figures) is None


@pytest.mark.parametrize(
    ("ratio", "copies", "said"), [(1.2, 0, None), (0.4, 0, "0.40 times"), (1.2, 1, None), (1.2, 2, "2 of")]
)
def test_when_it_looks_like_memorising(ratio, copies, said):
    sentence = memorising({"samples": 100, "neighbour_distance_ratio": ratio, "training_copies": copies})
    assert (said in sentence) if said else sentence is None


@pytest.mark.parametrize("family", ["gaussian", "class_gaussian"])
def test_samples_of_a_variational_autoencoder(variational, network, family):
    pipeline = TwoStagePipeline.from_runs(variational(family))
    data = load_images(DataConfig(image_size=16, num_images=320)).splits
    found = measure_samples(
        pipeline, network, 40, SamplingConfig(), 0, 16, join_processes(), data["train"], data["test"]
    )
    assert torch.equal(found.pictures, pipeline(40, seed=0, output_type="pt").images)
    assert found.figures["frechet_distance"] > found.figures["frechet_distance_real"] > 0
    assert "codes_per_s" not in found.figures
    assert ("class_accuracy" in found.figures) == (family == "class_gaussian")
    assert found.missing == ({} if family == "class_gaussian" else {"class_accuracy": "the model has no classes"})
