"""The pages of annotated code: a file of the repository, with notes beside its lines.

A file of `notes/` opens with a title, `file: PATH` and an introduction. The heading of each section is a line of that
file, in backquotes; below it follows the note that stands beside this line. The build fails if the file does not have
this line exactly once, so notes and code cannot drift apart.
"""

import re
from pathlib import Path

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

__all__ = ["annotated_pages"]


def annotated_pages(root: Path) -> dict[str, tuple[str, str]]:
    """The page and its Markdown, by the annotated file."""
    pages = {}
    for notes in sorted((root / "docs" / "site" / "notes").glob("*.md")):
        title, file, introduction, sections = _parse(notes.read_text(encoding="utf-8"), notes.name)
        text = (root / file).read_text(encoding="utf-8")
        code = text.splitlines()
        starts = [_line_of(anchor, code, file) for anchor, _ in sections]
        if starts != sorted(starts):
            raise ValueError(f"{notes.name}: the notes are not in the order of the lines of {file}")
        coloured = highlight(text, PythonLexer(), HtmlFormatter(nowrap=True)).rstrip("\n").split("\n")
        lines = [f'<span class="number">{number}</span>{line}' for number, line in enumerate(coloured, 1)]
        page = f"---\nhide: [toc]\n---\n# {title}\n\n`{file}`\n\n{introduction}\n\n" + _row("", lines[: starts[0]])
        ends = [*starts[1:], len(code)]
        for (_, note), start, end in zip(sections, starts, ends, strict=True):
            page += _row(note, lines[start:end])
        pages[file] = (f"annotated/{notes.name}", page)
    return pages


def _parse(text: str, name: str) -> tuple[str, str, str, list[tuple[str, str]]]:
    """Title, file, introduction, and the notes with their lines."""
    match = re.match(r"# (.+)\n\nfile: (\S+)\n\n(.*?)(?=^## `)", text, re.DOTALL | re.MULTILINE)
    if match is None:
        raise ValueError(f"{name}: expected '# TITLE', 'file: PATH', an introduction, and notes below '## `LINE`'")
    sections = re.findall(r"^## `([^\n]+)`\n+(.*?)(?=^## `|\Z)", text, re.DOTALL | re.MULTILINE)
    return match[1], match[2], match[3].strip(), [(line, note.strip()) for line, note in sections]


def _line_of(anchor: str, code: list[str], file: str) -> int:
    """The index of the only line that is ``anchor``, apart from its indentation."""
    found = [i for i, line in enumerate(code) if line.strip() == anchor]
    if len(found) != 1:
        raise ValueError(f"{file}: the line {anchor!r} of a note is there {len(found)} times, expected once")
    return found[0]


def _row(note: str, lines: list[str]) -> str:
    """A note beside its lines."""
    code = "\n".join(lines)
    return (
        f'<div class="annotated" markdown>\n<div class="note" markdown>\n\n{note}\n\n</div>\n'
        f'<div class="highlight"><pre><code>{code}</code></pre></div>\n</div>\n\n'
    )
