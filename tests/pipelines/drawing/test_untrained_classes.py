"""A dataset that was filtered keeps the names of classes without images: nothing may offer, draw or caption them."""

import io
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from messages import assert_names, refuses
from PIL import Image

from pipelines.drawing.two_stage import TwoStagePipeline

SAID = "1 of 3 classes have no training image"


def image(label: int, number: int) -> dict:
    pixels = np.full((16, 16, 3), 40 + 80 * label, np.uint8)
    pixels[number % 16] = 255
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return {"bytes": content.getvalue(), "path": None}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, configs, twostage):
    """A tokenizer, its codes and a prior of ants, no bees and cows; what each command printed."""
    root = tmp_path_factory.mktemp("filtered")
    features = datasets.Features({
        "image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee", "cow"]),
    })  # fmt: skip
    for split, labels in {"train": [0, 2], "test": [0, 1, 2]}.items():
        rows = [(label, number) for number in range(24) for label in labels]
        columns = {"image": [image(*row) for row in rows], "label": [label for label, _ in rows]}
        whole = datasets.Dataset.from_dict(columns, features)
        whole.to_parquet(root / f"data/{split}.parquet")
    said = {}
    for verb, words in {
        "inspect": (root / "data", "--out", root / "sheet.png", "--json", root / "found.json"),
        "train-tokenizer": (configs / "tokenizer.yaml", f"run.dir={root / 'tokenizer'}", f"data.source={root / 'data'}",
                            "data.num_images=null"),
        "encode": (root / "tokenizer", "--out", root / "codes"),
        "train-prior": (configs / "prior.yaml", f"run.dir={root / 'prior'}", f"codes={root / 'codes'}"),
    }.items():  # fmt: skip
        ended = twostage(verb, *words)
        assert ended.code == 0, ended.err
        said[verb] = ended.out + ended.err
    return root, said


@pytest.mark.parametrize("verb", ["inspect", "train-tokenizer", "encode", "train-prior"])
def test_every_verb_warns(trained, verb):
    assert SAID in trained[1][verb]
    assert "bee" in trained[1][verb]


def test_inspect_counts_them(trained):
    found = json.loads((trained[0] / "found.json").read_text())
    assert (found["class_names"], found["untrained_classes"]) == (["ant", "bee", "cow"], ["bee"])


def test_an_untrained_class_is_neither_offered_nor_drawn(trained):
    pipeline = TwoStagePipeline.from_runs(trained[0] / "prior")
    assert pipeline.class_names == ["ant", "cow"]
    assert pipeline.label_names == ["ant", "bee", "cow"]
    assert pipeline(num_images=4).labels == [0, 2, 0, 2]
    assert pipeline(num_images=2, class_names=["cow"]).labels == [2, 2]
    for asked in ({"class_names": ["bee"]}, {"labels": [0, 1]}):
        with refuses("class name 'bee'", "no training images", "ant, cow"):
            pipeline(num_images=2, **asked)


def test_a_pipeline_folder_knows_its_untrained_classes(trained, tmp_path):
    TwoStagePipeline.from_runs(trained[0] / "prior").save_pretrained(tmp_path / "pipeline")
    assert TwoStagePipeline.from_pretrained(tmp_path / "pipeline").class_names == ["ant", "cow"]


@pytest.mark.parametrize("form", ["png", "parquet"])
def test_generate_captions_what_it_draws(trained, twostage, tmp_path, form):
    words = ("generate", trained[0] / "prior", "--num-images", 4, "--out", tmp_path / "out", "--format", form)
    ended = twostage(*words)
    assert ended.code == 0, ended.err
    assert "no training images: bee" in ended.out
    settings = json.loads((tmp_path / "out/settings.json").read_text())
    assert settings["classes"] == ["ant", "cow", "ant", "cow"]
    if form == "parquet":
        drawn = datasets.Dataset.from_parquet(str(tmp_path / "out/images/shard_00000.parquet"))
        assert drawn.features["label"].names == ["ant", "bee", "cow"]
        assert drawn["label"] == [0, 2, 0, 2]
    refused = twostage("generate", trained[0] / "prior", "--class-name", "bee", "--out", tmp_path / "bees")
    assert refused.code == 2
    assert_names(refused.err, "class name 'bee'", "no training images")
    assert not (tmp_path / "bees").exists()


def test_a_class_conditional_autoencoder_does_the_same(trained, twostage, tmp_path, configs):
    words = ("train-tokenizer", configs / "tokenizer.yaml", f"run.dir={tmp_path / 'cvae'}", "data.num_images=null",
             f"data.source={trained[0] / 'data'}", "model.bottleneck={type: class_gaussian}")  # fmt: skip
    ended = twostage(*words)
    assert ended.code == 0, ended.err
    pipeline = TwoStagePipeline.from_runs(tmp_path / "cvae")
    assert pipeline.class_names == ["ant", "cow"]
    assert pipeline(num_images=3).labels == [0, 2, 0]
    with Image.open(next((tmp_path / "cvae/samples").glob("*_classes.png"))) as sheet:
        assert sheet.width < 3 * 80, "a column for each of the two classes that were trained"


def test_other_data_may_have_other_columns(trained, twostage, tmp_path, configs):
    table = pq.read_table(trained[0] / "data/train.parquet").rename_columns(["image", "species"])
    pq.write_table(table, tmp_path / "train.parquet")
    run = tmp_path / "run"
    words = ("train-tokenizer", configs / "tokenizer.yaml", f"run.dir={run}", f"data.source={tmp_path}/train.parquet")
    ended = twostage(*words, "data.num_images=null", "data.label_column=species", "data.value_range=[0, 200]")
    assert ended.code == 0, ended.err
    for source in ("shapes", trained[0] / "data"):
        ended = twostage("reconstruct", run, "--data", source, "--out", tmp_path / "sheet.png")
        assert ended.code == 0, ended.err


def test_a_held_out_split_without_labels_measures_no_class(trained, twostage, tmp_path, configs):
    root = tmp_path / "data"
    root.mkdir()
    for split, labels in {"train": [0, 1] * 24, "test": [-1] * 8}.items():
        columns = {"image": [image(max(label, 0), i) for i, label in enumerate(labels)], "label": labels}
        names = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
        pq.write_table(pa.Table.from_pydict(columns, names.arrow_schema), root / f"{split}.parquet")
    run = tmp_path / "tokenizer"
    words = (
        "train-tokenizer",
        configs / "tokenizer.yaml",
        f"run.dir={run}",
        f"data.source={root}",
        "data.num_images=null",
    )
    ended = twostage(*words)
    assert ended.code == 0, ended.err
    assert "`test` has no labels and is used without classes" in ended.out + ended.err
    assert "with labels: 2 of 48 training images are held out as `val`" in ended.out + ended.err
    for verb, *words in (
        ("encode", run, "--out", tmp_path / "codes"),
        ("train-prior", configs / "prior.yaml", f"run.dir={tmp_path / 'prior'}", f"codes={tmp_path / 'codes'}"),
    ):
        ended = twostage(verb, *words)
        assert ended.code == 0, ended.err
    refused = twostage("evaluate", tmp_path / "prior", "--split", "test")
    assert refused.code == 2
    assert "--split test: has no labels, but" in refused.err
