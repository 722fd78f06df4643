"""Strips between two images: held-out images of two classes, or given images."""

import numpy as np
import pytest
import torch
from messages import refuses
from PIL import Image

from pipelines.drawing.tokenizer_sheets import draw_interpolations, pairs_of_rows
from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.saved.saved_model import SavedModel
from twostage.core.data.shapes import draw_shapes
from twostage.core.images.conversion import to_pil
from twostage.core.images.sheets import save_image


def test_pairs_have_two_classes_as_long_as_possible():
    labels = torch.tensor([3, 3, 3, 1, 2, 2, 2])
    assert pairs_of_rows(labels, 7, 2).tolist() == [3, 4, 0, 5], "the classes in turn"
    assert pairs_of_rows(labels, 7, 9).tolist() == [3, 4, 0, 5, 1, 6], "one is left over"
    ordered = torch.arange(6).repeat_interleave(50)  # as in a folder: class after class
    assert ordered[pairs_of_rows(ordered, 300, 3)].tolist() == [0, 1, 2, 3, 4, 5]
    assert pairs_of_rows(torch.zeros(4), 4, 9).tolist() == [0, 1, 2, 3]
    assert pairs_of_rows(None, 5, 1).tolist() == [0, 2]
    with refuses("1 held-out images", "--image"):
        pairs_of_rows(None, 1, 1)


@pytest.mark.parametrize("of", ["tokenizer", "prior"])
def test_the_command_draws_strips_of_held_out_images(runs, twostage, tmp_path, of):
    out = tmp_path / "strips.png"
    ended = twostage("interpolate", getattr(runs, of), "--num-images", 5, "--num-pairs", 3, "--out", out)
    assert ended.code == 0, ended.err
    assert ended.out == f"{out}: 3 strips of 5 images; both ends are reconstructions\n"
    with Image.open(out) as sheet:
        assert sheet.height == 3 * (6 * 16 + 4) + 4
        assert sheet.width > 5 * 100


def test_given_images_are_the_ends(runs, pipeline, tmp_path, capsys):
    ends = torch.from_numpy(draw_shapes(0, 2, (16, 16), 3))
    files = [tmp_path / "first.png", tmp_path / "second.png"]
    for image, file in zip(ends, files, strict=True):
        save_image(to_pil(image), file)
    pipeline.save_pretrained(tmp_path / "pipeline")
    assert draw_interpolations(SavedModel.find(tmp_path / "pipeline"), tmp_path / "strip.png", files, num_images=4) == 1
    expected = pipeline.interpolate(ends[0], ends[1], 4)
    assert torch.equal(expected[[0, -1]], pipeline.reconstruct(ends))
    strip = np.asarray(Image.open(tmp_path / "strip.png"))
    left = strip.shape[1] - 4 * 100 - 4  # of the title
    for number, image in enumerate(expected):
        tile = strip[4:100, left + 4 + number * 100 :][:, :96]
        assert np.array_equal(tile[::6, ::6], image.permute(1, 2, 0))
    with refuses("--image: got 1 image, expected two for each strip"):
        draw_interpolations(SavedModel.find(tmp_path / "pipeline"), tmp_path / "strip.png", files[:1])
    with refuses(tmp_path / "pipeline", "--image FILE", "--data SOURCE"):
        draw_interpolations(SavedModel.find(tmp_path / "pipeline"), tmp_path / "strip.png")


def test_latents_of_a_variational_autoencoder_are_interpolated_too(variational):
    pipeline = TwoStagePipeline.from_pretrained(variational("class_gaussian"))
    ends = torch.from_numpy(draw_shapes(0, 2, (16, 16), 3))
    between = pipeline.interpolate(ends[0], ends[1], 3)
    assert torch.equal(between[[0, 2]], pipeline.reconstruct(ends))
    with refuses("second image: expected uint8"):
        pipeline.interpolate(ends[0], ends[1].float(), 3)


def test_the_images_of_a_folder_are_paired_in_order(runs, twostage, tmp_path):
    folder, out = tmp_path / "mine", tmp_path / "strips.png"
    folder.mkdir()
    for number, image in enumerate(torch.from_numpy(draw_shapes(0, 7, (16, 16), 3))):
        save_image(to_pil(image), folder / f"{number}.png")
    ended = twostage("interpolate", runs.tokenizer, "--image", folder, "--num-pairs", 2, "--out", out)
    assert ended.code == 0, ended.err
    assert f"{folder}: the first 4 of 7 images; --num-pairs shows more\n{out}: 2 strips of 9" in ended.out
    ended = twostage("interpolate", runs.tokenizer, "--image", folder, "--out", out)
    assert ended.code == 2
    assert "--image: got 7 images, expected two for each strip" in ended.err
