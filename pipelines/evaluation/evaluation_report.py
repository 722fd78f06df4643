"""A finished evaluation: as evaluation.json, as the table that the command prints, and as a page with images."""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from pipelines.evaluation.measurement import Measurement, figures_of
from pipelines.evaluation.shared_work import SharedWork
from pipelines.evaluation.verdict import Verdict
from pipelines.files.report import Report
from pipelines.saved.evaluation_figures import NO_EVIDENCE, Rows, evidence_warnings
from twostage.core.files import file_sha256, write_json
from twostage.core.images.sheets import save_image
from twostage.core.runs.model_folder import find_model_folder

__all__ = ["Evaluation", "Sheet", "describe_machine", "describe_weights"]

SHEET_NAMES = ("worst", "typical", "samples", "neighbours")
PACKAGES = ("torch", "torchmetrics", "numpy", "pillow")


def describe_weights(path: str | Path, **more: str) -> dict[str, str]:
    """A model in the protocol."""
    weights = file_sha256(find_model_folder(path) / "model.safetensors")
    return {"path": str(path), **more, "weights_sha256": weights}


def describe_machine(work: SharedWork) -> dict[str, Any]:
    """The device and the versions in the protocol."""
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    return {"device": work.device.type, "versions": versions}


@dataclass(frozen=True)
class Sheet:
    """A sheet of images beside the figures."""

    name: str
    """The name of its file: one of `SHEET_NAMES`."""
    image: Image.Image
    caption: str


@dataclass(frozen=True)
class Evaluation:
    """All measurements of a model."""

    path: str | Path
    """The path of the model."""
    rows: Rows
    """How tables show the figures."""
    measurements: Sequence[Measurement]
    models: Mapping[str, Any]
    """The beginning of the protocol: what was measured."""
    settings: Mapping[str, Any]
    """The end of the protocol: how it was measured."""
    not_evidence: Mapping[str, str]
    """The reason why a figure is not evidence of quality, by key."""
    verdict: Verdict | None = None
    refusal: str | None = None
    """Why the samples are not measured."""
    sheets: Sequence[Sheet] = field(default=(), repr=False)

    @cached_property
    def missing(self) -> dict[str, str]:
        """The reason for each missing figure, by key."""
        missing = {name: reason for found in self.measurements for name, reason in found.missing.items()}
        values = figures_of(self.measurements)
        return missing | {name: "not finite" for name, value in values.items() if not math.isfinite(value)}

    @cached_property
    def figures(self) -> dict[str, float | None]:
        """The figures in the order of the table, by their keys; None: missing."""
        found: dict[str, float | None] = {**figures_of(self.measurements), **dict.fromkeys(self.missing)}
        return {name: found[name] for name in self.rows if name in found}

    @cached_property
    def protocol(self) -> dict[str, Any]:
        """How the figures were measured, as plain JSON."""
        about = {name: value for found in self.measurements for name, value in found.protocol.items()}
        doubts = {"not_evidence": dict(self.not_evidence), "not_measured": self.missing}
        return {**self.models, **about, **doubts, **self.settings}

    def document(self) -> dict[str, Any]:
        """The content of evaluation.json: `figures`, `protocol` and, for tokenizers, `verdict`."""
        verdict = {"verdict": asdict(self.verdict)} if self.verdict else {}
        return {"figures": self.figures, "protocol": self.protocol, **verdict}

    def table(self) -> str:
        """The text that the command prints: what was measured, the figures, and how to read them."""
        lines, given = [], set()
        for name, value in self.figures.items():
            if (name, value) == ("codebooks", 1):
                continue
            if value is not None:
                text = self.rows[name].form.format(value) + f" ({NO_EVIDENCE})" * (name in self.not_evidence)
            else:
                reason = self.missing[name]
                text = "not measured: " + ("as above" if reason in given else reason)
                given.add(reason)
            lines.append(f"  {self.rows[name].title:<27} {text}")
        return "\n".join([*self._subjects(), *lines, *self._notes()])

    def write(self, out: Path) -> list[str]:
        """Writes evaluation.json, evaluation.html and the sheets into ``out``, and removes the sheets of an earlier
        evaluation. Returns the names of the files."""
        out.mkdir(parents=True, exist_ok=True)
        for name in SHEET_NAMES:
            (out / f"{name}.png").unlink(missing_ok=True)
        for sheet in self.sheets:
            save_image(sheet.image, out / f"{sheet.name}.png")
        self._page().save(out / "evaluation.html")
        write_json(out / "evaluation.json", self.document())
        return ["evaluation.json", "evaluation.html", *(f"{sheet.name}.png" for sheet in self.sheets)]

    def _subjects(self) -> list[str]:
        return [line for found in self.measurements for line in found.subject]

    def _notes(self) -> list[str]:
        notes = [note for found in self.measurements for note in found.notes]
        sentences = self.verdict.sentences if self.verdict else []
        return [*notes, *evidence_warnings(self.not_evidence, self.rows), *sentences]

    def _page(self) -> Report:
        report = Report(f"Evaluation of {self.path}")
        for paragraph in [*self._subjects(), *([self.refusal] if self.refusal else []), *self._notes()]:
            report.text(paragraph)
        report.heading("Figures")
        lines = []
        for name, value in self.figures.items():
            title, form, meaning = self.rows[name]
            if value is not None:
                title = title.replace("  ", "\u00a0" * 4)  # which a browser keeps
                meaning += f"; {NO_EVIDENCE}, see above" if name in self.not_evidence else ""
                lines.append({"figure": f"{title}: {meaning}", "value": form.format(value)})
        report.table({"figure": "figure", "value": "value"}, lines)
        for reason in dict.fromkeys(self.missing.values()):
            titles = [self.rows[name].title.strip() for name in self.figures if self.missing.get(name) == reason]
            report.text(f"Not measured: {', '.join(titles)}: {reason}.")
        if self.sheets:
            report.heading("Images")
        for sheet in self.sheets:
            report.image(sheet.image, sheet.caption)
        report.heading("Protocol")
        report.details("How the figures were measured", json.dumps(self.protocol, indent=2, ensure_ascii=False))
        return report
