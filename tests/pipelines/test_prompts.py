"""From a dataset with captions to images by prompt, through the commands."""

import json

import numpy as np
import pytest
import torch
import yaml
from messages import assert_names, refuses
from PIL import Image

from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.evaluation.samples import held_out_cycle
from pipelines.files.given_conditions import with_lines
from stage1_tokenizer.features.feature_network import FeatureNetwork, FeatureNetworkConfig
from stage2_prior.codes import CodeCache
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.data.spread import spread

SHORT = {"batch_size": 16, "max_steps": 4, "lr": 1e-3, "validate_every": 2, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def made(works, tmp_path_factory):
    """A tokenizer of captioned shapes, its codes, and a prior over them by caption, map and class."""
    folder = tmp_path_factory.mktemp("captions")
    tokenizer = {
        "run": {"dir": str(folder / "tokenizer"), "trackers": []},
        "data": {"source": "captioned_shapes", "image_size": 16, "num_images": 96},
        "model": {
            "latent_channels": 4,
            "backbone": {"type": "conv", "channels": 8, "channel_mult": [1, 1], "num_res_blocks": [0, 0]},
            "bottleneck": {"type": "vector", "codebook_size": 16},
        },
        "train": SHORT,
    }
    prior = {
        "run": {"dir": str(folder / "prior"), "trackers": []},
        "codes": str(folder / "codes"),
        "condition": [{"type": "text", "units": "words", "depth": 1}, {"type": "map", "depth": 1}, {"type": "class"}],
        "model": {"type": "masked_transformer", "hidden_size": 16, "depth": 1, "num_heads": 2},
        "train": SHORT,
    }
    for name, document in {"tokenizer": tokenizer, "prior": prior}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    works("train-tokenizer", folder / "tokenizer.yaml")
    works("encode", folder / "tokenizer", "--out", folder / "codes")
    works("train-prior", folder / "prior.yaml")
    return folder


def test_training_draws_held_out_captions(made):
    assert {path.name for path in (made / "prior" / "samples").iterdir()} == {"step_00000002.png", "step_00000004.png"}
    config = json.loads((made / "prior" / "model" / "config.json").read_text())
    assert [each["type"] for each in config["conditions"]] == ["text", "map", "class"]
    assert "turquoise" in config["conditions"][0]["vocabulary"]["entries"]


def test_maps_may_be_images(made, works, tmp_path):
    """Sketches beside images, in grey: through `encode`, `train-prior` and `generate`."""
    random = np.random.Generator(np.random.Philox(0))
    for split, count in {"train": 16, "val": 8}.items():
        for i in range(count):
            for folder, shape in {"images": (16, 16, 3), "sketches": (16, 16)}.items():
                path = tmp_path / folder / split / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(path)
    works("encode", made / "tokenizer", "--data", tmp_path / "images", "--out", tmp_path / "codes",
          f"data.maps={tmp_path / 'sketches'}", "data.map_kind=image")  # fmt: skip
    works("train-prior", made / "prior.yaml", f"codes={tmp_path / 'codes'}", f"run.dir={tmp_path / 'prior'}",
          "condition=map", "train.max_steps=2")  # fmt: skip
    images = []
    for name in ("0.png", "1.png"):
        sketch = tmp_path / "sketches" / "val" / name
        works("generate", tmp_path / "prior", "--map", sketch, "--num-images", 1, "--out", tmp_path / f"drawn {name}")
        images.append((tmp_path / f"drawn {name}" / "images" / "000000.png").read_bytes())
    pipeline = TwoStagePipeline.from_pretrained(tmp_path / "prior")
    assert pipeline.map_channels == 1
    with refuses("map", "1 channel of 16x16", "(3, 16, 16)"):
        pipeline(num_images=1, maps=[np.zeros((3, 16, 16), dtype=np.uint8)])


def test_prompts_maps_and_classes_are_drawn_and_stored(made, works, tmp_path):
    prompts = ["a small red star in the centre, on black", "a large blue circle at the top left, on white"]
    (tmp_path / "prompts.txt").write_text(prompts[1] + "\n\n", encoding="utf-8")
    Image.fromarray(np.full((16, 16), 5, dtype=np.uint8)).save(tmp_path / "map.png")
    words = ["generate", made / "prior", "--num-images", 4, "--prompt", prompts[0], "--prompts",
             tmp_path / "prompts.txt", "--negative-prompt", "a ring", "--guidance-scale", "text=3,class=2"]  # fmt: skip
    works(*words, "--out", tmp_path / "plain")
    settings = json.loads((tmp_path / "plain" / "settings.json").read_text())
    assert settings["prompts"] == prompts
    assert settings["guidance_scale"] == {"text": 3.0, "class": 2.0}
    works(*words, "--map", tmp_path / "map.png", "--class-name", "star", "--out", tmp_path / "mapped")
    first, second = (tmp_path / name / "images" / "000000.png" for name in ("plain", "mapped"))
    assert first.read_bytes() != second.read_bytes()
    assert "4 were already there" in works(*words, "--out", tmp_path / "plain")
    image = tmp_path / "plain" / "images" / "000000.png"
    works("inpaint", made / "prior", image, "left", "--prompt", prompts[1], "--out", tmp_path / "inpainted")


def test_mistakes_are_named(made, twostage, tmp_path):
    for words, named in (
        (["--prompt", "a purple star"], ("'purple'", "star")),
        (["--prompt", ""], ("prompt ''", "Omit")),
        (["--guidance-scale", "style=2"], ("guidance_scale 'style'", "text and map and class")),
        (["--guidance-scale", "lots"], ("guidance_scale", "'lots'", "class=1.5,text=4")),
        (["--map", made / "prior" / "losses.png"], ("--map", "mode RGB", "palette or grey values")),
    ):
        ended = twostage("generate", made / "prior", *words, "--out", tmp_path / "refused")
        assert ended.code == 2
        assert_names(ended.err, *named)
        assert not (tmp_path / "refused").exists()


def test_evaluation_measures_what_the_prior_listens_to_and_draws(made, works):
    works("evaluate", made / "prior", "--num-images", 20, "--num-samples", 10)
    figures = json.loads((made / "prior" / "evaluation" / "evaluation.json").read_text())["figures"]
    for kind in ("text", "map", "class"):
        assert {f"{kind}_saves", f"wrong_{kind}_costs", f"{kind}_matches"} <= figures.keys()
    assert figures["text_matches_by_chance"] == pytest.approx(1 / 16)
    assert {"all_right", "colour_and_shape_right_unseen", "map_overlap"} <= figures.keys()


def test_judged_samples_show_what_held_out_images_show(made, works, tmp_path):
    pipeline = TwoStagePipeline.from_pretrained(made / "prior")
    config = FeatureNetworkConfig(image_size=(16, 16), channels=3, class_names=pipeline.label_names, widths=[4])
    FeatureNetwork(config).save_pretrained(tmp_path / "network")
    works("evaluate", made / "prior", "--num-images", 20, "--num-samples", 6, "--features", tmp_path / "network",
          "--json", tmp_path / "found.json")  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["protocol"]["samples"]["conditions"] == "class, text, map of 6 held-out images in turn"
    assert "class_accuracy" in found["figures"]
    split = CodeCache(made / "codes").validation
    rows = spread(len(split), 6)
    cycle = held_out_cycle(pipeline.prior, split, rows)
    assert list(cycle.captions) == [texts[0] for texts in split.read_captions(rows)]
    names = [pipeline.label_names[label] for label in split.read_labels(rows)]
    asked = {"class_names": names, "prompt": list(cycle.captions), "maps": list(split.read_maps(rows).numpy())}
    images = torch.cat([pixels for pixels, _ in pipeline.draw(range(6), cycle, SamplingConfig(), seed=0)])
    assert torch.equal(images, pipeline(num_images=6, seed=0, output_type="pt", **asked).images)


def test_a_line_may_be_an_object(made, works, tmp_path):
    prompt = "a small red star in the centre, on black"
    Image.fromarray(np.full((16, 16), 5, dtype=np.uint8)).save(tmp_path / "five.png")
    Image.fromarray(np.zeros((16, 16), dtype=np.uint8)).save(tmp_path / "zero.png")
    lines = [
        {"class": "star", "prompt": prompt, "map": "five.png", "negative_prompt": "a ring"},
        {"prompt": "a large blue circle", "negative_prompt": "a star", "class": "circle", "map": "zero.png"},
    ]
    file = tmp_path / "lines.jsonl"
    file.write_text("\n\n".join(map(json.dumps, lines)), encoding="utf-8")
    words = ["generate", made / "prior", "--guidance-scale", 2]
    works(*words, "--num-images", 3, "--prompts", file, "--out", tmp_path / "both")
    settings = json.loads((tmp_path / "both" / "settings.json").read_text())
    assert settings["prompts"] == [prompt, "a large blue circle"]
    assert settings["negative_prompt"] == ["a ring", "a star"]
    assert settings["classes"] == ["star", "circle", "star"]
    # Image 0 is what the same options draw alone.
    one = ["--num-images", 1, "--prompt", prompt, "--negative-prompt", "a ring", "--map", tmp_path / "five.png"]
    works(*words, *one, "--class-name", "star", "--out", tmp_path / "one")
    first, same = (tmp_path / name / "images" / "000000.png" for name in ("both", "one"))
    assert first.read_bytes() == same.read_bytes()
    # Image 1 is what the pipeline draws of the second line.
    pipeline = TwoStagePipeline.from_pretrained(made / "prior")
    second = pipeline(
        2, ["circle"], prompt="a large blue circle", negative_prompt="a star", maps=[np.zeros((16, 16), np.uint8)],
        guidance_scale=2.0,
    ).images[1]  # fmt: skip
    assert np.array_equal(np.asarray(second), np.asarray(Image.open(tmp_path / "both" / "images" / "000001.png")))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('a star\n\n{"prompt": "a ring"', ("lines.jsonl, line 3", "not a JSON object", '{"prompt": "a star"')),
        ('{"promt": "a star"}', ("line 1", "'promt'", "did you mean 'prompt'?")),
        ('{"colour": "red"}', ("line 1", "'colour'", "expected prompt, negative_prompt, class, map, vector")),
        ('{"prompt": 5}', ("line 1: prompt", "text in quotes", "got 5")),
        ('{"prompt": null}', ("line 1: prompt", "text in quotes", "got None")),
        ("{}", ("line 1", "empty object", "at least one of")),
        ('{"map": "none.png"}', ("line 1: map none.png", "no such file", "expected an image")),
        ('{"vector": ["x"]}', ("line 1: vector", "list of numbers", "['x']")),
        ('{"vector": {"x": 1}}', ("line 1: vector", ".npy file or a list of numbers", "{'x': 1}")),
        ('{"vector": "two.npy"}', ("line 1: vector two.npy", "expected one vector", "got 2")),
        ('a star\n{"prompt": "a ring", "class": "ring"}', ("line 2", "prompt and class", "Give every line the same")),
        ("\n \n", ("lines.jsonl", "has no prompt", "Write one")),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named(text, named, tmp_path):
    np.save(tmp_path / "two.npy", np.zeros((2, 3)))
    (tmp_path / "lines.jsonl").write_text(text, encoding="utf-8")
    with refuses(*named) as refused:
        with_lines({}, tmp_path / "lines.jsonl")
    assert "\n" not in str(refused.value)


def test_lines_go_with_options(tmp_path):
    file = tmp_path / "lines.jsonl"
    file.write_text('{"vector": [1, 2.5]}\n{"vector": "v.npy"}', encoding="utf-8")
    np.save(tmp_path / "v.npy", np.ones(2))
    merged = with_lines({"class": ["star"]}, file)
    assert (merged["class"], merged["vector"][0], merged["vector"][1].tolist()) == (["star"], [1, 2.5], [1, 1])
    with refuses("--vector", "lines.jsonl", "Remove one"):
        with_lines({"vector": [[0, 0]]}, file)


def test_the_number_of_a_wrong_value_is_named(made):
    pipeline = TwoStagePipeline.from_pretrained(made / "prior")
    with refuses("number 2 of 2", "'purple'"):
        pipeline(1, prompt=["a red star", "a purple star"])
    with refuses("number 1 of 2", "label 9", "Use 0"):
        pipeline(1, maps=[np.full((16, 16), 9), np.zeros((16, 16), int)])
