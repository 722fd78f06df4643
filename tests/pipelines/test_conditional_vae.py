"""Commands on a VAE whose encoder and decoder see the class: labels reach it, or their absence is one sentence."""

import shutil

import pytest
import torch
from messages import refuses
from PIL import Image

from pipelines.comparison.side_by_side import compare_models
from pipelines.drawing.tokenizer_sheets import draw_interpolations, draw_reconstructions, pairs_of_rows
from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.evaluation.evaluate_tokenizer import evaluate_tokenizer
from pipelines.saved.model_card import CardFields
from pipelines.saved.saved_model import SavedModel
from pipelines.sharing.exported_folder import export_pipeline
from pipelines.sharing.exported_programs import export_programs
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.validation import psnr
from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images
from twostage.core.data.shapes import draw_shapes
from twostage.core.images.conversion import to_float, to_uint8


@pytest.fixture
def run(variational, tmp_path):
    """A model whose decoder draws each class with its own brightness."""
    model = Autoencoder.from_pretrained(variational("conditional"))
    with torch.no_grad():
        model.decoder.shifts.weight.mul_(5)
    model.save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def test_reconstructions_get_the_class_of_every_image(run):
    pipeline = TwoStagePipeline.from_pretrained(run)
    images, labels = torch.from_numpy(draw_shapes(0, 5, (16, 16), 3)), [0, 3, 3, 1, 7]
    found = pipeline.reconstruct(images, labels)
    expected = to_uint8(pipeline.tokenizer.reconstruct(to_float(images), torch.tensor(labels)))
    assert (found.int() - expected.int()).abs().max() <= 1
    assert not torch.equal(found[1], pipeline.reconstruct(images, [0, 2, 3, 1, 7])[1])
    strip = pipeline.interpolate(images[1], images[2], 3, label=3)
    assert torch.equal(strip[[0, 2]], found[1:3])
    with refuses("model.condition 'class'", "no classes"):
        pipeline.reconstruct(images)
    with refuses("model.condition 'class'", "no classes"):
        pipeline.interpolate(images[0], images[1])
    with refuses("labels [0]", "one for each of 5 images"):
        pipeline.reconstruct(images, [0])
    with refuses("labels [99]", "0 to 7"):
        pipeline.interpolate(images[0], images[1], label=99)


def test_labels_for_a_tokenizer_that_does_not_see_them_are_refused(variational):
    images = torch.from_numpy(draw_shapes(0, 2, (16, 16), 3))
    with refuses("labels [0, 1]", "does not see the class", "Omit labels"):
        TwoStagePipeline.from_pretrained(variational("class_gaussian")).reconstruct(images, [0, 1])


def test_sheets_show_held_out_images_and_refuse_files(run, tmp_path):
    saved, out, file = SavedModel.find(run), tmp_path / "out.png", tmp_path / "image.png"
    held_out = load_images(DataConfig(source="shapes", image_size=16)).validation
    rows = torch.arange(8)  # the shapes' classes cycle
    ratio = draw_reconstructions(saved, out, "shapes", 8)
    expected = Autoencoder.from_pretrained(run).reconstruct(to_float(held_out.read(rows)), held_out.read_labels(rows))
    assert ratio == pytest.approx(psnr(to_uint8(expected), held_out.read(rows)).mean().item(), abs=0.5)
    assert draw_interpolations(saved, out, source="shapes", num_pairs=3) == 3
    Image.new("RGB", (16, 16)).save(file)
    for draw in (lambda: draw_reconstructions(saved, out, images=[file]),
                 lambda: draw_interpolations(saved, out, [file, file])):  # fmt: skip
        with refuses(f"--image {file}", "model.condition 'class'", "Omit --image"):
            draw()
    with refuses(run, "one of ['circle'", "have ['a']", "--data"):
        (tmp_path / "photos" / "a").mkdir(parents=True)
        for number in range(4):
            shutil.copy(file, tmp_path / "photos" / "a" / f"{number}.png")
        draw_reconstructions(saved, out, str(tmp_path / "photos"))


def test_pairs_of_one_class():
    labels = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0, 4])
    pairs = pairs_of_rows(labels, 9, 3, same_class=True)
    assert len(pairs) >= 4
    assert torch.equal(labels[pairs[::2]], labels[pairs[1::2]])
    assert (pairs[::2] != pairs[1::2]).all()
    with refuses("3 held-out images", "at least 2 of the same class", "--data"):
        pairs_of_rows(torch.arange(3), 3, 2, same_class=True)


def test_it_is_evaluated_and_compared_with_its_classes(run):
    figures = evaluate_tokenizer(run, "shapes", num_images=24).figures
    held_out = load_images(DataConfig(source="shapes", image_size=16)).validation
    rows = torch.arange(24) * (len(held_out) // 24)
    model = Autoencoder.from_pretrained(run)
    wrong = model.reconstruct(to_float(held_out.read(rows)), (held_out.read_labels(rows) + 1) % 8)
    assert abs(figures["psnr"] - psnr(to_uint8(wrong), held_out.read(rows)).mean().item()) > 0.1
    comparison = compare_models([run], "shapes", num_images=8)
    assert comparison.models[0].reconstructions.shape == (8, 3, 16, 16)
    assert comparison.classes is not None


def test_programs_cannot_carry_a_class_but_the_folder_can(run, tmp_path):
    with refuses("--onnx, --torch-export", "model.condition 'class'", "Omit the option"):
        export_programs(Autoencoder.from_pretrained(run), tmp_path, ["onnx", "torch_export"])
    pipeline = TwoStagePipeline.from_pretrained(run)
    assert export_pipeline(pipeline, tmp_path / "out", [], CardFields(), {}) == []
    assert "encoder and decoder see classes" in (tmp_path / "out" / "README.md").read_text()
