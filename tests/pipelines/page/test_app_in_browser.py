"""The page clicked through in a real browser: `twostage app` as its own process, Chromium as a person would use it.

One page for all tests, as for a person: what went wrong before must not break what comes after.
"""

import functools
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.files.given_images import read_image
from stage2_prior.networks.masked_transformer import MaskedTransformerConfig
from stage2_prior.prior import Prior
from twostage.core.conditions.map_condition import MapConditionConfig
from twostage.core.images.conversion import to_float, to_pil

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
ASK_ELSEWHERE = """() => new Promise(done => {
    document.addEventListener("securitypolicyviolation", refused => done(refused.effectiveDirective));
    fetch("http://localhost:1/").catch(() => {});
})"""
MINUTES = 3
"""A timeout for busy machines; idle machines are much faster."""


@dataclass
class Server:
    """A running `twostage app`."""

    process: subprocess.Popen
    address: str
    proxy: socket.socket
    """The proxy in its environment; a connection to it would wait here."""
    folder: Path
    """Where it keeps its temporary files."""


@pytest.fixture(scope="module")
def masked(pipeline) -> TwoStagePipeline:
    """With an untrained masked transformer, which can redraw any part, by class and label map."""
    torch.manual_seed(0)
    model = MaskedTransformerConfig(hidden_size=32, depth=2, num_heads=2, dropout=0.0)
    maps = MapConditionConfig(labels=(0, 1, 2), names=("ground", "circle"), size=(16, 16), depth=1)
    conditions = [*pipeline.prior.config.conditions, maps]
    prior = Prior(pipeline.prior.config.model_copy(update={"model": model, "conditions": conditions}))
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return TwoStagePipeline(pipeline.tokenizer, prior)


@pytest.fixture(scope="module")
def server(masked, tmp_path_factory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("app")
    masked.save_pretrained(root / "pipeline")
    (root / "temporary").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        outside = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        names = ("http_proxy", "https_proxy", "all_proxy")
        environment = {k: v for k, v in os.environ.items() if k.lower() not in (*names, "no_proxy")}
        environment |= dict.fromkeys(names, outside) | {"TMPDIR": str(root / "temporary"), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-m", "pipelines.app", str(root / "pipeline"), "--port", str(port)]
        with (
            (root / "log").open("w") as log,
            subprocess.Popen(
                words, cwd=Path(__file__).parents[3], env=environment, stdout=subprocess.PIPE, stderr=log, text=True
            ) as process,
        ):
            try:
                assert process.stdout
                line = process.stdout.readline()  # empty where it ended without saying where it is
                assert line == f"http://127.0.0.1:{port}/ shows {root / 'pipeline'}; press Ctrl-C to stop\n", (
                    line + (root / "log").read_text()
                )
                yield Server(process, f"http://127.0.0.1:{port}/", proxy, root / "temporary")
            finally:
                process.kill()


@pytest.fixture(scope="module")
def asked() -> list[str]:
    """All addresses that the page requested."""
    return []


@pytest.fixture(scope="module")
def page(server, asked):
    """A page of Chromium."""
    if BROWSER is None:
        reason = "no chromium, chromium-browser or google-chrome on the PATH; install one to test the page"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS, timeout=MINUTES * 60_000)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(MINUTES * 60_000)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(server.address)
        page.get_by_role("button", name="Generate", exact=True).wait_for()
        yield page
        browser.close()


def tab(page, name: str):
    """Opens a tab and returns its panel."""
    page.get_by_role("tab", name=name).click()
    panel = page.get_by_role("tabpanel").filter(visible=True)
    panel.wait_for()
    return panel


def gallery(panel, count: int, unlike: list[str] | None = None) -> tuple[list[str], np.ndarray]:
    """The addresses and the pixels of the ``count`` images of a gallery, once they have changed."""
    thumbnails = panel.locator(".grid-wrap img")
    deadline = time.monotonic() + MINUTES * 60
    while True:
        addresses = thumbnails.evaluate_all("images => images.map(image => image.src)")
        if len(addresses) == count and addresses != unlike:
            return addresses, np.stack([fetched(address) for address in addresses])
        assert time.monotonic() < deadline, f"expected {count} images, found {len(addresses)}"
        panel.page.wait_for_timeout(100)


@functools.lru_cache
def fetched(address: str) -> np.ndarray:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address) as answer:
        return np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB"))


def said(page, words: str) -> str:
    """The text of the message on the page with these words; closes it."""
    message = page.get_by_test_id("toast-body").filter(has_text=words)
    message.wait_for()
    text = message.inner_text()
    message.get_by_test_id("toast-close").click()
    message.wait_for(state="hidden")
    return text


def as_array(images: torch.Tensor) -> np.ndarray:
    """(n, C, H, W) -> (n, H, W, C)."""
    return images.permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def star(masked, tmp_path_factory) -> Path:
    """An image to upload, larger than the model's and not square."""
    file = tmp_path_factory.mktemp("uploads") / "star.png"
    to_pil(masked(1, ["star"], seed=5, output_type="pt").images[0]).resize((60, 40)).save(file)
    return file


def test_generate(page, masked):
    panel = tab(page, "Generate")
    panel.get_by_role("button", name="Generate", exact=True).click()
    first, pixels = gallery(panel, 16)
    assert np.array_equal(pixels, as_array(masked(16, seed=0, output_type="pt").images))
    panel.get_by_label("Seed").fill("7")
    panel.get_by_role("button", name="Sampling").click()  # the settings are the same when they are in sight
    panel.get_by_text("Guidance scale").wait_for()
    panel.get_by_role("button", name="Generate", exact=True).click()
    _, pixels = gallery(panel, 16, unlike=first)
    assert np.array_equal(pixels, as_array(masked(16, seed=7, output_type="pt").images))


def test_an_unknown_class_shows_a_message(page, masked):
    panel = tab(page, "Generate")
    before, _ = gallery(panel, 16)
    field = panel.get_by_label("Class", exact=True)
    field.fill("strar")
    field.press("Enter")
    panel.get_by_role("button", name="Generate", exact=True).click()
    assert "class name 'strar': not a class of this model; did you mean 'star'?" in said(page, "strar")
    field.fill("star")
    field.press("Enter")
    panel.get_by_role("button", name="Generate", exact=True).click()
    _, pixels = gallery(panel, 16, unlike=before)
    assert np.array_equal(pixels, as_array(masked(16, ["star"], seed=7, output_type="pt").images))


def test_label_maps_are_uploaded_and_painted(page, masked, tmp_path):
    def drawn(label_map: np.ndarray) -> np.ndarray:
        return as_array(masked(16, ["star"], seed=7, maps=[label_map], output_type="pt").images)

    panel = tab(page, "Generate")
    before, _ = gallery(panel, 16)
    upload = panel.locator("input[type=file]").first
    Image.new("L", (9, 16)).save(tmp_path / "narrow.png")
    upload.set_input_files(tmp_path / "narrow.png")
    assert "expected 16x16 labels" in said(page, "map: expected")
    label_map = np.arange(256, dtype=np.uint8).reshape(16, 16) // 90
    Image.fromarray(label_map).save(tmp_path / "map.png")
    upload.set_input_files(tmp_path / "map.png")
    panel.get_by_text("Loaded map.png").wait_for()
    panel.get_by_role("button", name="Generate", exact=True).click()
    uploaded, pixels = gallery(panel, 16, unlike=before)
    assert np.array_equal(pixels, drawn(label_map))
    page.evaluate("scrollTo(0, 0)")
    box = panel.locator("canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 200, y)  # 28 pixels of 384 to each side: rows 7 and 8 of 16, and little of the next ones
    page.mouse.down()
    page.mouse.move(x + 200, y, steps=8)
    page.mouse.up()
    page.wait_for_timeout(500)  # the editor does not show when it has drawn the last stroke
    panel.get_by_role("button", name="Generate", exact=True).click()
    _, pixels = gallery(panel, 16, unlike=uploaded)
    label_map[7:9] = 2
    assert np.array_equal(pixels, drawn(label_map))
    for name in ("0 ground", "1 circle", "2"):  # a class without a name shows its number
        panel.get_by_role("radio", name=name, exact=True).wait_for(state="attached")


def test_bad_uploads_show_a_message_and_good_ones_are_reconstructed(page, masked, star, tmp_path):
    panel = tab(page, "Reconstruct")
    upload = panel.locator("input[type=file]").first
    Image.new("L", (8000, 6250)).save(tmp_path / "fifty_megapixels.png")
    upload.set_input_files(tmp_path / "fifty_megapixels.png")
    assert "has 8000 x 6250 pixels, expected at most 25 million. Make it smaller" in said(page, "fifty_megapixels.png:")
    (tmp_path / "text.png").write_text("no image")
    upload.set_input_files(tmp_path / "text.png")
    assert "not a readable image; expected PNG, JPEG, WebP, AVIF, GIF, TIFF or BMP" in said(page, "text.png:")
    upload.set_input_files(star)
    panel.get_by_text("star.png: 60x40 cropped at its centre and resized to 16x16 pixels").wait_for()
    panel.get_by_text("PSNR of the reconstruction").wait_for()
    shown = panel.locator(".shown img")
    assert shown.count() == 3
    upload.set_input_files(tmp_path / "text.png")
    said(page, "text.png:")
    assert shown.count() == 3, "a bad upload replaces nothing"
    given, back, codes = (fetched(image.get_attribute("src")) for image in shown.all())
    pixels, _ = read_image(star, (16, 16), 3)
    assert np.array_equal(given[::24, ::24], as_array(pixels[None])[0])
    assert np.array_equal(back[::24, ::24], as_array(masked.reconstruct(pixels[None]))[0])
    indices = masked.tokenizer.encode(to_float(pixels[None])).indices[0]
    cells = codes[4::96, 4::96].reshape(-1, 3).tolist()
    assert len({tuple(cell) for cell in cells}) == len(indices.unique()), "one colour a code"


def test_interpolate(page, masked, star):
    taken, _ = gallery(tab(page, "Generate"), 16)
    panel = tab(page, "Interpolate")
    panel.get_by_role("button", name="Interpolate", exact=True).click()
    assert "two images are needed" in said(page, "two images are needed")
    panel.locator("input[type=file]").first.set_input_files(star)
    panel.get_by_text("star.png: 60x40 cropped").wait_for()
    panel.get_by_role("button", name="Use a generated image").nth(1).click()
    panel.locator(".shown img").nth(1).wait_for()
    panel.get_by_role("button", name="Interpolate", exact=True).click()
    _, pixels = gallery(panel, 9)
    second = torch.from_numpy(fetched(taken[1]).copy()).permute(2, 0, 1)
    expected = masked.interpolate(read_image(star, (16, 16), 3)[0], second, 9)
    assert np.array_equal(pixels, as_array(expected))


def test_brush_and_inpaint(page, masked, star):
    panel = tab(page, "Inpaint")
    panel.locator("input[type=file]").first.set_input_files(star)
    panel.get_by_text("star.png: 60x40 cropped").wait_for()
    panel.get_by_role("button", name="Inpaint", exact=True).click()
    assert "nothing is brushed" in said(page, "nothing is brushed")
    box = panel.locator("canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2  # where four cells meet
    page.mouse.move(x + 20, y + 20)
    page.mouse.down()
    page.mouse.move(x + 60, y + 60, steps=6)
    page.mouse.up()
    panel.get_by_role("button", name="Undo").and_(panel.locator(":enabled")).wait_for()
    panel.get_by_role("button", name="Inpaint", exact=True).click()
    _, pixels = gallery(panel, 8)
    given = as_array(read_image(star, (16, 16), 3)[0][None])
    changed = (pixels != given).any(axis=(0, 3))
    rows, columns = changed.nonzero()
    assert changed.any(), "what was brushed is drawn again"
    assert 7 <= rows.min() <= rows.max() <= 12, "and nothing else: every other pixel is as it was"
    assert 7 <= columns.min() <= columns.max() <= 12
    assert len({image.tobytes() for image in pixels}) > 1


def test_nothing_is_fetched_from_elsewhere(page, server, asked):
    assert len(asked) > 20
    assert [address for address in asked if not address.startswith((server.address, "data:", "blob:"))] == []
    assert page.evaluate(ASK_ELSEWHERE) == "connect-src", "and the browser itself refuses it"
    server.proxy.settimeout(0)
    with pytest.raises(BlockingIOError):
        server.proxy.accept()


@pytest.mark.parametrize("path", ["/etc/passwd", str(Path(__file__)), "pyproject.toml"])
def test_it_serves_its_own_files_only(page, server, path):
    assert page.request.get(f"{server.address}gradio_api/file={path}").status in (403, 404)


def test_it_stops(page, server):
    assert any(server.folder.iterdir())
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(MINUTES * 60) == 0
    assert list(server.folder.iterdir()) == [], "what was uploaded and drawn is gone"
