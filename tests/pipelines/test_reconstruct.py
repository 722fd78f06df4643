"""Originals above reconstructions, and the PSNR of the images shown."""

import numpy as np
import pytest
import torch
from messages import assert_names
from PIL import Image

from pipelines.drawing.tokenizer_sheets import draw_reconstructions
from pipelines.saved.saved_model import SavedModel
from stage1_tokenizer.autoencoder import Autoencoder
from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images
from twostage.core.data.spread import spread_over_classes
from twostage.core.images.conversion import to_float


def test_psnr_is_that_of_the_images_shown(runs, tmp_path):
    found = draw_reconstructions(SavedModel.find(runs.tokenizer), tmp_path / "images.png", num_images=5)
    split = load_images(DataConfig(image_size=16, num_images=320)).validation
    originals = split.read(spread_over_classes(split.labels, len(split), 5))
    model = Autoencoder.from_pretrained(runs.tokenizer)
    decoded = model.decode_indices(model.encode(to_float(originals)).indices).double().numpy()
    pixels = np.clip(np.round((decoded + 1) * 127.5), 0, 255)
    error = ((originals.numpy() - pixels) ** 2).reshape(5, -1).mean(1)
    assert found == pytest.approx((10 * np.log10(255**2 / error)).mean(), rel=1e-3)
    tile = np.asarray(Image.open(tmp_path / "images.png"))[4:100, -100:-4]  # the last original
    assert np.array_equal(tile, originals[4].permute(1, 2, 0).numpy().repeat(6, 0).repeat(6, 1))


@pytest.mark.parametrize(("num_images", "columns", "rows"), [(3, 3, 2), (12, 12, 2), (14, 12, 4)])
def test_the_command_writes_a_sheet(runs, twostage, tmp_path, num_images, columns, rows):
    out = tmp_path / "images.png"
    ended = twostage("reconstruct", runs.tokenizer, "--num-images", num_images, "--out", out)
    assert ended.code == 0, ended.err
    assert ended.out.startswith(f"{out}: PSNR ")
    with Image.open(out) as sheet:
        assert sheet.height == rows * (6 * 16 + 4) + 4
        assert columns * 100 < sheet.width < (columns + 1) * 100 + 50


def test_the_sheet_goes_beside_the_model(runs, twostage, changed_tokenizer):
    run = changed_tokenizer("decoder")
    assert twostage("reconstruct", run).code == 0
    assert (run / "reconstructions.png").is_file()


def test_images_of_another_source(runs, twostage, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(4):
        Image.new("L", (30, 20), 60 * i).save(folder / f"{i}.png")
    ended = twostage("reconstruct", runs.tokenizer, "--data", folder, "--out", tmp_path / "out.png")
    assert ended.code == 0, ended.err
    assert (tmp_path / "out.png").is_file()


def test_own_images_are_converted_and_shown(runs, pipeline, twostage, tmp_path, monkeypatch):
    """With a prior's run and with a pipeline folder, whose sheet goes into the current folder."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "own.png")
    Image.fromarray(pixels).resize((40, 30)).convert("L").save(tmp_path / "other.png")
    pipeline.save_pretrained(tmp_path / "pipeline")
    monkeypatch.chdir(tmp_path)
    for model, words in [(runs.prior, ("--out", "reconstructions.png")), (tmp_path / "pipeline", ())]:
        ended = twostage("reconstruct", model, "--image", "own.png", "--image", "other.png", *words)
        assert ended.code == 0, ended.err
        said = "other.png: 40x30 cropped at its centre and resized to 16x16 pixels; mode L converted to RGB\n"
        assert ended.out.startswith(f"{said}reconstructions.png: PSNR ")
        with Image.open("reconstructions.png") as sheet:
            shown = np.asarray(sheet)[:, -204:]  # two columns
        assert np.array_equal(shown[4:100:6, 4:100:6], pixels)
        found = pipeline.reconstruct(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]
        assert np.array_equal(shown[104:200:6, 4:100:6], found.permute(1, 2, 0))
        (tmp_path / "reconstructions.png").unlink()


def test_a_pipeline_folder_has_no_held_out_images(pipeline, twostage, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline")
    ended = twostage("reconstruct", tmp_path / "pipeline", "--out", tmp_path / "out.png")
    assert ended.code == 2
    assert_names(ended.err, tmp_path / "pipeline", "--image FILE", "--data SOURCE")
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.new("L", (30, 20), 60 * i).save(tmp_path / "images" / f"{i}.png")
    words = ("--data", tmp_path / "images", "--out", tmp_path / "out.png")
    ended = twostage("reconstruct", tmp_path / "pipeline", *words)
    assert ended.code == 0, ended.err


def test_a_priors_run_shows_the_held_out_images_of_its_tokenizer(runs, tmp_path):
    assert draw_reconstructions(SavedModel.find(runs.prior), tmp_path / "a.png") == draw_reconstructions(
        SavedModel.find(runs.tokenizer), tmp_path / "b.png"
    )
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_given_images_are_not_overwritten(runs, twostage, tmp_path):
    image = tmp_path / "mine.png"
    Image.new("RGB", (16, 16)).save(image)
    before = image.read_bytes()
    ended = twostage("reconstruct", runs.tokenizer, "--image", image, "--out", image)
    assert (ended.code, image.read_bytes()) == (2, before)
    assert "is one of the images given with --image" in ended.err
    ended = twostage("interpolate", runs.tokenizer, "--out", tmp_path)
    assert ended.code == 2
    assert_names(ended.err, f"--out {tmp_path}: is a folder", "images.png")


def save_images(folder, count: int) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    folder.mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number}.png")
    return pixels


def test_the_images_of_a_folder(runs, twostage, tmp_path):
    pixels = save_images(tmp_path / "mine", 12)
    (tmp_path / "mine" / "2.png").write_bytes(b"damaged")
    out = tmp_path / "out.png"
    ended = twostage("reconstruct", runs.tokenizer, "--image", tmp_path / "mine", "--num-images", 10, "--out", out)
    assert ended.code == 0, ended.err
    assert f"skipped: {tmp_path / 'mine' / '2.png'}: not a readable image" in ended.out
    assert "the first 10 of 12 images; --num-images shows more" in ended.out
    shown = np.asarray(Image.open(out))
    left = shown.shape[1] - 10 * 100 - 4
    for column, number in enumerate([0, 1, *range(3, 11)]):
        tile = shown[4:100, left + 4 + 100 * column :][:, :96]
        assert np.array_equal(tile[::6, ::6], pixels[number])
    ended = twostage("reconstruct", runs.tokenizer, "--image", tmp_path / "mine", "--out", tmp_path / "mine" / "0.png")
    assert (ended.code, "is one of the images given with --image" in ended.err) == (2, True)


@pytest.mark.parametrize("verb", ["inpaint", "outpaint"])
def test_verbs_of_one_image_refuse_a_folder(runs, twostage, tmp_path, verb):
    save_images(tmp_path / "mine", 2)
    words = [tmp_path / "mine"] if verb == "outpaint" else [tmp_path / "mine", "lower half"]
    ended = twostage(verb, runs.prior, *words, "--out", tmp_path / "out")
    assert ended.code == 2
    assert f"error: {tmp_path / 'mine'}: is a folder; expected one image" in ended.err


def test_a_sorted_folder_is_shown_over_all_its_classes(runs, twostage, tmp_path):
    """Even if the first rows of the held-out split all belong to one class."""
    colours = {"a": (250, 0, 0), "b": (0, 250, 0), "c": (0, 0, 250)}
    for split, count in {"train": 4, "test": 40}.items():
        for name, colour in colours.items():
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (16, 16), colour).save(tmp_path / "data" / split / name / f"{number:02d}.png")
    out = tmp_path / "out.png"
    ended = twostage("reconstruct", runs.tokenizer, "--data", tmp_path / "data", "--out", out)
    assert ended.code == 0, ended.err
    shown = np.asarray(Image.open(out))
    left = shown.shape[1] - 12 * 100 - 4
    found = [tuple(shown[50, left + 50 + 100 * column].tolist()) for column in range(12)]
    assert found == [*colours.values()] * 4
    ended = twostage("inspect", tmp_path / "data", "--out", tmp_path / "sheet.png")
    assert ended.code == 0, ended.err
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert {tuple(pixel) for pixel in sheet[50, 50::100].tolist()} >= set(colours.values())
