"""`compare`: what it measures against the functions that measure one model, what it draws, what it refuses."""

import json

import pytest
import torch
from messages import assert_names, refuses
from PIL import Image

from pipelines.comparison import comparison_report
from pipelines.comparison.compared_models import open_models
from pipelines.comparison.comparison_report import figure_rows
from pipelines.comparison.side_by_side import compare_models
from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.evaluation.samples import SampleRequest
from pipelines.saved.saved_model import SavedModel
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.validation import psnr
from stage2_prior.prior import Prior
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.data.dataset import load_images
from twostage.core.data.spread import spread_over_classes
from twostage.core.images.conversion import to_float, to_uint8


@pytest.fixture(scope="module")
def comparison(runs, variational):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "1000")  # one thread
        return compare_models(
            [runs.tokenizer, variational("class_gaussian"), runs.prior],
            num_images=5,
            class_names=["star", "ring"],
            request=SampleRequest(seed=3, sampling=SamplingConfig(temperature=0.9, top_k=4)),
        )


def test_figures_are_of_the_same_held_out_images(comparison, runs):
    split = load_images(SavedModel.find_run(runs.tokenizer).training_data()).validation
    originals = split.read(torch.arange(len(split)))
    for model in comparison.models[:2]:
        decoded = to_uint8(model.tokenizer.reconstruct(to_float(originals)))
        assert model.figures["psnr"] == pytest.approx(psnr(decoded, originals).mean().item(), abs=1e-3)
    tokenizer = comparison.models[0].tokenizer
    prior = Prior.from_pretrained(runs.prior)
    codes = tokenizer.encode(to_float(originals)).indices
    nats = -prior.log_likelihood(codes, split.read_labels(torch.arange(len(split))))
    assert comparison.models[2].figures["nats_per_code"] == pytest.approx(nats.mean().item() / 16, rel=1e-4)
    assert comparison.models[0].figures["codes_used"] == len(codes.unique())
    assert comparison.models[2].figures["parameters"] == sum(p.numel() for p in prior.parameters())


def test_pictures_are_of_the_same_rows_classes_and_seeds(comparison, runs):
    tokenizer, vae, prior = comparison.models
    split = load_images(SavedModel.find_run(runs.tokenizer).training_data()).validation
    assert torch.equal(comparison.originals, split.read(spread_over_classes(split.labels, len(split), 5)))
    assert comparison.classes == ["star", "ring", "star", "ring", "star"]
    assert (tokenizer.samples, prior.reconstructions) == (None, None)
    asked = {"num_images": 5, "class_names": ["star", "ring"], "seed": 3, "output_type": "pt", "temperature": 0.9}
    assert torch.equal(prior.samples, TwoStagePipeline.from_runs(runs.prior)(**asked, top_k=4).images)
    assert torch.equal(vae.samples, TwoStagePipeline(vae.tokenizer)(**asked).images)  # which has no top_k


def test_each_row_has_captions_of_its_own(comparison, monkeypatch):
    sheets = {}
    monkeypatch.setattr(comparison_report, "contact_sheet", lambda *sheet: sheets.update(sheet=sheet))
    comparison_report.comparison_sheet(comparison)
    _, columns, captions, titles = sheets["sheet"]
    rows = {title: captions[row * columns : (row + 1) * columns] for row, title in enumerate(titles)}
    split, names = comparison.data.validation, comparison.data.class_names
    shown = split.read_labels(spread_over_classes(split.labels, len(split), 5)).tolist()
    assert rows["original"] == [names[label] for label in shown] != comparison.classes
    assert rows["prior: new"] == comparison.classes
    assert rows["tokenizer"] == [None] * 5


def test_the_table_tells_how_each_model_was_trained(comparison):
    tokenizer, vae, prior = figure_rows(comparison.models)
    assert {model["steps"] for model in (tokenizer, prior)} == {"40"}
    assert {model["learning_rate"] for model in (tokenizer, prior)} == {"0.003"}
    assert "class_accuracy" not in comparison_report.used_columns([tokenizer, vae, prior]), "nobody has it"


def test_a_figure_that_does_not_apply_is_an_empty_cell(comparison):
    tokenizer, vae, prior = figure_rows(comparison.models)
    assert {"psnr", "ssim", "codes"} < tokenizer.keys()
    assert not {"nats_per_image", "nats_per_code", "images_per_s", "rfid"} & tokenizer.keys()
    assert {"psnr", "nats_per_image", "images_per_s"} < vae.keys()
    assert not {"codes", "nats_per_code"} & vae.keys()
    assert {"nats_per_code", "images_per_s"} < prior.keys()
    assert not {"psnr", "codes", "class_accuracy", "frechet_distance"} & prior.keys()


def test_a_tokenizer_that_only_a_prior_names_is_shown_too(runs):
    alone = open_models([runs.prior])
    assert [(model.name, model.reconstructs) for model in alone] == [("prior", False), ("tokenizer of prior", True)]
    assert [model.name for model in open_models([runs.prior, runs.tokenizer])] == ["prior", "tokenizer"]


def test_the_command_writes_page_picture_and_figures(twostage, runs, tmp_path):
    out, file = tmp_path / "out", tmp_path / "figures.json"
    ended = twostage(
        "compare", runs.tokenizer, runs.prior, "--num-images", 3, "--out", out, "--json", file, "--guidance-scale", 2
    )
    assert ended.code == 0, ended.err
    page = (out / "compare.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 1
    document = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    assert document == json.loads(file.read_text(encoding="utf-8"))
    assert [model["name"] for model in document["models"]] == ["tokenizer", "prior"]
    for model, row in zip(document["models"], page.split("<tr>")[2:], strict=False):
        assert model["name"] in row
    assert f"{document['models'][0]['figures']['psnr']:.2f}" in ended.out
    with Image.open(out / "compare.png") as picture:
        assert picture.height > 3 * 80  # originals, reconstructions, new images


@pytest.fixture
def other_size(runs, tmp_path):
    """The tokenizer as one of 32x32 images."""
    model = Autoencoder.from_pretrained(runs.tokenizer)
    config = model.config.model_copy(update={"image_size": (32, 32)})
    Autoencoder(config).save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def test_models_of_different_images_are_refused(runs, other_size):
    with refuses(runs.tokenizer, "16x16 pixels and 3 channels", other_size, "32x32 pixels and 3 channels"):
        compare_models([runs.tokenizer, other_size])


def test_models_of_different_sources_need_one_that_is_named(runs, tmp_path):
    other = tmp_path / "other"
    (other / "model").mkdir(parents=True)
    for file in ("config.yaml", "model/config.json", "model/model.safetensors"):
        content = (runs.tokenizer / file).read_bytes()
        (other / file).write_bytes(content.replace(b"source: shapes", b"source: elsewhere"))
    with refuses(runs.tokenizer, "shapes", other, "elsewhere", "--data SOURCE"):
        compare_models([runs.tokenizer, other])


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ("no runs", "runs/NAME", "--tour")),
        (["--tour", "TOKENIZER"], ("tokenizer", "--tour", "Remove it")),
        (["--tour", "--minutes", "0"], ("--minutes 0", "above 0")),
        (["--tour", "--features", "x"], ("--features x", "--tour", "Remove it")),
        (["--tour", "--class-name", "star"], ("--class-name star", "--tour", "Remove it")),
        (["TOKENIZER", "--minutes", "2"], ("--minutes 2", "--tour", "Remove it")),
        (["TOKENIZER", "--temperature", "0.5"], ("temperature 0.5", "new images", "Remove it")),
        (["TOKENIZER", "--class-name", "star"], ("--class-name star", "classes", "Remove it")),
        (["PRIOR", "--class-name", "sta"], ("sta", "'star'")),
        (["PRIOR", "--num-steps", "4"], ("num_steps 4",)),
        (["nowhere/to/be/found"], ("nowhere/to/be/found",)),
    ],
)
def test_bad_input_is_a_sentence(twostage, runs, tmp_path, words, parts):
    places = {"TOKENIZER": str(runs.tokenizer), "PRIOR": str(runs.prior)}
    out = tmp_path / "out"
    ended = twostage("compare", *[places.get(word, word) for word in words], "--out", out)
    assert ended.code == 2
    assert_names(ended.err, *parts)
    assert not out.exists()
