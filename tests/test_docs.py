"""The documents match the code and each other: links, verbs and images."""

import re
import runpy
from pathlib import Path

import pytest
from PIL import Image, ImageChops

import twostage
from pipelines.cli import VERBS

REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = sorted(
    [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md"), REPOSITORY / "docs" / "notebooks" / "README.md"],
    key=lambda file: str(file.relative_to(REPOSITORY)),
)


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(REPOSITORY)))
def test_links_resolve(document: Path):
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\((\S+?)\)", text):
        if "://" in link:
            continue
        name, _, section = link.partition("#")
        file = document.parent / name if name else document
        assert file.exists(), f"{document.name}: {link}"
        if section:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert section in map(anchor, headings), f"{document.name}: {link}"


def test_every_verb_is_documented():
    text = "\n".join((REPOSITORY / name).read_text(encoding="utf-8") for name in ("README.md", "docs/tutorial.md"))
    assert [verb for verb in VERBS if f"`{verb}`" not in text and f"twostage {verb}" not in text] == []


def test_the_index_lists_every_document():
    text = (REPOSITORY / "docs" / "README.md").read_text(encoding="utf-8")
    documents = [file.name for file in (REPOSITORY / "docs").glob("*.md") if file.name != "README.md"]
    assert [name for name in documents if f"({name})" not in text] == []


def test_every_family_has_an_equation_an_image_and_a_config():
    text = (REPOSITORY / "docs" / "concepts.md").read_text(encoding="utf-8")
    configs = [file.name for folder in ("tokenizer", "prior") for file in (REPOSITORY / "configs" / folder).iterdir()]
    families = {name.removesuffix("_mnist.yaml") for name in configs if name.endswith("_mnist.yaml")}
    stages = text[text.index("## Stage one") : text.index("### Guidance")]
    sections = [section for section in stages.split("\n### ")[1:] if "configs/" in section]
    shown = {name for section in sections for name in re.findall(r"configs/\w+/(\w+?)_(?:mnist|cifar10)", section)}
    assert shown == families
    for section in sections:
        title = section.partition("\n")[0]
        assert "```math" in section, title
        assert re.search(r"!\[.+\]\(images/\S+\.png\)", section), title


def test_the_site_shows_every_public_class():
    pages = "\n".join(runpy.run_path(str(REPOSITORY / "docs" / "site" / "api_pages.py"))["api_pages"]().values())
    assert [name for name, module in twostage.MODULES.items() if pages.count(f"::: {module}.{name}\n") != 1] == []


def test_the_strips_match_the_contact_sheets():
    for file, strip in runpy.run_path(str(REPOSITORY / "docs" / "make_strips.py"))["strips"]():
        with Image.open(file) as stored:
            same = stored.size == strip.size and ImageChops.difference(stored, strip).getbbox() is None
        assert same, f"{file} is stale: run `python docs/make_strips.py`"
