"""A hook of MkDocs: adds the pages that are made from other files, and lets links to files of the repository work.

The documents link files as a Git host needs it, for example `../stage2_prior/prior.py`. In the site, such a link
leads to a page with that file. All these pages are made when the site is built; none is stored.
"""

import posixpath
import re
import sys
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))

from annotated_code import annotated_pages
from api_pages import api_pages
from notebook_pages import notebook_pages

ROOT = Path(__file__).parents[2]
TOP_DOCUMENTS = {name: name for name in ("README.zh.md", "CHANGELOG.md", "CONTRIBUTING.md")} | {"README.md": "index.md"}
"""Documents outside of docs/, by the page that they become."""
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)\s#]+)(?=[#)])")
CODE = re.compile(r"(```.*?^ *```|`[^`\n]*`)", re.DOTALL | re.MULTILINE)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".sh": "bash"}
LONG = 50
"""Characters from which on an equation in a line of text may be wider than a phone."""
NOT_SEARCHED = "---\nsearch:\n  exclude: true\n---\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds all generated pages, and a page for each file that a document links."""
    pages: dict[str, str | bytes] = {page: (ROOT / name).read_text("utf-8") for name, page in TOP_DOCUMENTS.items()}
    annotated = annotated_pages(ROOT)
    pages |= (
        api_pages() | notebook_pages(ROOT / "docs" / "notebooks") | {page: text for page, text in annotated.values()}
    )
    _linked.clear()
    _linked.update({name: page for name, (page, _) in annotated.items()})
    documents = {page: text for page, text in pages.items() if isinstance(text, str)}
    documents |= {file.src_uri: file.content_string for file in files.documentation_pages()}
    for page, text in documents.items():
        for target in _targets(page, text):
            if target not in _linked and _page_of(target) is None:
                _linked[target] = f"source/{target}" + ("" if target.endswith((".md", ".png")) else ".md")
                pages[_linked[target]] = _source_page(target)
    for page, content in pages.items():
        files.append(File.generated(config, page, content=content))
    return files


_linked: dict[str, str] = {}
"""The files of the repository that have a page because a document links them, by that page."""


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links between files of the repository into links between pages."""
    here = page.file.src_uri

    def to_page(match: re.Match[str]) -> str:
        target = _resolve(here, match[1])
        there = _page_of(target) or _linked.get(target)
        return match[1] if there is None else posixpath.relpath(there, posixpath.dirname(here) or ".")

    parts = CODE.split(markdown)
    parts[::2] = [_spaced_lists(LINK.sub(to_page, part)) for part in parts[::2]]
    return "".join(parts)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Renders equations as MathML, which browsers show without a script, and cross-references in docstrings as code."""

    def to_math(match: re.Match[str]) -> str:
        text = match[3].strip().removeprefix(r"\(").removeprefix(r"\[").removesuffix(r"\)").removesuffix(r"\]")
        for entity, character in {"&amp;": "&", "&lt;": "<", "&gt;": ">"}.items():
            text = text.replace(entity, character)
        if match[1] == "span":
            return convert(text) if len(text) < LONG else f'<span class="long">{convert(text)}</span>'
        limits = re.sub(
            r"<msub>(<mo>m(?:in|ax)</mo>.*?)</msub>", r"<munder>\1</munder>", convert(text, display="block")
        )
        return f'<div class="equation">{limits}</div>'

    html = re.sub(r'<(span|div) class="arithmatex">(<pre>|)?(.*?)(</pre>|)</\1>', to_math, html, flags=re.DOTALL)
    return re.sub(r":(?:meth|class|func|attr|mod):(<code>)~?", r"\1", html)


def _spaced_lists(text: str) -> str:
    """Python's Markdown wants an empty line before a list; a Git host does not."""
    return re.sub(r"^(?!\s*[-*|] |\s*\d+\. |#|\s|$)(.+)\n(?=[-*] |1\. )", r"\1\n\n", text, flags=re.MULTILINE)


def _origin(page: str) -> str:
    """The file of the repository that a page is made of."""
    tops = {page: name for name, page in TOP_DOCUMENTS.items()}
    return (
        tops.get(page) or page.removeprefix("source/") if page.startswith("source/") or page in tops else f"docs/{page}"
    )


def _resolve(page: str, link: str) -> str:
    """The path in the repository that a link on a page means."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(_origin(page)), link))


def _page_of(target: str) -> str | None:
    """The page that every site has for a file of the repository."""
    if target == "docs/README.md":
        return "index.md"
    if target.startswith("docs/"):
        page = target.removeprefix("docs/")
        return page.replace(".ipynb", ".md") if page.startswith("notebooks/") else page
    return TOP_DOCUMENTS.get(target)


def _targets(page: str, text: str) -> list[str]:
    """The files and folders of the repository outside of docs/ that a page links."""
    links = [link for part in CODE.split(text)[::2] for link in LINK.findall(part)]
    targets = [_resolve(page, link) for link in links]
    return [target for target in targets if not target.startswith("..") and (ROOT / target).exists()]


def _source_page(target: str) -> str | bytes:
    """A page that shows a file, or lists a folder."""
    path = ROOT / target
    if path.is_dir():
        return f"{NOT_SEARCHED}# {target}/\n\n" + "".join(f"- `{file.name}`\n" for file in sorted(path.glob("*.py")))
    if path.suffix == ".png":
        return path.read_bytes()
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    return f'{NOT_SEARCHED}# {target}\n\n````{LANGUAGES.get(path.suffix, "text")} linenums="1"\n{text}````\n'
