"""The handlers of the page, without a browser; and what `twostage app` reports if it cannot start."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from messages import assert_names, refuses
from PIL import Image

from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.files.masks import brushed_mask
from pipelines.page.app_handlers import (
    ALL_CLASSES,
    BRUSHED,
    NO_CLASS,
    Handlers,
    PageImage,
    draw_codes,
    enlarge,
)
from pipelines.page.painted_maps import LABEL_COLOURS, painted_labels
from stage2_prior.networks.masked_transformer import MaskedTransformerConfig
from stage2_prior.prior import Prior
from twostage.core.conditions.map_condition import MapConditionConfig
from twostage.core.errors import InputError
from twostage.core.images.conversion import to_pil
from twostage.core.machine.installation import pip_install


@pytest.fixture
def handlers(pipeline) -> Handlers:
    return Handlers(pipeline)


@pytest.fixture
def masked(pipeline) -> Handlers:
    """The handlers for a masked transformer, untrained but not uniform."""
    torch.manual_seed(0)
    model = MaskedTransformerConfig(hidden_size=32, depth=2, num_heads=2, dropout=0.0)
    prior = Prior(pipeline.prior.config.model_copy(update={"model": model}))
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Handlers(TwoStagePipeline(pipeline.tokenizer, prior))


@pytest.fixture
def page_image(pipeline) -> PageImage:
    return PageImage(pipeline(num_images=1, output_type="pt").images[0], pipeline.class_names[0])


def silent(share: float) -> None:
    assert 0 <= share <= 1


def brushed(height: int, width: int, rows: slice, columns: slice) -> np.ndarray:
    layer = np.zeros((height, width, 4), np.uint8)
    layer[rows, columns] = (225, 29, 72, 255)
    return layer


def test_generates_what_the_pipeline_does(handlers, pipeline):
    shares: list[float] = []
    sampling = {"temperature": 0.9, "top_k": None, "guidance_scale": 2.0}
    generated = handlers.generate(10, ALL_CLASSES, 3, sampling, shares.append)
    expected = pipeline(10, seed=3, temperature=0.9, guidance_scale=2.0, output_type="pt").images
    assert torch.equal(torch.stack([p.pixels for p in generated]), expected)
    assert [p.class_name for p in generated] == [*pipeline.class_names, *pipeline.class_names[:2]]
    assert shares[-1] == pytest.approx(1)
    assert {p.class_name for p in handlers.generate(3, "star", 0, {}, silent)} == {"star"}


@pytest.mark.parametrize(
    ("class_name", "seed", "sentence"),
    [
        ("strar", 0, "class name 'strar': not a class of this model; did you mean 'star'?"),
        (ALL_CLASSES, None, "seed None: expected a whole number, at least 0"),
        (ALL_CLASSES, -1, "seed -1: expected a whole number, at least 0"),
    ],
)
def test_bad_generate_input_is_refused(handlers, class_name, seed, sentence):
    with pytest.raises(InputError) as raised:
        handlers.generate(1, class_name, seed, {}, silent)
    assert sentence in str(raised.value)


def test_bad_uploads_are_refused(handlers, tmp_path):
    Image.new("L", (8000, 6250)).save(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("no image")
    for name, sentence in {
        "large.png": "large.png: has 8000 x 6250 pixels, expected at most 25 million. Make it smaller",
        "text.png": "text.png: not a readable image; expected PNG, JPEG, WebP, AVIF, GIF, TIFF or BMP",
    }.items():
        with pytest.raises(InputError) as raised:
            handlers.read(str(tmp_path / name))
        assert str(raised.value) == sentence, "without the server's folder"
    Image.new("L", (30, 40), 200).save(tmp_path / "grey.png")
    page_image = handlers.read(str(tmp_path / "grey.png"))
    assert (page_image.pixels.shape, page_image.class_name) == ((3, 16, 16), None)
    assert (
        page_image.note == "grey.png: 30x40 cropped at its centre and resized to 16x16 pixels; mode L converted to RGB."
    )


def test_reconstructs_with_the_codes(handlers, pipeline, page_image):
    pixels, codes, quality = handlers.reconstruct(page_image)
    assert torch.equal(pixels, pipeline.reconstruct(page_image.pixels[None])[0])
    assert torch.equal(pipeline.decode(codes[None])[0], pixels), "the codes are those of the reconstruction"
    assert quality.startswith("PSNR of the reconstruction: ")


def test_a_variational_autoencoder_has_no_codes_to_show(variational):
    handlers = Handlers(TwoStagePipeline.from_pretrained(variational("gaussian")))
    (page_image,) = handlers.generate(1, None, 0, {"temperature": 0.5}, silent)
    assert page_image.class_name is None
    assert handlers.reconstruct(page_image)[1] is None
    assert len(handlers.interpolate(page_image, page_image, 3)) == 3


def test_any_brushed_pixel_masks_its_pixel():
    touched = brushed(368, 368, slice(45, 47), slice(100, 101))  # 23 shown pixels a pixel: rows 1 and 2, column 4
    mask = brushed_mask([touched, brushed(368, 368, slice(367, 368), slice(367, 368))], (16, 16))
    assert mask.nonzero().tolist() == [[1, 4], [2, 4], [15, 15]]
    assert not brushed_mask([], (16, 16)).any()


def test_only_the_brushed_part_is_inpainted(masked, page_image):
    layers = [brushed(384, 384, slice(0, 100), slice(0, 384))]  # rows 0 to 4 of 16, so codes 0 and 1 of 4
    options = {"guidance_scale": 2.0, "num_steps": 2}
    images = masked.inpaint(page_image, layers, BRUSHED, 6, "star", 0, 0, options, silent)
    assert torch.equal(images[:, :, 5:], page_image.pixels[:, 5:].expand(6, -1, -1, -1))
    assert len({image.numpy().tobytes() for image in images}) > 1
    free = masked.inpaint(page_image, layers, BRUSHED, 6, NO_CLASS, 0, 0, options, silent)
    assert not torch.equal(free, images), "without a class, and so without guidance"
    halves = masked.inpaint(page_image, [], "right", 6, "star", 0, 0, options, silent)
    assert torch.equal(halves[..., :8], page_image.pixels[..., :8].expand(6, -1, -1, -1))


def test_bad_inpaint_input_is_refused(handlers, page_image):
    def inpaint(page_image: PageImage | None, layers: list[np.ndarray], part: str = BRUSHED) -> torch.Tensor:
        return handlers.inpaint(page_image, layers, part, 2, NO_CLASS, 0, 0, {}, silent)

    with refuses("no image", "upload"):
        inpaint(None, [])
    with refuses("nothing is brushed"):
        inpaint(page_image, [])
    with refuses("this prior is a causal_transformer", "(bottom)"):
        inpaint(page_image, [brushed(16, 16, slice(0, 4), slice(0, 4))])
    assert inpaint(page_image, [], "bottom").shape == (2, 3, 16, 16)


def test_a_painted_map_is_a_label_map():
    ground = np.arange(256, dtype=np.uint8).reshape(16, 16) // 90
    layer = np.zeros((384, 384, 4), np.uint8)
    layer[24:72, 0:48] = (*LABEL_COLOURS[5], 255)  # rows 1 and 2, columns 0 and 1
    layer[24:72, 24:37] = (*np.add(LABEL_COLOURS[2], 3), 255)  # more than half of column 1, nearly in that colour
    layer[200:210, 200:210] = (*LABEL_COLOURS[5], 255)  # less than half of a pixel
    layer[300:, 300:] = (*LABEL_COLOURS[5], 100)  # too faint
    expected = ground.copy()
    expected[1:3, :2] = [5, 2]
    assert np.array_equal(painted_labels(ground, [layer], [0, 2, 5]), expected)
    assert np.array_equal(painted_labels(ground, [], [0]), ground)
    assert len(set(LABEL_COLOURS)) == 256


def test_images_follow_a_map(masked, tmp_path):
    config = masked.pipeline.prior.config
    form = MapConditionConfig(labels=(1, 2), names=("ground", "sky"), size=(16, 16), depth=1, dropout=0)
    prior = Prior(config.model_copy(update={"conditions": [*config.conditions, form]}))
    handlers = Handlers(TwoStagePipeline(masked.pipeline.tokenizer, prior))
    canvas = handlers.canvas
    assert canvas
    assert canvas.names == ["1 sky", "2"], "a label without a name shows its number"
    with refuses("no map", "upload or paint"):
        handlers.generate(1, ALL_CLASSES, 0, {}, silent)
    assert canvas.painted(None, None, [np.zeros((9, 9, 4), np.uint8)]) is None
    layer = np.zeros((32, 32, 4), np.uint8)
    layer[:16] = (*LABEL_COLOURS[2], 255)
    label_map = canvas.painted(None, None, [layer])
    assert label_map is not None
    assert (label_map[:8] == 2).all()
    assert (label_map[8:] == 1).all(), "the smallest label is below"
    shown = np.full((32, 32, 4), 200, np.uint8)
    on_upload = canvas.painted(np.full((16, 16), 2, np.uint8), shown, [])
    assert on_upload is not None
    assert (on_upload == 2).all()
    for cleared in (None, np.full_like(shown, 255)):
        assert canvas.painted(np.full((16, 16), 2, np.uint8), cleared, []) is None
    assert canvas.draw(label_map)[:, 0, 0].tolist() == [*LABEL_COLOURS[2]]
    drawn = handlers.generate(2, "star", 0, {}, silent, map_given=label_map)
    expected = handlers.pipeline(2, ["star"], maps=[label_map], output_type="pt").images
    assert torch.equal(torch.stack([image.pixels for image in drawn]), expected)
    for name, image, parts in (
        ("size.png", Image.new("L", (9, 16), 1), ("map: expected 16x16 labels", "(16, 9)", "Resize")),
        ("label.png", Image.new("L", (16, 16), 7), ("the label 7 never occurs", "Use 1, 2")),
        ("colour.png", Image.new("RGB", (16, 16), (1, 2, 3)), ("colour.png: not a label map", "Give a PNG")),
    ):
        image.save(tmp_path / name)
        with refuses(*parts) as refused:
            canvas.read(str(tmp_path / name))
        assert str(tmp_path) not in str(refused.value)


def test_maps_that_are_images_are_painted_too(masked, tmp_path):
    config = masked.pipeline.prior.config
    form = MapConditionConfig(channels=1, size=(16, 16), depth=1)
    prior = Prior(config.model_copy(update={"conditions": [*config.conditions, form]}))
    handlers = Handlers(TwoStagePipeline(masked.pipeline.tokenizer, prior))
    canvas = handlers.canvas
    assert canvas
    assert canvas.labels == []
    Image.new("RGB", (16, 16), (90, 90, 90)).save(tmp_path / "grey.png")
    found = canvas.read(str(tmp_path / "grey.png"))
    layer = np.zeros((32, 32, 4), np.uint8)
    layer[:16] = (30, 0, 0, 255)
    layer[31, :, 3] = 255  # half of the last row
    painted = canvas.painted(found, np.full((32, 32, 4), 90, np.uint8), [layer])
    assert painted is not None
    assert painted[0, :, 3].tolist() == [10] * 8 + [90] * 7 + [45]
    assert len(handlers.generate(2, "star", 0, {}, silent, map_given=painted)) == 2
    on_white = canvas.painted(None, None, [layer])
    assert on_white is not None
    assert on_white[0, 10, 0] == 255
    with refuses("1 channel", "16x16"):
        handlers.generate(1, "star", 0, {}, silent, map_given=painted[:, :9])


def test_interpolates_between_two(handlers, page_image):
    images = handlers.interpolate(page_image, PageImage(255 - page_image.pixels), 5)
    assert images.shape == (5, 3, 16, 16)
    assert torch.equal(images[0], handlers.reconstruct(page_image)[0])
    with refuses("two images are needed"):
        handlers.interpolate(page_image, None, 5)


def test_small_images_are_enlarged_with_square_pixels(page_image):
    shown = enlarge(page_image.pixels)
    assert shown.size == (384, 384)
    assert np.array_equal(np.asarray(shown)[::24, ::24], np.asarray(to_pil(page_image.pixels)))
    assert enlarge(torch.zeros(1, 400, 200, dtype=torch.uint8)).size == (200, 400)


def test_each_code_has_its_colour():
    drawn = np.asarray(draw_codes(torch.tensor([[0, 1, 0], [511, 2, 1]]), 512))
    assert drawn.shape == (256, 384, 3)
    colours = drawn[4::128, 4::128]  # in the cells' corners, where no number is
    assert np.array_equal(colours[0, 0], colours[0, 2])
    assert np.array_equal(colours[0, 1], colours[1, 2])
    assert len(np.unique(colours.reshape(-1, 3), axis=0)) == 4
    assert (drawn[:128, :128].min(axis=(0, 1)) < colours[0, 0]).all(), "with its number"
    many = np.asarray(draw_codes(torch.arange(4096).view(64, 64), 4096))
    assert (many[:6, :6] == many[0, 0]).all(), "no number where it cannot be read"


# --- starting ------------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken(twostage, runs):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ended = twostage("app", runs.prior, "--port", port)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert_names(ended.err, f"--host 127.0.0.1, --port {port}", "Address already in use")


def test_gradio_is_not_installed(twostage, runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    ended = twostage("app", runs.prior)
    assert ended.code == 2
    assert_names(ended.err, "gradio", pip_install("app"))


def test_a_model_that_makes_no_images(twostage, runs):
    ended = twostage("app", runs.tokenizer, "--port", 7861)
    assert ended.code == 2
    assert_names(ended.err, "makes no images by itself", "twostage train-prior")


LABELS = """
import json, sys
from pipelines.page.app_page import build_page
from pipelines.drawing.two_stage import TwoStagePipeline
for model in sys.argv[1:]:
    blocks = build_page(TwoStagePipeline.from_pretrained(model), "a model").blocks.values()
    print(json.dumps([[type(b).__name__, getattr(b, "label", None), getattr(b, "visible", True)] for b in blocks]))
"""


def test_the_page_has_the_controls_that_apply_to_the_model(runs, masked, variational, tmp_path):
    """In its own process: importing Gradio leaves open sockets to the garbage collector, which warns about them."""
    masked.pipeline.save_pretrained(tmp_path / "masked")
    vaes = variational("gaussian"), variational("conditional")
    words = [sys.executable, "-c", LABELS, runs.prior, tmp_path / "masked", *vaes]
    root = Path(__file__).parents[2]
    shown = subprocess.run(words, capture_output=True, text=True, check=True, cwd=root).stdout
    pages = [
        {label for kind, label, visible in json.loads(line) if visible} for line in shown.splitlines() if line[0] == "["
    ]
    causal, parallel, continuous, conditional = pages
    assert {"Generate", "Reconstruct", "Inpaint", "Interpolate", "Class", "Guidance scale", "Top-k", "Top-p"} <= causal
    assert parallel - causal == {"Steps"}
    assert causal - parallel == set()
    assert {"Generate", "Reconstruct", "Interpolate", "Temperature", "Seed"} <= continuous
    assert not {"Inpaint", "Class", "Guidance scale", "Top-k", "Top-p", "Steps"} & continuous
    assert {"Generate", "Class"} <= conditional
    assert not {"Reconstruct", "Interpolate"} & conditional, "an uploaded image has no class"
