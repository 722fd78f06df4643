"""The code of docs/python.md, run as it stands on fewer images and steps."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from stage1_tokenizer.tokenizer_training import TokenizerConfig, train
from twostage import (
    Autoencoder,
    AutoencoderConfig,
    CausalTransformerConfig,
    InputError,
    Prior,
    TextConditionConfig,
    TwoStagePipeline,
    Vocabulary,
    new_prior,
)
from twostage.core.conditions.class_condition import ClassConditionConfig

REPOSITORY = Path(__file__).parents[1]
PAGE = (REPOSITORY / "docs" / "python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
SMALLER = {"STEPS, NUM_IMAGES = 500, 5000": "STEPS, NUM_IMAGES = 3, 80"}
MAX_LINES = 45


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> dict[str, Any]:
    """The names that the page's code defines, in a folder of its own."""
    names: dict[str, Any] = {"__name__": "__main__", "folder": tmp_path_factory.mktemp("page")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(names["folder"])
        for code in BLOCKS:
            for old, new in SMALLER.items():
                code = code.replace(old, new)
            exec(code, names)
    return names


def test_the_script_is_short():
    assert all(text in PAGE for text in SMALLER)
    assert len([line for line in BLOCKS[0].splitlines() if line and not line.startswith("#")]) <= MAX_LINES


def test_the_script_makes_a_pipeline(page):
    assert page["images"].shape == (80, 3, 28, 28)
    assert page["prior"].config.grid == (7, 7)
    assert page["prior"].num_classes == len(page["data"].class_names)
    assert (page["folder"] / "star.png").is_file()
    loaded = TwoStagePipeline.from_pretrained(page["folder"] / "my_pipeline")
    again, first = (each(num_images=2, seed=3, output_type="pt") for each in (loaded, page["pipeline"]))
    assert torch.equal(again.images, first.images)


def test_the_codebook_moves_and_the_average_follows(page):
    tokenizer, average = page["average"].module, page["average"]
    assert average.n_averaged == 3
    assert not torch.equal(tokenizer.bottleneck.ema_counts, torch.ones(128)), "its codes were counted"


def test_numpy_round_trip(page):
    assert page["codes"].shape == (64, 7, 7)
    assert page["pixels"].shape == (64, 3, 28, 28)
    assert page["pixels"].dtype == "uint8"


def test_the_names_in_its_text_exist(page):
    for name in re.findall(r"`(tokenizer|prior)\.(\w+)", PAGE):
        assert hasattr(page[name[0]], name[1]), name
    names = page | vars(__import__("twostage"))
    for code in re.findall(r"`(tokenizer\.bottleneck\.initialize\(.+?\)|Prior\(PriorConfig\(.+?)`", PAGE):
        names |= {name: getattr(__import__("twostage"), name) for name in ("Prior", "PriorConfig", "PixelCNNConfig")}
        exec(code, names)


def test_an_unnamed_random_follows_torch(page):
    tokenizer, images = page["tokenizer"], page["images"][:4]
    vae = Autoencoder(AutoencoderConfig.model_validate({"image_size": 28, "model": {"bottleneck": {"type": "gaussian"},
                      "latent_channels": 2, "backbone": {"type": "mlp", "hidden_sizes": [4]}}}))  # fmt: skip
    torch.manual_seed(1)
    first, other = vae(images).loss, vae(images).loss
    torch.manual_seed(1)
    assert torch.equal(vae(images).loss, first)
    assert not torch.equal(first, other), "each step has noise of its own"
    assert tokenizer.config.image_size == (28, 28), "one number is a square"


def test_a_prior_of_other_codes_is_not_used_with_a_tokenizer(page):
    config = page["prior"].config.model_dump(exclude={"tokenizer"})
    assert config["conditions"][0]["type"] == "class"
    with pytest.raises(InputError, match="new_prior"):
        TwoStagePipeline(page["tokenizer"], Prior(type(page["prior"].config)(**config)))


def test_a_prior_by_caption(page, tmp_path):
    captions, tokenizer = ["a red star", "a blue ring"], page["tokenizer"]
    text = TextConditionConfig(vocabulary=Vocabulary.learned_from(captions), max_length=12, depth=1)
    network = CausalTransformerConfig(hidden_size=16, depth=1, num_heads=2, dropout=0.0)
    prior = new_prior(tokenizer, network, conditions=[text])
    assert prior.config.class_names is None, "its only condition is the caption"
    codes, texts = torch.from_numpy(page["codes"][:2]), prior.parse("text", captions)
    torch.manual_seed(0)
    for weights in prior.parameters():  # untrained, it predicts the same for all captions
        torch.nn.init.normal_(weights, std=0.1)
    right, swapped = (prior.nats_per_image(codes, {"text": each}) for each in (texts, texts.flip(0)))
    assert not torch.allclose(right, swapped), "it reads the captions"
    pipeline = TwoStagePipeline(tokenizer, prior)
    pipeline.save_pretrained(tmp_path)
    loaded = TwoStagePipeline.from_pretrained(tmp_path)
    again, first = (each(num_images=2, prompt=captions, output_type="pt").images for each in (loaded, pipeline))
    assert torch.equal(again, first)
    with pytest.raises(InputError, match=r"'text': vocabulary is None.*learned_from"):
        new_prior(tokenizer, network, conditions=[TextConditionConfig()])


def test_a_prior_by_class_and_caption_keeps_the_classes(page):
    text = TextConditionConfig(vocabulary=Vocabulary.learned_from(["a star"]), depth=1)
    names = page["data"].class_names
    network = CausalTransformerConfig(hidden_size=16, depth=1, num_heads=2)
    prior = new_prior(page["tokenizer"], network, conditions=[ClassConditionConfig(num_classes=len(names)), text])
    assert (prior.config.class_names, prior.num_classes) == (names, len(names))


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 28, 28, dtype=torch.uint8), torch.zeros(3, 28, 28),
                                    torch.zeros(2, 1, 28, 28)])  # fmt: skip
def test_images_of_another_form_are_refused(page, images):
    with pytest.raises(InputError, match=r"to_float") as error:
        page["tokenizer"](images)
    assert str(tuple(images.shape)) in str(error.value)


def test_one_name_where_a_list_is_wanted(page):
    with pytest.raises(InputError, match=r"class_names 'star'.*\['star'\]"):
        page["pipeline"](class_names="star")


def test_a_run_has_its_history(new_process, tmp_path):
    data = {"image_size": 8, "num_images": 16}
    model = {"latent_channels": 2, "backbone": {"type": "mlp", "hidden_sizes": [4]}, "bottleneck": {"type": "identity"}}
    steps = {"batch_size": 4, "max_steps": 2, "log_every": 1, "validate_every": 2}
    document = {"run": {"dir": str(tmp_path), "trackers": []}, "data": data, "model": model, "train": steps}
    new_process()
    run = train(TokenizerConfig.model_validate(document))
    assert [(line["step"], line["split"]) for line in run.history] == [(1, "train"), (2, "train"), (2, "val")]
