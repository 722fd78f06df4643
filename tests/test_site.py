"""The site: it builds without a warning, its pages fetch nothing and fit a phone, and the search needs no server."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FETCHES = re.compile(
    r"""(?:<(?:link|script|img|iframe)[^>]*(?:href|src)=|url\(|@import )["']?(?:https?:)?//[^"')\s]+"""
)
TOO_WIDE = "document.documentElement.scrollWidth > innerWidth"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_no_page_fetches_anything(site):
    files = [file for pattern in ("*.html", "*.css") for file in site.rglob(pattern)]
    assert len(files) > 50
    found = {str(file.relative_to(site)): FETCHES.findall(file.read_text(encoding="utf-8")) for file in files}
    assert {name: links for name, links in found.items() if links} == {}


def test_the_api_has_what_the_package_exports(site):
    text = (site / "api" / "python.html").read_text(encoding="utf-8")
    for name in ("pipelines.drawing.two_stage.TwoStagePipeline", "twostage.core.data.dataset.load_images"):
        assert f'id="{name}"' in text
    text = (site / "api" / "configuration.html").read_text(encoding="utf-8")
    assert 'id="stage1_tokenizer.bottlenecks.vector_quantizer.VectorConfig.l2_normalize"' in text


def test_notes_stand_beside_their_lines(site):
    text = (site / "annotated" / "vector_quantizer.html").read_text(encoding="utf-8")
    rows = text.split('<div class="annotated">')[1:]
    noted = [row for row in rows if "Straight through" in row]
    assert len(noted) == 1
    code = re.sub(r"<[^>]+>", "", noted[0].partition('<div class="highlight">')[2])
    assert re.match(r"\s*\d+ +return pass_gradient\(", code)


def test_equations_need_no_script(site):
    text = (site / "concepts.html").read_text(encoding="utf-8")
    assert text.count("<math") > 50
    assert "arithmatex" not in text


def test_in_a_browser(site):
    if BROWSER is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no Chromium on the PATH; install one to test the site")
    from playwright.sync_api import sync_playwright

    asked: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 400, "height": 800})
        page.set_default_timeout(60_000)
        page.on("request", lambda request: asked.append(request.url))
        for name in ("concepts", "results", "notebooks/07_vqvae_by_hand", "annotated/pixelcnn", "api/configuration"):
            page.goto((site / f"{name}.html").as_uri())
            assert not page.evaluate(TOO_WIDE), name
        page.set_viewport_size({"width": 1280, "height": 800})
        page.goto((site / "index.html").as_uri())
        found = page.locator(".md-search-result__item", has_text="beta-VAE").first
        for _ in range(12):  # what is typed before the index is read can be lost
            page.get_by_placeholder("Search").fill("")
            page.get_by_placeholder("Search").press_sequentially("posterior collapse")
            page.wait_for_timeout(1000)
            if found.is_visible():
                break
        found.wait_for()
        browser.close()
    assert [address for address in asked if not address.startswith(("file:", "data:", "blob:"))] == []
