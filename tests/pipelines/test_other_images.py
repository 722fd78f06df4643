"""Images of five channels and of 16 bits from end to end: inspect, train, reconstruct, encode, a prior, generate,
evaluate, compare. What is written loses nothing, and sheets show the chosen channels."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from messages import assert_names, refuses
from PIL import Image

from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.files.given_images import read_image
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.validation import psnr
from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images
from twostage.core.images.conversion import to_float, to_integers, to_shown

SIDE, COUNT = 16, 48


@dataclass
class Trained:
    """The models of one kind of images."""

    kind: str
    source: Path
    tokenizer: Path
    codes: Path
    prior: Path
    channels: int
    suffix: str


def draw_tiles(channels: int) -> np.ndarray:
    """Waves (n, H, W, C) uint16: each image has its own phase, and each channel its own frequency."""
    places = np.arange(SIDE) / SIDE
    waves = [
        np.sin(2 * np.pi * ((1 + channel) * places + number / COUNT))
        for number in range(COUNT) for channel in range(channels)
    ]  # fmt: skip
    levels = (np.array(waves).reshape(COUNT, channels, 1, SIDE) * 20_000 + 30_000).repeat(SIDE, 2)
    return levels.transpose(0, 2, 3, 1).astype(np.uint16)


@pytest.fixture(scope="module", params=["five channels", "16-bit grey"])
def trained(request, works, configs, tmp_path_factory) -> Trained:
    root, channels = tmp_path_factory.mktemp("other"), 5 if request.param == "five channels" else 1
    found = Trained(request.param, root / "images", root / "runs" / "tokenizer", root / "codes",
                    root / "runs" / "prior", channels, ".tif" if channels == 5 else ".png")  # fmt: skip
    found.source.mkdir()
    if channels == 5:
        np.savez(found.source / "tiles.npz", images=draw_tiles(5), labels=np.arange(COUNT) % 2)
    else:
        for number, image in enumerate(draw_tiles(1)):
            Image.fromarray(image[..., 0]).save(found.source / f"{number}.png")
    shown = ["data.shown_channels=[3,1,0]"] if channels == 5 else []
    data = [f"data.source={found.source}", "data.num_images=null", f"data.channels={channels}", *shown]
    works("train-tokenizer", configs / "tokenizer.yaml", f"run.dir={found.tokenizer}", *data)
    works("encode", found.tokenizer, "--out", found.codes)
    works("train-prior", configs / "prior.yaml", f"run.dir={found.prior}", f"codes={found.codes}",
          *([] if channels == 5 else ["condition=null"]))  # fmt: skip
    return found


@pytest.fixture(scope="module")
def pipeline(trained) -> TwoStagePipeline:
    return TwoStagePipeline.from_runs(trained.prior)


def test_the_model_knows_the_form_of_its_images(trained):
    config = Autoencoder.from_pretrained(trained.tokenizer).config
    assert (config.channels, config.bits) == (trained.channels, 16)
    assert config.shown_channels == ((3, 1, 0) if trained.channels == 5 else None)


def test_inspect_shows_the_chosen_channels(trained, works, tmp_path):
    shown = ["--shown-channels", "3,1,0"] if trained.channels == 5 else []
    said = works("inspect", trained.source, *shown, "--out", tmp_path / "sheet.png", "--json", tmp_path / "found.json")
    assert_names(said, f"data.channels={trained.channels}, 16 bits", "values: 16-bit, 1000")
    assert json.loads((tmp_path / "found.json").read_text())["bits"] == 16
    data = load_images(DataConfig(source=str(trained.source), channels=trained.channels, image_size=SIDE))
    first = to_shown(data.splits["train"].read(torch.tensor([0]))[0], [3, 1, 0] if shown else None)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).transpose(2, 0, 1)
    scale = round(88 / SIDE)
    assert np.array_equal(sheet[:, 4 : 4 + SIDE * scale : scale, 4 : 4 + SIDE * scale : scale][: len(first)], first)


def test_generated_images_lose_nothing(trained, pipeline, works, tmp_path):
    drawn = pipeline(6, seed=3, output_type="pt").images
    assert drawn.dtype == torch.uint16
    works("generate", trained.prior, "--num-images", 6, "--seed", 3, "--out", tmp_path / "out")
    files = sorted((tmp_path / "out" / "images").iterdir())
    assert [file.name for file in files] == [f"{i:06d}{trained.suffix}" for i in range(6)]
    data = load_images(DataConfig(source=str(tmp_path / "out" / "images"), channels=trained.channels, image_size=SIDE))
    for split in data.splits.values():
        rows = torch.arange(len(split))
        for name, image in zip(split.names(rows), split.read(rows), strict=True):
            assert torch.equal(image, drawn[int(Path(name).stem)])
    times = [file.stat().st_mtime_ns for file in files]
    files[2].write_bytes(files[2].read_bytes()[:-100])
    works("generate", trained.prior, "--num-images", 6, "--seed", 3, "--out", tmp_path / "out")
    assert [file.stat().st_mtime_ns == time for file, time in zip(files, times, strict=True)].count(False) == 1
    seen, _ = read_image(files[2], (SIDE, SIDE), trained.channels, bits=16)
    assert torch.equal(seen, drawn[2])


def test_generated_shards_lose_nothing(trained, pipeline, works, tmp_path):
    works("generate", trained.prior, "--num-images", 6, "--seed", 3, "--format", "parquet", "--out", tmp_path / "out")
    data = load_images(DataConfig(source=str(tmp_path / "out" / "images"), channels=trained.channels, image_size=SIDE))
    found = {
        image.numpy().tobytes() for split in data.splits.values() for image in split.read(torch.arange(len(split)))
    }
    assert found == {image.numpy().tobytes() for image in pipeline(6, seed=3, output_type="pt").images}


def test_pillow_has_images_of_some_forms_only(trained, pipeline):
    if trained.channels == 1:
        assert pipeline(1).images[0].mode == "I;16"
    else:
        with refuses("output_type 'pil'", "5 channels with 16 bits", "output_type='pt'"):
            pipeline(1)


def test_reconstructions_are_written_without_loss(trained, works, tmp_path):
    works("reconstruct", trained.tokenizer, "--out", tmp_path / "sheet.png", "--images-out", tmp_path / "out")
    assert (tmp_path / "sheet.png").is_file()
    files = sorted((tmp_path / "out").iterdir())
    assert {file.suffix for file in files} == {trained.suffix}
    said = works(
        "reconstruct", trained.tokenizer, "--image", files[0], "--image", tmp_path / "out", "--out", tmp_path / "b.png"
    )
    assert "converted" not in said
    assert "of its" not in said


def test_psnr_has_the_peak_of_the_images(trained):
    model = Autoencoder.from_pretrained(trained.tokenizer).eval()
    split = load_images(DataConfig(source=str(trained.source), channels=trained.channels, image_size=SIDE)).validation
    pixels = split.read(torch.arange(len(split)))
    with torch.no_grad():
        decoded = model.reconstruct(to_float(pixels))
    fine, rough = (
        psnr(to_integers(decoded, 16), pixels),
        psnr(to_integers(decoded, 8), to_integers(to_float(pixels), 8)),
    )
    torch.testing.assert_close(fine, rough, rtol=0.01, atol=0.05)
    exact = pixels.int().add(1).clamp(max=65535).to(torch.uint16)
    assert psnr(exact, pixels).min() > 96, "one level of 65,536"


def test_evaluate_measures_what_it_can(trained, works):
    said = works("evaluate", trained.tokenizer, "--num-images", 4)
    assert_names(said, "PSNR", "SSIM", *(["LPIPS"] if trained.channels == 5 else []))
    protocol = json.loads((trained.tokenizer / "evaluation" / "evaluation.json").read_text())["protocol"]
    assert_names(str(protocol), "peak 65535", "data range 65535", "rounded to 16 bits", "uint16")
    works("evaluate", trained.prior, "--num-images", 4)
    cost = json.loads((trained.prior / "evaluation" / "evaluation.json").read_text())["protocol"]["chain_rule"]
    assert cost["level_bits"] == pytest.approx(np.log2(65535 / 2))


def test_networks_for_three_channels_are_refused_for_five(trained, twostage):
    if trained.channels == 5:
        ended = twostage("evaluate", trained.tokenizer, "--features", "imagenet")
        assert ended.code == 2
        assert_names(
            ended.err, "--features imagenet", "1, 3 or 4 channels", "have 5", "twostage train-features", "--channels 5"
        )


def test_compare_shows_them(trained, works, runs, twostage, tmp_path):
    said = works("compare", trained.prior, "--num-images", 3, "--out", tmp_path / "out")
    assert "PSNR" in said
    shown = np.asarray(Image.open(tmp_path / "out" / "compare.png").convert("RGB")).astype(int)
    colourful = np.ptp(shown, axis=2).max() > 100
    assert colourful == (trained.channels == 5)
    ended = twostage("compare", trained.tokenizer, runs.tokenizer, "--out", tmp_path / "both")
    assert_names(ended.err, f"{trained.channels} channel", "of 16 bits", "3 channels", "Compare models with the same")


def test_inpainted_pixels_stay_as_they_were(trained, pipeline):
    split = load_images(DataConfig(source=str(trained.source), channels=trained.channels, image_size=SIDE)).validation
    image = split.read(torch.tensor([0]))[0]
    mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    mask[SIDE // 2 :] = True
    images = pipeline.inpaint(image, mask, 2, class_name="0" if trained.channels == 5 else None).images
    assert torch.equal(images[:, :, : SIDE // 2], image[None, :, : SIDE // 2].expand(2, -1, -1, -1))
    with refuses("image: expected uint16"):
        pipeline.inpaint(to_integers(to_float(image), 8), mask)


def test_a_resumed_run_may_show_other_channels(trained, works, configs, tmp_path):
    if trained.channels != 5:
        return
    run = tmp_path / "run"
    shutil.copytree(trained.tokenizer, run)
    data = [f"data.source={trained.source}", "data.num_images=null", "data.channels=5", "train.max_steps=42"]
    works("train-tokenizer", configs / "tokenizer.yaml", f"run.dir={run}", *data, "data.shown_channels=[4]")
    assert Autoencoder.from_pretrained(run).config.shown_channels == (4,)
    assert Autoencoder.from_pretrained(run).config.bits == 16


def test_a_model_of_8_bits_reads_deep_files_as_before(trained, works, configs, tmp_path):
    """A model whose config says nothing about bits, as of an earlier version."""
    shown = load_images(DataConfig(source=str(trained.source), channels=trained.channels, image_size=SIDE, bits=8))
    assert shown.validation.read(torch.tensor([0])).dtype == torch.uint8
    run = tmp_path / "run"
    data = [f"data.source={trained.source}", "data.num_images=null", f"data.channels={trained.channels}", "data.bits=8"]
    works("train-tokenizer", configs / "tokenizer.yaml", f"run.dir={run}", *data, "train.max_steps=1")
    assert "bits" not in json.loads((run / "model" / "config.json").read_text())
    assert "PSNR" in works("reconstruct", run, "--out", tmp_path / "sheet.png", "--images-out", tmp_path / "out")
    works("encode", run, "--out", tmp_path / "codes")
