"""The page that a shared pipeline shows on the hub: README.md, its pictures, and the records that it speaks of."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelines.drawing.two_stage import TwoStagePipeline, class_sheet
from pipelines.saved.figures import PRIOR_ROWS, SAMPLE_ROWS, TOKENIZER_ROWS, Rows, evidence_warnings
from pipelines.saved.pipeline_folder import HUB_ID
from pipelines.saved.saved_model import SavedModel
from twostage.core.errors import InputError
from twostage.core.images.sheets import save_image
from twostage.core.runs.model_folder import file_sha256

__all__ = ["CardFields", "gather_records", "is_as_written", "write_model_card"]

ROWS: dict[str, Rows] = {"tokenizer": TOKENIZER_ROWS | SAMPLE_ROWS, "prior": PRIOR_ROWS}
SAMPLES = 40
MARK = re.compile(r"\n<!-- written by twostage export; sha256 of what is above: (\w+) -->\n$")
LIMITS = (
    "It is meant for learning about two-stage image generation, for comparing models and for building on: it makes "
    "pictures like those it was trained on, at their size, and knows nothing else. What is wrong, one-sided or missing "
    "in the training pictures comes back in its own, and beyond the figures above nobody has checked whether it "
    "repeats pictures that it was trained on."
)


@dataclass
class CardFields:
    """What only the person who shares a pipeline can say."""

    license: str | None = None
    """Of the weights, by its id on the hub, such as `mit`."""
    data_license: str | None = None
    """Of the pictures that it was trained on, in words."""
    where: str = "my_pipeline"
    """The folder or the hub id that the example reads."""

    def __post_init__(self) -> None:
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.license):
            raise InputError(
                f"license {self.license!r}: expected an id of the hub's list, such as mit, apache-2.0, cc-by-4.0, other"
            )


def gather_records(saved: SavedModel, tokenizer: str | Path | None = None) -> dict[str, bytes]:
    """What is known about a model besides its weights, as files of a pipeline folder: `training/NAME.yaml` (the
    configuration), `evaluation/NAME.json` (figures and protocol) and `reconstructions.png`, NAME being `tokenizer` or
    `prior`. An evaluation of other weights than the model has now is left out.

    Args:
        tokenizer: the tokenizer's run, if it is not where the prior says.
    """
    if saved.kind == "pipeline":
        folder = saved.folder
        parts = {name: folder / name for name in ("tokenizer", "prior") if (folder / name).is_dir()}
        files = {f"training/{name}.yaml": folder / "training" / f"{name}.yaml" for name in parts}
        files |= {f"evaluation/{name}.json": folder / "evaluation" / f"{name}.json" for name in parts}
        files["reconstructions.png"] = folder / "reconstructions.png"
    else:
        models = {"tokenizer": SavedModel.find_run(tokenizer) if tokenizer else saved.open_tokenizer()[0]}
        models |= {"prior": saved} if saved.kind == "prior" else {}
        parts = {name: model.folder for name, model in models.items()}
        files = {f"training/{name}.yaml": model.home / "config.yaml" for name, model in models.items()}
        files |= {f"evaluation/{name}.json": m.home / "evaluation" / "evaluation.json" for name, m in models.items()}
        files["reconstructions.png"] = models["tokenizer"].home / "evaluation" / "typical.png"
    records = {name: file.read_bytes() for name, file in files.items() if file.is_file()}
    for name, part in parts.items():
        evaluation = records.get(f"evaluation/{name}.json")
        if evaluation and not _can_be_shown(evaluation, name, part, records):
            del records[f"evaluation/{name}.json"]
    if "evaluation/tokenizer.json" not in records:
        records.pop("reconstructions.png", None)
    return records


def _can_be_shown(evaluation: bytes, name: str, part: Path, records: dict[str, bytes]) -> bool:
    """Whether it is a whole evaluation, and of these weights."""
    try:
        return _is_of(json.loads(evaluation), name, part) and bool(_figures(name, records))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # written by hand, or cut short
        return False


def _is_of(document: dict[str, Any], name: str, part: Path) -> bool:
    measured = document["protocol"].get(name, {}).get("weights_sha256")
    return measured == file_sha256(part / "model.safetensors")


def write_model_card(folder: Path, pipeline: TwoStagePipeline, records: dict[str, bytes], fields: CardFields) -> None:
    """Writes README.md, samples.png and the ``records`` into ``folder``, which holds the pipeline."""
    for name, content in records.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    names = pipeline.class_names
    each = min(len(names), SAMPLES) if names else 8
    count = SAMPLES // each * each
    sheet = class_sheet(pipeline(count, seed=0, output_type="pt").images, names, pipeline.labels_for(None))
    save_image(sheet, folder / "samples.png")
    text = _front_matter(pipeline, records, fields) + "\n\n".join(_sections(pipeline, records, fields)) + "\n"
    mark = f"\n<!-- written by twostage export; sha256 of what is above: {_digest(text)} -->\n"
    (folder / "README.md").write_text(text + mark, encoding="utf-8")


def is_as_written(card: str) -> bool:
    """Whether nobody has changed a README.md since :func:`write_model_card` wrote it."""
    mark = MARK.search(card)
    return bool(mark) and _digest(card[: mark.start()]) == mark[1]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _front_matter(pipeline: TwoStagePipeline, records: dict[str, bytes], fields: CardFields) -> str:
    model = pipeline.tokenizer.config.model
    document: dict[str, Any] = {"license": fields.license} if fields.license else {}
    tags = ["image-generation", f"bottleneck-{model.bottleneck.type}".replace("_", "-")]
    tags.append(f"prior-{pipeline.prior.config.model.type}".replace("_", "-") if pipeline.prior else "vae")
    if pipeline.prior:
        tags.append("vector-quantization")
    document |= {"library_name": "twostage", "pipeline_tag": "unconditional-image-generation", "tags": tags}
    source = _source(records)
    if source and HUB_ID.fullmatch(source) and not Path(source).exists():
        document["datasets"] = [source]
    return f"---\n{yaml.safe_dump(document, sort_keys=False)}---\n\n"


def _source(records: dict[str, bytes]) -> str | None:
    """The `data.source` that the tokenizer was trained on."""
    training = records.get("training/tokenizer.yaml")
    return yaml.safe_load(training)["data"]["source"] if training else None


def _sections(pipeline: TwoStagePipeline, records: dict[str, bytes], fields: CardFields) -> list[str]:
    tokenizer, prior, names = pipeline.tokenizer, pipeline.prior, pipeline.class_names
    height, width = pipeline.image_size
    title = f"{prior.config.model.type} over {tokenizer.config.model.bottleneck.type} codes" if prior else "autoencoder"
    title = title if prior else f"{tokenizer.config.model.bottleneck.type} {title}"
    sections = [
        f"# {title.replace('_', ' ').capitalize()}, {height}x{width} pixels",
        "Made with twostage: "
        + (
            "a tokenizer turns pictures into a small grid of codes and back, a prior writes such grids."
            if prior
            else "a variational autoencoder, which decodes random latents."
        ),
        "![Samples](samples.png)",
        "Not chosen by hand: seed 0, default settings"
        + (f", the classes in turn ({', '.join(names)})." if names else "."),
        "## Use",
        _example(fields.where, names),
        "## What it is",
        _table(["part", "what"], _parts(pipeline)),
    ]
    sections.append("## Figures")
    for name in ("tokenizer", "prior") if prior else ("tokenizer",):
        sections += _figures(name, records)
    if "reconstructions.png" in records:
        sections += ["![Held-out pictures over their reconstructions](reconstructions.png)"]
        sections += ["Held-out pictures over their reconstructions by the tokenizer."]
    return [*sections, *_about_data(records, fields), "## Intended use and limits", LIMITS, *_about_training(records)]


def _example(where: str, names: list[str] | None) -> str:
    asked = f', class_names=["{names[0]}"]' if names else ""
    return (
        "```python\nfrom pipelines.drawing.two_stage import TwoStagePipeline\n\n"
        f'pipeline = TwoStagePipeline.from_pretrained("{where}")\n'
        f"output = pipeline(num_images=8{asked}, seed=0)\n"
        'output.images[0].save("image.png")\n```'
    )


def _parts(pipeline: TwoStagePipeline) -> list[list[str]]:
    tokenizer, prior = pipeline.tokenizer, pipeline.prior
    model, (height, width) = tokenizer.config.model, pipeline.image_size
    codes = "a continuous latent"
    if tokenizer.codebook_size:
        codes = f"{'x'.join(map(str, tokenizer.code_grid))} codes of {tokenizer.codebook_size:,}"
    rows = [
        ["pictures", f"{height}x{width}, {({1: 'grey', 3: 'RGB', 4: 'RGBA'})[pipeline.channels]}"],
        ["classes", ", ".join(pipeline.class_names) if pipeline.class_names else "none"],
        [
            "tokenizer",
            f"backbone `{model.backbone.type}`, bottleneck `{model.bottleneck.type}`, {codes}, {_size(tokenizer)}",
        ],
        ["tokenizer's hash", f"`{tokenizer.content_hash()}`"],
    ]
    if prior:
        rows.append(["prior", f"`{prior.config.model.type}`, {_size(prior)}"])
    return [*rows, ["files", "listed with their sha256 in [pipeline.json](pipeline.json)"]]


def _size(model: Any) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters"


def _figures(name: str, records: dict[str, bytes]) -> list[str]:
    """What was measured of a part, with how; or that nothing was."""
    record = records.get(f"evaluation/{name}.json")
    if not record:
        return [f"The {name} was not evaluated as it is here; `twostage evaluate runs/{name.upper()}` does that."]
    document = json.loads(record)
    measured = [(*ROWS[name][key], value) for key, value in document["figures"].items() if value is not None]
    rows = [[title.strip(), form.format(value), meaning] for title, form, meaning, value in measured]
    protocol = document["protocol"]
    warnings = evidence_warnings(protocol.get("not_evidence", {}), ROWS[name])  # older evaluations lack it
    on = [
        f"{about['source'] if what == 'data' else 'its codes'}, `{about['split']}`: "
        f"{about.get('images', about.get('rows')):,} {unit} ({about['chosen']}), sha256 `{about['sha256'][:12]}`"
        for what, unit in (("data", "images"), ("codes", "code grids"))
        if (about := protocol.get(what))
    ]
    about = f"Measured on {'; '.join(on)}. The whole protocol: [evaluation/{name}.json](evaluation/{name}.json)."
    return [f"The {name}:", _table([name, "figure", "meaning"], rows), *warnings, about]


def _about_data(records: dict[str, bytes], fields: CardFields) -> list[str]:
    source = _source(records)
    trained = f"Trained on `{source}`." if source else "What it was trained on is not recorded here."
    licence = fields.data_license or "not stated; whoever shares this model should say it here"
    return ["## Data", f"{trained} Licence of the data: {licence}."]


def _about_training(records: dict[str, bytes]) -> list[str]:
    files = [f"[{name}]({name})" for name in records if name.startswith("training/")]
    if not files:
        return []
    return ["## How it was trained", f"The whole configuration: {', '.join(files)}."]


def _table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
