"""The pages of the notebooks: their cells as Markdown, their images as files."""

import base64
import json
from pathlib import Path
from typing import Any

__all__ = ["notebook_pages"]


def notebook_pages(folder: Path) -> dict[str, str | bytes]:
    """The content of each page and image, by its path below the site."""
    pages: dict[str, str | bytes] = {}
    for file in sorted(folder.glob("*.ipynb")):
        lines, images = [], 0
        for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                lines.append(source)
                continue
            lines.append(f"```python\n{source}\n```")
            for output in cell["outputs"]:
                data: dict[str, Any] = output.get("data", {})
                if "image/png" in data:
                    images += 1
                    name = f"{file.stem}_{images}.png"
                    pages[f"notebooks/{name}"] = base64.b64decode("".join(data["image/png"]))
                    lines.append(f"![The image that this cell draws]({name}){{.output}}")
                else:
                    text = "".join(output.get("text") or data.get("text/plain", ""))
                    lines.append(f"```{{.text .output}}\n{text.rstrip()}\n```")
        title, _, rest = "\n\n".join(lines).partition("\n")
        pages[f"notebooks/{file.stem}.md"] = (
            f'{title}\n\n<a href="{file.name}" download>Download this notebook</a>\n{rest}\n'
        )
    return pages
