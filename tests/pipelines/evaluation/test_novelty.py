"""Nearest neighbours against the whole table of distances, and samples that are copies of training images."""

import numpy as np
import pytest
import torch
from messages import assert_names

from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.evaluation.distances import BLOCK_OTHERS, BLOCK_POINTS, nearest, share_in_balls
from pipelines.evaluation.judged_images import RealImages
from pipelines.evaluation.judges import OwnFeatures
from pipelines.evaluation.measurement import HeldOutImages, figures_of
from pipelines.evaluation.novelty import Neighbours, memorisation_warning, neighbours_sheet, num_shown
from pipelines.evaluation.samples import SampleRequest, Samples, measure_samples
from pipelines.evaluation.shared_work import SharedWork
from pipelines.saved.evaluation_figures import SampleNovelty
from stage1_tokenizer.features.feature_network import FeatureNetwork, FeatureNetworkConfig
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images
from twostage.core.data.image_data import ImageSplit
from twostage.core.data.shapes import CLASS_NAMES


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> OwnFeatures:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("features")
    config = FeatureNetworkConfig(image_size=(16, 16), channels=3, class_names=list(CLASS_NAMES), widths=[8])
    FeatureNetwork(config).save_pretrained(folder)
    return OwnFeatures(folder)


def test_blocks_give_what_the_whole_table_gives():
    generator = torch.Generator().manual_seed(0)
    points, others = (torch.randn(n, 3, generator=generator) for n in (BLOCK_POINTS + 44, 2 * BLOCK_OTHERS + 8))
    table = torch.cdist(points.double(), others.double())
    expected, expected_rows = table.sort(1)
    distances, rows = nearest(points, others, 3, SharedWork())
    torch.testing.assert_close(distances, expected[:, :3])
    assert torch.equal(rows, expected_rows[:, :3])
    radii = 0.2 * torch.rand(len(others), generator=generator, dtype=torch.float64)
    share = share_in_balls(points, others, radii, SharedWork())
    assert share == pytest.approx((table <= radii).any(1).double().mean().item(), abs=1e-12)
    assert 0.1 < share < 0.9


@pytest.mark.parametrize(
    ("samples", "classes", "expected"), [(99, 0, 16), (99, 8, 16), (99, 10, 10), (99, 1000, 16), (5, 2, 5)]
)
def test_each_class_is_shown_equally_often(samples, classes, expected):
    assert num_shown(samples, classes) == expected


def test_a_row_of_the_sheet_is_two_samples_and_their_neighbours():
    pixels = torch.arange(3 * 4, dtype=torch.uint8).mul(20).view(3, 4, 1, 1, 1).expand(3, 4, 1, 88, 88)
    sheet = neighbours_sheet(Neighbours(pixels[:, 0], pixels[:, 1:], torch.rand(3, 3)), ["a", "b"])
    shown = np.asarray(sheet)[4 : -18 : 92 + 18, 4:-4:92, 0]
    assert shown.tolist() == [[0, 20, 40, 60, 255, 80, 100, 120, 140], [160, 180, 200, 220, 255, 255, 255, 255, 255]]


def images_with(train: ImageSplit | None = None) -> HeldOutImages:
    """Drawn shapes; with other training images if they are given."""
    config = DataConfig(image_size=16, num_images=320)
    data = load_images(config)
    data.splits["train"] = train or data.splits["train"]
    return HeldOutImages.choose(config, data, "test", None)


def measured(pipeline: TwoStagePipeline, network: OwnFeatures, images: HeldOutImages) -> Samples:
    request = SampleRequest(40, 0, SamplingConfig(temperature=1.3))
    work = SharedWork(16)
    real = RealImages.judge(network, images, request.num_samples, work)
    return measure_samples(pipeline, network, request, work, real)


def test_copies_of_training_images_are_found_and_warned_about(pipeline, network):
    config = DataConfig(image_size=16, num_images=320)
    train = load_images(config).splits["train"]
    own = pipeline(40, seed=0, temperature=1.3, output_type="np").images.transpose(0, 3, 1, 2)
    half = np.concatenate([train.read(torch.arange(280)).numpy(), own])
    found = measured(pipeline, network, images_with(ImageSplit(None, half, None, config)))
    figures = found.measurements[-1].figures
    assert figures.training_copies == 40
    assert figures.neighbour_distance_ratio == pytest.approx(0, abs=0.01), "rounding is left"
    assert torch.equal(found.neighbours.nearest[:, 0], found.neighbours.samples)
    assert torch.equal(found.neighbours.samples, torch.from_numpy(own[:16]))
    (warning,) = found.measurements[-1].notes
    assert_names(warning, "memorised", "0.00 times", "40 of them", "neighbours.png", "train on more data")
    new = measured(pipeline, network, images_with()).measurements[-1]
    assert new.figures.training_copies == 0
    assert not new.notes


@pytest.mark.parametrize(
    ("ratio", "copies", "part"), [(1.2, 0, None), (0.4, 0, "0.40 times"), (1.2, 1, None), (1.2, 2, "2 of")]
)
def test_when_samples_look_memorised(ratio, copies, part):
    warning = memorisation_warning(SampleNovelty(ratio, copies), 100)
    assert (part in warning) if part else warning is None


@pytest.mark.parametrize("family", ["gaussian", "class_gaussian"])
def test_samples_of_a_variational_autoencoder(variational, network, family):
    pipeline = TwoStagePipeline.from_runs(variational(family))
    work = SharedWork(16)
    real = RealImages.judge(network, images_with(), 40, work)
    found = measure_samples(pipeline, network, SampleRequest(40), work, real)
    assert torch.equal(found.images, pipeline(40, seed=0, output_type="pt").images)
    figures = figures_of(found.measurements)
    assert figures["frechet_distance"] > figures["frechet_distance_real"] > 0
    assert "codes_per_s" not in figures
    assert ("class_accuracy" in figures) == (family == "class_gaussian")
    missing = {name: reason for each in found.measurements for name, reason in each.missing.items()}
    assert missing == ({} if family == "class_gaussian" else {"class_accuracy": "the model has no classes"})
