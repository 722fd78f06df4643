"""Files of earlier versions are read, and their runs resume; files of later versions are refused with one message."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.drawing.two_stage import TwoStagePipeline
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.features.feature_network import FeatureNetwork
from twostage.core.data.shapes import draw_shapes
from twostage.core.images.conversion import to_float

FORMATS = Path(__file__).parent / "formats"
VERSIONS = sorted(path.name for path in FORMATS.iterdir() if path.is_dir() and path.name.isdigit())


@pytest.fixture(params=VERSIONS)
def written(request, tmp_path, monkeypatch) -> Path:
    """A copy of a version's folder, which is the working directory."""
    shutil.copytree(FORMATS / request.param, tmp_path / "written")
    monkeypatch.chdir(tmp_path / "written")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TWOSTAGE_DATA", raising=False)
    return tmp_path / "written"


def test_a_finished_run_is_finished(written, works):
    for words in (["train-tokenizer", "tokenizer.yaml"], ["train-prior", "prior.yaml"]):
        assert "finished at step 4 (all steps done); nothing left to do" in works(*words)


def test_an_interrupted_run_resumes(written, works):
    said = works("train-tokenizer", "tokenizer.yaml", "run.dir=interrupted")
    assert "Resuming from step 2 " in said
    there, here = (Autoencoder.from_pretrained(name).state_dict() for name in ("tokenizer", "interrupted"))
    for name, tensor in there.items():
        torch.testing.assert_close(here[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_moved_run_resumes_with_another_path(written, works, twostage):
    Path("interrupted").rename("moved")
    assert "Resuming from step 2 " in works("train-tokenizer", "tokenizer.yaml", "run.dir=./moved/")
    Path("prior").rename("moved prior")
    words = ["train-prior", "prior.yaml", f"run.dir={written}/moved prior"]
    assert "nothing left to do" in works(*words, f"codes={written}/codes/")
    shutil.copytree("codes", "others")
    codes = np.load("others/train.codes.npy")
    np.save("others/train.codes.npy", codes[::-1])
    ended = twostage(*words, "codes=others")
    assert ended.code == 2
    assert "codes others: holds different codes" in ended.err or "codes: " in ended.err


def test_codes_mean_what_they_meant(written):
    """The stored codes are what the stored tokenizer makes of its training images."""
    tokenizer = Autoencoder.from_pretrained("tokenizer")
    images = to_float(torch.from_numpy(draw_shapes(0, 32, (8, 8), 3, 0)))
    with torch.no_grad():
        found = tokenizer.encode(images).indices
    stored = np.load("codes/train.codes.npy", allow_pickle=False)
    assert (found.numpy() == stored).mean() > 0.99, "except for rounding on another processor"
    assert json.loads(Path("codes/manifest.json").read_text())["tokenizer"]["hash"] == tokenizer.content_hash()


def test_codes_are_used_and_an_interrupted_encoding_resumes(written, works):
    assert "already contains the codes of this tokenizer" in works("encode", "tokenizer", "--out", "codes")
    assert ".begun.partial: resuming, 0 of 96 rows" in works("encode", "tokenizer", "--out", "begun")
    assert "1 steps per epoch" not in works("train-prior", "prior.yaml", "run.dir=new", "codes=begun")


def test_generating_resumes(written, works):
    for name, file_format in (("generated", "png"), ("generated_parquet", "parquet")):
        words = ["generate", "prior", "--num-images", 3, "--format", file_format, "--out", name]
        assert "3 were already there" in works(*words)
    works("inspect", "./generated_parquet/images")


@pytest.mark.parametrize("source", ["pipeline", "pipeline without hashes", "runs"])
def test_a_pipeline_generates_the_same_images(written, source):
    if source == "runs":
        pipeline = TwoStagePipeline.from_runs("prior")
    else:
        if "without" in source:  # as its first format was
            text = '{"format_version": 1, "kind": "two_stage_pipeline"}'
            Path("pipeline/pipeline.json").write_text(text)
        pipeline = TwoStagePipeline.from_pretrained("pipeline")
    drawn = pipeline(num_images=3, seed=0, output_type="pt").images
    stored = [np.asarray(Image.open(f"generated/images/{i:06d}.png")) for i in range(3)]
    difference = drawn.permute(0, 2, 3, 1).numpy().astype(int) - np.stack(stored)
    assert np.abs(difference).max() <= 1


def test_a_feature_network_and_an_evaluation(written, works):
    assert FeatureNetwork.from_pretrained("features").config.widths == [2, 4, 8]
    works("export", "prior", "--out", "exported")
    assert "PSNR" in Path("exported/README.md").read_text(), "the evaluation is shown"


# --- newer ones -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("file", "words"), [
    ("tokenizer/model/config.json", ["reconstruct", "./tokenizer"]),
    ("prior/model/config.json", ["generate", "./prior", "--out", "out"]),
    ("features/model/config.json", ["evaluate", "tokenizer", "--features", "features"]),
    ("pipeline/pipeline.json", ["generate", "./pipeline", "--out", "out"]),
    ("codes/manifest.json", ["train-prior", "prior.yaml", "run.dir=new"]),
    ("generated/settings.json", ["generate", "prior", "--num-images", "3", "--out", "generated"]),
    ("interrupted/checkpoints/step_00000002/manifest.json",
     ["train-tokenizer", "tokenizer.yaml", "run.dir=interrupted"]),
])  # fmt: skip
@pytest.mark.parametrize("version", [99, "2.0"])
def test_a_newer_format_is_refused(written, twostage, file, words, version):
    document = json.loads(Path(file).read_text())
    Path(file).write_text(json.dumps(document | {"format_version": version}))
    ended = twostage(*words)
    assert ended.code == 2
    assert f": written in format {version}, but this version of twostage reads at most " in ended.err
    assert ended.err.endswith(". Update twostage\n")
    assert ended.err.count("error: ") == 1
