"""The model card of a shared pipeline: README.md, its images, and the records that it quotes."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from torch import nn

from pipelines.saved.evaluation_figures import PRIOR_ROWS, SAMPLE_ROWS, TOKENIZER_ROWS, evidence_warnings
from pipelines.saved.pipeline_folder import StoredWeights, is_hub_id
from pipelines.saved.saved_model import SavedModel
from stage1_tokenizer.autoencoder import Autoencoder
from stage2_prior.prior import Prior
from twostage.core.errors import InputError
from twostage.core.files import file_sha256
from twostage.core.images.sheets import save_image
from twostage.core.scales import describe_grids

__all__ = ["CardFields", "ModelCard", "gather_records", "is_as_written"]

ROWS = {"tokenizer": TOKENIZER_ROWS | SAMPLE_ROWS, "prior": PRIOR_ROWS}
MARK = re.compile(r"\n<!-- written by twostage export; sha256 of what is above: (\w+) -->\n$")
LIMITS = (
    "It is meant for learning about two-stage image generation, for comparing models and for building on. It makes "
    "images like its training images, at their size, and nothing else. Errors, biases and gaps in the training images "
    "show up in its images too. Beyond the figures above, nobody has checked whether it reproduces training images."
)


@dataclass(frozen=True)
class CardFields:
    """The facts that only the person who shares a pipeline knows."""

    license: str | None = None
    """License of the weights, by its id on the hub, such as `mit`."""
    data_license: str | None = None
    """License of the training images, in words."""
    where: str = "my_pipeline"
    """The folder or the hub id that the example loads."""

    def __post_init__(self) -> None:
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.license):
            raise InputError(
                f"license {self.license!r}: expected an id from the hub's list, such as mit, apache-2.0, cc-by-4.0, "
                "other"
            )


def gather_records(saved: SavedModel, tokenizer: str | Path | None = None) -> dict[str, bytes]:
    """Records of a model besides its weights, as files of a pipeline folder: `training/NAME.yaml` (the configuration),
    `evaluation/NAME.json` (figures and protocol) and `reconstructions.png`; NAME is `tokenizer` or
    `prior`. An evaluation of weights other than the model's present ones is omitted.

    Args:
        tokenizer: the tokenizer's run, if it is not where the prior says.
    """
    if saved.kind == "pipeline":
        folder = saved.folder
        parts = {name: folder / name for name in ROWS if (folder / name).is_dir()}
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
    records = {name: _shareable(file) for name, file in files.items() if file.is_file()}
    for name, part in parts.items():
        evaluation = records.get(f"evaluation/{name}.json")
        if evaluation and not _can_be_shown(evaluation, name, part):
            del records[f"evaluation/{name}.json"]
    if "evaluation/tokenizer.json" not in records:
        records.pop("reconstructions.png", None)
    return records


def _shareable(file: Path) -> bytes:
    """The content of a file without the folders of this machine: of absolute paths, only the last name stays."""
    content = file.read_bytes()
    try:
        if file.suffix == ".yaml":
            return yaml.safe_dump(_without_folders(yaml.safe_load(content)), sort_keys=False).encode()
        if file.suffix == ".json":
            return json.dumps(_without_folders(json.loads(content)), indent=2).encode() + b"\n"
    except (ValueError, RecursionError, yaml.YAMLError):  # edited by hand, or truncated
        pass
    return content


def _without_folders(document: Any) -> Any:
    if isinstance(document, dict):
        return {key: _without_folders(value) for key, value in document.items()}
    if isinstance(document, list):
        return [_without_folders(value) for value in document]
    return Path(document).name if isinstance(document, str) and Path(document).is_absolute() else document


def _can_be_shown(evaluation: bytes, name: str, part: Path) -> bool:
    """Whether ``evaluation`` is a complete evaluation of the present weights."""
    try:
        measured = json.loads(evaluation)["protocol"].get(name, {}).get("weights_sha256")
        return measured == file_sha256(part / "model.safetensors") and bool(_figures(name, evaluation))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # edited by hand, or truncated
        return False


@dataclass(frozen=True)
class ModelCard:
    """The model card of a pipeline."""

    tokenizer: Autoencoder
    prior: Prior | None
    class_names: list[str] | None
    """The classes that images can be asked for."""
    records: dict[str, bytes]
    """From :func:`gather_records`."""
    fields: CardFields
    weights: StoredWeights = "float32"
    """Their precision in the folder."""

    def write(self, folder: Path, samples: Image.Image) -> None:
        """Writes README.md, samples.png and the records into ``folder``, which holds the pipeline."""
        for name, content in self.records.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        save_image(samples, folder / "samples.png")
        text = self._front_matter() + "\n\n".join(self._sections()) + "\n"
        mark = f"\n<!-- written by twostage export; sha256 of what is above: {_digest(text)} -->\n"
        (folder / "README.md").write_text(text + mark, encoding="utf-8")

    def _front_matter(self) -> str:
        document: dict[str, Any] = {"license": self.fields.license} if self.fields.license else {}
        tags = ["image-generation", f"bottleneck-{self.tokenizer.config.model.bottleneck.type}".replace("_", "-")]
        if self.prior:
            tags += [f"prior-{self.prior.config.model.type}".replace("_", "-"), "vector-quantization"]
        else:
            tags.append("vae")
        document |= {"library_name": "twostage", "pipeline_tag": "unconditional-image-generation", "tags": tags}
        source = self._source()
        if source and is_hub_id(source) and not Path(source).exists():
            document["datasets"] = [source]
        return f"---\n{yaml.safe_dump(document, sort_keys=False)}---\n\n"

    def _source(self) -> str | None:
        """The `data.source` that the tokenizer was trained on."""
        training = self.records.get("training/tokenizer.yaml")
        return yaml.safe_load(training)["data"]["source"] if training else None

    def _sections(self) -> list[str]:
        bottleneck, names = self.tokenizer.config.model.bottleneck.type, self.class_names
        height, width = self.tokenizer.config.image_size
        if self.prior:
            title = f"{self.prior.config.model.type} over {bottleneck} codes"
            about = "A tokenizer turns images into a small grid of codes and back; a prior writes such grids."
        else:
            title = f"{bottleneck} autoencoder"
            about = "A variational autoencoder, which decodes random latents."
        sections = [
            f"# {title.replace('_', ' ').capitalize()}, {height}x{width} pixels",
            f"Made with twostage. {about}",
            "![Samples](samples.png)",
            "Not chosen by hand: seed 0, default settings"
            + (f", cycling through the classes ({', '.join(names)})." if names else ".")
            + (" Below each image is its prompt, a held-out caption." if self.prompts else ""),
            "## Use",
            self._example(),
            "## What it is",
            _table(["part", "what"], self._parts()),
            "## Figures",
        ]
        for name in ("tokenizer", "prior") if self.prior else ("tokenizer",):
            sections += _figures(name, self.records.get(f"evaluation/{name}.json"))
        if self.weights == "bfloat16" and any(name.startswith("evaluation/") for name in self.records):
            sections.append("These figures were measured before the weights were rounded to bfloat16.")
        if "reconstructions.png" in self.records:
            caption = "Held-out images above their reconstructions by the tokenizer"
            sections += [f"![{caption}](reconstructions.png)", f"{caption}."]
        return [*sections, *self._about_data(), "## Intended use and limits", LIMITS, *self._about_training()]

    @property
    def prompts(self) -> tuple[str, ...]:
        """The held-out captions that a model with captions keeps."""
        return (self.prior or self.tokenizer).example_prompts()

    def _example(self) -> str:
        asked = f', class_names=["{self.class_names[0]}"]' if self.class_names else ""
        if self.prompts:
            asked = f", prompt={json.dumps(self.prompts[0], ensure_ascii=False)}"
        return (
            "```python\nfrom twostage import TwoStagePipeline\n\n"
            f'pipeline = TwoStagePipeline.from_pretrained("{self.fields.where}")\n'
            f"output = pipeline(num_images=8{asked}, seed=0)\n"
            'output.images[0].save("image.png")\n```'
        )

    def _parts(self) -> list[list[str]]:
        tokenizer, config = self.tokenizer, self.tokenizer.config
        height, width = config.image_size
        codes = "a continuous latent"
        if tokenizer.codebook_size:
            grids = describe_grids(tokenizer.code_grid, tokenizer.bottleneck.scales)
            codes = f"{grids} codes from a codebook of {tokenizer.codebook_size:,}"
        kinds = f"backbone `{config.model.backbone.type}`, bottleneck `{config.model.bottleneck.type}`"
        kinds += "".join(f", encoder and decoder see {each.plural}" for each in config.conditions)
        rows = [
            ["images", f"{height}x{width}, {({1: 'grey', 3: 'RGB', 4: 'RGBA'})[config.channels]}"],
            ["classes", ", ".join(self.class_names) if self.class_names else "none"],
            ["tokenizer", f"{kinds}, {codes}, {_size(tokenizer)}"],
            ["tokenizer's hash", f"`{tokenizer.content_hash()}`"],
        ]
        if self.prior:
            rows.append(["prior", f"`{self.prior.config.model.type}`, {_size(self.prior)}"])
        if self.weights == "bfloat16":
            exact = " (encoder and codebook exact, so the codes are those that the prior was trained on)"
            rows.append(["weights", f"bfloat16{exact if self.prior else ''}"])
        return [*rows, ["files", "listed with their sha256 in [pipeline.json](pipeline.json)"]]

    def _about_data(self) -> list[str]:
        source = self._source()
        trained = f"Trained on `{source}`." if source else "What it was trained on is not recorded here."
        license = self.fields.data_license or "not stated; whoever shares this model should state it here"
        return ["## Data", f"{trained} License of the data: {license}."]

    def _about_training(self) -> list[str]:
        files = [f"[{name}]({name})" for name in self.records if name.startswith("training/")]
        return ["## How it was trained", f"The whole configuration: {', '.join(files)}."] if files else []


def is_as_written(card: str) -> bool:
    """Whether a README.md is still as :meth:`ModelCard.write` wrote it."""
    mark = MARK.search(card)
    return bool(mark) and _digest(card[: mark.start()]) == mark[1]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _size(model: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters"


def _figures(name: str, evaluation: bytes | None) -> list[str]:
    """The figures of a part and how they were measured; or that nothing was measured."""
    if not evaluation:
        return [f"These weights of the {name} were not evaluated. To do so: `twostage evaluate runs/{name.upper()}`."]
    document = json.loads(evaluation)
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


def _table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
