"""A report to read in a browser: one HTML file with its images inside. It fetches nothing and has no script."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from twostage.core.files import replacing

__all__ = ["Report"]

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 74rem; margin: 2rem auto; padding: 0 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #8884; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #8883; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 8rem; }
figure { margin: 1.5rem 0; } figcaption { opacity: .75; }
img { max-width: 100%; height: auto; background: white; }
pre { overflow-x: auto; padding: 1rem; background: #8881; font-size: .8rem; }
"""


class Report:
    """Collects headings, paragraphs, tables and images in order; all text is escaped.

    Args:
        title: the title of the page.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._body = [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        """The heading of a section."""
        self._body.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, paragraph: str) -> None:
        """A paragraph."""
        self._body.append(f"<p>{html.escape(paragraph)}</p>")

    def table(self, columns: Mapping[str, str], rows: Sequence[Mapping[str, str]]) -> None:
        """A table; ``columns`` maps keys to titles. A row without a key has an empty cell there."""
        head = "".join(f"<th>{html.escape(title)}</th>" for title in columns.values())
        lines = [f"<tr>{head}</tr>"]
        for row in rows:
            cells = "".join(f"<td>{html.escape(row.get(key, ''))}</td>" for key in columns)
            lines.append(f"<tr>{cells}</tr>")
        self._body.append(f"<table>{''.join(lines)}</table>")

    def image(self, image: Image.Image, caption: str) -> None:
        """An image, as a PNG inside the page."""
        file = io.BytesIO()
        image.save(file, format="PNG")
        data, words = base64.b64encode(file.getvalue()).decode(), html.escape(caption, quote=True)
        self._body.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{words}"><figcaption>{words}</figcaption></figure>'
        )

    def details(self, summary: str, text: str) -> None:
        """Longer text, such as a protocol, folded until it is clicked."""
        self._body.append(f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre></details>")

    def save(self, path: Path) -> None:
        """Writes the page so that a reader never finds an incomplete one."""
        body = "\n".join(self._body)
        page = (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(self.title)}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
            f"<body>{body}</body></html>\n"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text(page, encoding="utf-8")
