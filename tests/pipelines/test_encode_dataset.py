"""The codes on disk are those of the tokenizer, and the manifest describes them."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from messages import assert_names
from PIL import Image

from pipelines.encoding import dataset_codes, partial_codes
from pipelines.encoding.new_prior import new_prior
from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.autoencoder_config import AutoencoderConfig, ModelConfig
from stage1_tokenizer.bottlenecks.lookup_free import LookupFreeConfig
from stage2_prior.codes import Augmentation, CodeCache
from stage2_prior.networks.causal_transformer import CausalTransformerConfig
from stage2_prior.prior import prior_config
from twostage.core.config.sections import parse_config
from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images
from twostage.core.data.image_data import ImageSplit
from twostage.core.images.conversion import to_float
from twostage.core.machine.overlap import BackgroundWriter
from twostage.core.training.random import seed_for

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(runs):
    return load_images(
        parse_config(DataConfig, yaml.safe_load((runs.tokenizer / "config.yaml").read_text())["data"], "")
    )


def modified(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_images(folder: Path, count: int) -> Path:
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (20, 20), (40 * i, 250 - 40 * i, 90)).save(folder / f"{i}.png")
    return folder


def test_codes_are_those_of_the_images(runs, data):
    model, cache = Autoencoder.from_pretrained(runs.tokenizer), CodeCache(runs.codes)
    assert cache.splits.keys() == data.splits.keys()
    for name, split in data.splits.items():
        everything = torch.arange(len(split))
        assert torch.equal(cache.splits[name].read(everything), model.encode(to_float(split.read(everything))).indices)
        assert torch.equal(cache.splits[name].read_labels(everything), split.labels)
    assert np.load(runs.codes / "train.codes.npy").dtype == np.uint16


def test_the_manifest_describes_the_codes(runs, data):
    manifest = CodeCache(runs.codes).manifest
    assert manifest.tokenizer.hash == Autoencoder.from_pretrained(runs.tokenizer).content_hash()
    assert manifest.tokenizer.path == str(runs.tokenizer)
    assert (manifest.grid, manifest.codebook_size, manifest.image_size, manifest.channels) == ((4, 4), 16, (16, 16), 3)
    assert (manifest.source, manifest.class_names, manifest.validation_split) == ("shapes", data.class_names, "test")
    assert {name: files.rows for name, files in manifest.splits.items()} == {"train": 320, "test": 64}


def test_codes_of_bits_are_described_by_their_digits(tmp_path):
    """17 bits need int32; a prior of them needs no table."""
    group = ModelConfig(latent_channels=17, bottleneck=LookupFreeConfig())
    model = Autoencoder(AutoencoderConfig(image_size=16, channels=3, model=group))
    model.save_pretrained(tmp_path / "tokenizer")
    images = write_images(tmp_path / "images", 6)
    cache = CodeCache(dataset_codes.encode_dataset(tmp_path / "tokenizer", tmp_path / "codes", str(images)))
    assert cache.manifest.digits == [2] * 17
    assert cache.splits["train"].codes.dtype == np.int32
    prior = new_prior(model, CausalTransformerConfig(hidden_size=16, depth=1, num_heads=2, codes="digits"))
    learned = prior_config(prior.config.model, None, prior.config.loss, cache)
    assert learned.model == prior.config.model
    codes = cache.splits["train"].read(torch.arange(3))
    uniform = torch.full((3,), 17 * math.log(2) * codes[0].numel())
    torch.testing.assert_close(prior.eval().nats_per_image(codes), uniform)
    model.decode_indices(prior.sample(seeds=[0]))


def test_entropy_and_unigram_are_those_of_the_arrays(runs):
    manifest = CodeCache(runs.codes).manifest
    train, test = (np.load(runs.codes / f"{name}.codes.npy") for name in ("train", "test"))
    counts = np.array([(train == code).sum() for code in range(16)])
    used = counts[counts > 0] / train.size
    assert manifest.codes_used == len(used) > 2
    assert manifest.entropy_nats_per_code == pytest.approx(-(used * np.log(used)).sum(), rel=1e-9)
    smoothed = (counts + 1) / (train.size + 16)
    for name, codes in {"train": train, "test": test}.items():
        assert manifest.unigram_nats_per_code[name] == pytest.approx(-np.log(smoothed[codes]).mean(), rel=1e-9)


def test_a_second_call_does_nothing(runs, twostage):
    before = modified(runs.codes)
    ended = twostage("encode", runs.tokenizer, "--out", runs.codes)
    assert_names(ended.out, runs.codes, "nothing to do")
    assert modified(runs.codes) == before


def test_captioned_shapes_have_captions_and_maps_beside_the_codes_of_every_split(runs, twostage, tmp_path):
    ended = twostage("encode", runs.tokenizer, "--data", "captioned_shapes", "--out", tmp_path / "codes")
    assert ended.code == 0, ended.err
    cache = CodeCache(tmp_path / "codes")
    data = load_images(DataConfig(source="captioned_shapes", image_size=16, num_images=320))
    assert cache.manifest.validation_split == "test"
    assert {name: len(split) for name, split in cache.splits.items()} == {"train": 320, "test": 64, "unseen": 64}
    for name, split in cache.splits.items():
        rows = torch.arange(len(split))
        assert split.read_captions(rows) == data.splits[name].captions
        assert torch.equal(split.read_maps(rows), data.splits[name].maps)


def test_another_decoder_keeps_the_codes(runs, twostage, changed_tokenizer):
    ended = twostage("encode", changed_tokenizer("decoder"), "--out", runs.codes)
    assert "nothing to do" in ended.out


def test_another_encoder_has_other_codes(runs, twostage, changed_tokenizer, tmp_path):
    ended = twostage("encode", changed_tokenizer("encoder"), "--out", tmp_path / "codes")
    assert ended.code == 0
    assert CodeCache(tmp_path / "codes").manifest.tokenizer.hash != CodeCache(runs.codes).manifest.tokenizer.hash


def test_codes_are_named_after_their_run(runs, twostage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert twostage("encode", runs.tokenizer).code == 0
    assert CodeCache("codes/tokenizer").manifest == CodeCache(runs.codes).manifest


def test_another_source_without_classes(runs, twostage, tmp_path):
    images = write_images(tmp_path / "images", 6)
    ended = twostage("encode", runs.tokenizer, "--data", images, "--out", tmp_path / "codes")
    assert ended.code == 0, ended.err
    cache = CodeCache(tmp_path / "codes")
    assert (cache.manifest.source, cache.manifest.class_names) == (str(images), None)
    assert {name: len(split) for name, split in cache.splits.items()} == {"train": 5, "val": 1}
    assert cache.splits["train"].labels is None


# --- augmentation ---------------------------------------------------------------------------------------------------

AUGMENTED = ["--horizontal-flip", "--crops", "2"]


@pytest.fixture(scope="module")
def augmented(runs, twostage, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("augmented") / "codes"
    ended = twostage("encode", runs.tokenizer, "--out", folder, *AUGMENTED)
    assert ended.code == 0, ended.err
    assert_names(ended.out, "384 images", "6 variants", "2 crops", "mirrored", "1,984 rows", "grid 4x4")
    return folder


@pytest.fixture(scope="module")
def encode(runs) -> Callable[..., np.ndarray]:
    """``encode(pixels)``: the codes (n, h, w) of uint8 pixels, in the same batches as the command."""
    model = Autoencoder.from_pretrained(runs.tokenizer)
    return lambda pixels: torch.cat([model.encode(to_float(part)).indices for part in pixels.split(256)]).numpy()


def test_flips_and_crops_are_additional_rows_of_the_training_split(runs, augmented, data, encode):
    codes, plain = np.load(augmented / "train.codes.npy"), data.splits["train"].pixels
    assert codes.shape == (6 * 320, 4, 4)
    larger = load_images(data.splits["train"].config.model_copy(update={"image_size": (18, 18)})).splits["train"].pixels
    variants, places = [plain], set()
    for crop in (0, 1):
        windows = []
        for i in range(320):
            seed = seed_for("crop", i, crop)
            top, left = seed % 3, seed // 3 % 3
            places.add((top, left))
            windows.append(larger[i, :, top : top + 16, left : left + 16])
        variants.append(torch.stack(windows))
    assert len(places) == 9, "a window is missing"
    variants += [pixels.flip(-1) for pixels in variants]
    for v, pixels in enumerate(variants):
        assert np.array_equal(codes[320 * v : 320 * (v + 1)], encode(pixels)), f"variant {v}"
    assert len({codes[320 * v : 320 * (v + 1)].tobytes() for v in range(6)}) == 6, "two variants are the same"

    for name in ("test.codes.npy", "test.labels.npy"):
        assert (augmented / name).read_bytes() == (runs.codes / name).read_bytes()
    labels = data.splits["train"].labels
    assert CodeCache(augmented).splits["train"].labels.tolist() == labels.tolist() * 6


def test_the_manifest_counts_all_rows(augmented):
    manifest = CodeCache(augmented).manifest
    assert manifest.augmentation == Augmentation(horizontal_flip=True, crops=2)
    assert {name: files.rows for name, files in manifest.splits.items()} == {"train": 1920, "test": 64}
    shares = np.bincount(np.load(augmented / "train.codes.npy").ravel(), minlength=16) / (1920 * 16)
    used = shares[shares > 0]
    assert manifest.codes_used == len(used)
    assert manifest.entropy_nats_per_code == pytest.approx(-(used * np.log(used)).sum(), rel=1e-9)


@pytest.mark.parametrize(
    ("options", "variants"), [(["--horizontal-flip"], ["plain", "flip"]), (["--crops", "1"], ["plain", "crop"])]
)
def test_either_alone(options, variants, runs, augmented, twostage, tmp_path):
    ended = twostage("encode", runs.tokenizer, "--out", tmp_path / "codes", *options)
    assert ended.code == 0, ended.err
    codes, whole = np.load(tmp_path / "codes" / "train.codes.npy"), np.load(augmented / "train.codes.npy")
    places = [{"plain": 0, "crop": 1, "flip": 3}[name] for name in variants]
    assert np.array_equal(codes, np.concatenate([whole[320 * v : 320 * (v + 1)] for v in places]))


def test_crops_of_large_images_keep_their_detail(runs, twostage, encode, tmp_path):
    """They are read at 1.1 times the size. Enlarging reduced images would give other codes."""
    (tmp_path / "images").mkdir()
    noise = np.random.default_rng(0)
    for i in range(40):
        image = Image.fromarray(noise.integers(0, 256, (36, 54, 3), dtype=np.uint8))
        image.save(tmp_path / "images" / f"{i:02}.png")
    command = ["encode", runs.tokenizer, "--data", tmp_path / "images", "--out", tmp_path / "codes", "--crops", "1"]
    ended = twostage(*command)
    assert ended.code == 0, ended.err
    assert ended.out.count("are held out as `val`") == 1, "printed once, although the images are read twice"
    config = DataConfig(source=str(tmp_path / "images"), image_size=(18, 18))
    larger = load_images(config).splits["train"]
    seeds = [seed_for("crop", i, 0) for i in range(len(larger))]
    windows = [larger.pixels[i, :, s % 3 : s % 3 + 16, s // 3 % 3 : s // 3 % 3 + 16] for i, s in enumerate(seeds)]
    codes = np.load(tmp_path / "codes" / "train.codes.npy")
    assert np.array_equal(codes[len(larger) :], encode(torch.stack(windows)))


def test_codes_of_another_augmentation_are_kept(runs, augmented, twostage):
    for folder, options in [(runs.codes, AUGMENTED), (augmented, [])]:
        before = modified(folder)
        ended = twostage("encode", runs.tokenizer, "--out", folder, *options)
        assert ended.code == 2
        assert_names(ended.err, folder, "horizontal_flip=True crops=2", "horizontal_flip=False crops=0", "--out")
        assert modified(folder) == before


def test_a_negative_number_of_crops_is_refused(runs, twostage, tmp_path):
    ended = twostage("encode", runs.tokenizer, "--out", tmp_path / "codes", "--crops", "-1")
    assert ended.code == 2
    assert not list(tmp_path.glob("*codes*"))


# --- killed and run again ---------------------------------------------------------------------------------------

# Encodes as the command does, and sends itself SIGKILL when it reads images for the n-th time.
KILLED = """
import os, signal, sys
from twostage.core.data.image_data import ImageSplit
from twostage.core.machine.overlap import BackgroundWriter
from pipelines.cli import main

BackgroundWriter.__call__ = lambda writer, function, *arguments: function(*arguments)  # what was encoded is written
left, read = int(os.environ["READS"]), ImageSplit.read

def counted(self, rows):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, rows)

ImageSplit.read = counted
main()
"""


def test_missing_chunks_are_noticed(runs, twostage, tmp_path, monkeypatch):
    """The second of two processes wrote to a disk of its own."""
    encode_split = dataset_codes._encode_split

    def one_of_two(model, images, name, partial, state, *given):
        first = SimpleNamespace(process_index=0, num_processes=2, is_main_process=True, device=state.device)
        encode_split(model, images, name, partial, first, *given)

    words = ["encode", runs.tokenizer, "--out", tmp_path / "codes"]
    with monkeypatch.context() as patch:
        patch.setattr(dataset_codes, "_encode_split", one_of_two)
        ended = twostage(*words)
    assert ended.code == 2
    assert_names(ended.err, tmp_path / ".codes.partial", "64 of 320 rows of `train`", "Remove this folder")
    assert not (tmp_path / "codes").exists()
    assert twostage(*words).code == 0
    assert contents(tmp_path / "codes") == contents(runs.codes)


def test_a_process_that_does_not_see_the_folder(runs, twostage, tmp_path, monkeypatch):
    monkeypatch.setattr(partial_codes, "gather_object", lambda found: [*found, False])
    ended = twostage("encode", runs.tokenizer, "--out", tmp_path / "codes")
    assert ended.code == 2
    assert_names(ended.err, tmp_path / ".codes.partial", "not visible to all processes", "one machine")


def test_an_empty_folder_is_used(runs, twostage, tmp_path):
    (tmp_path / "codes").mkdir()
    ended = twostage("encode", runs.tokenizer, "--out", tmp_path / "codes")
    assert ended.code == 0, ended.err
    assert contents(tmp_path / "codes") == contents(runs.codes)


def test_a_killed_call_resumes_to_the_same_codes(runs, augmented, twostage, tmp_path):
    """The training images are read in two chunks, each in two sizes. The kill comes within the second chunk."""
    words = ["encode", str(runs.tokenizer), "--out", str(tmp_path / "codes"), *AUGMENTED]
    environment = {**os.environ, "LOCAL_WORLD_SIZE": "1000", "READS": "3"}  # one thread, as in this process
    killed = subprocess.run([sys.executable, "-c", KILLED, *words], cwd=ROOT, env=environment, capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()
    assert not (tmp_path / "codes").exists()
    ended = twostage(*words)
    assert ended.code == 0, ended.err
    assert_names(ended.out, ".codes.partial: resuming, 1,536 of 1,984 rows")
    assert contents(tmp_path / "codes") == contents(augmented)
    assert [path.name for path in tmp_path.glob("*codes*")] == ["codes"], "something else is left"


class Killed(BaseException):
    """Ends a call wherever it is."""


EVENTS = {"read": ImageSplit, "flush": np.memmap, "rename": Path, "replace": Path, "unlink": Path,
          "rmtree": partial_codes.shutil}  # fmt: skip


@pytest.fixture
def killed_before(twostage) -> Callable[..., bool]:
    """``killed_before(n, names, *words)``: `twostage WORDS`, ended before its n-th event of these names; False if it
    finished. What is written in the background is written at once, so that events have one order."""

    def killed_before(number: int, names: list[str], *words: object) -> bool:
        numbers = iter(range(1, 1000))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(BackgroundWriter, "__call__", lambda writer, function, *arguments: function(*arguments))
            for name in names:
                original = getattr(EVENTS[name], name)

                def watched(*arguments, original=original, **options):
                    if next(numbers) == number:
                        raise Killed
                    return original(*arguments, **options)

                patch.setattr(EVENTS[name], name, watched)
            try:
                assert twostage(*words).code == 0
            except Killed:
                return True
            return False

    return killed_before


def test_wherever_it_is_killed(runs, twostage, killed_before, tmp_path):
    words, expected, there = ["encode", runs.tokenizer, "--out", tmp_path / "codes"], contents(runs.codes), []
    number = 1
    while killed_before(number, list(EVENTS), *words):
        ended = twostage(*words)
        assert ended.code == 0, ended.err
        assert contents(tmp_path / "codes") == expected, f"killed before event {number}"
        assert not (tmp_path / ".codes.partial").exists(), f"killed before event {number}"
        there += [int(line.split()[2]) for line in ended.out.splitlines() if ": resuming, " in line]
        (tmp_path / "codes").rename(tmp_path / f"codes_{number}")
        number += 1
    assert number > 10
    assert sorted(set(there)) == [0, 256, 320, 384]
    assert there == sorted(there), "the number of finished rows decreases"


def test_chunks_of_another_process_are_kept(runs, twostage, killed_before, tmp_path):
    """With two processes, the second chunk can be finished before the first."""
    words = ["encode", runs.tokenizer, "--out", tmp_path / "codes"]
    assert killed_before(3, ["read"], *words)
    partial = tmp_path / ".codes.partial"
    done, codes = (np.load(partial / name, mmap_mode="r+") for name in ("train.done.npy", "codes/train.codes.npy"))
    assert done.tolist() == [1, 1]
    done[0], codes[:256] = 0, 9
    del done, codes
    ended = twostage(*words)
    assert_names(ended.out, ".codes.partial: resuming, 64 of 384 rows")
    assert contents(tmp_path / "codes") == contents(runs.codes)


def test_a_leftover_with_other_settings_is_discarded(runs, twostage, killed_before, changed_tokenizer, tmp_path):
    images = write_images(tmp_path / "images", 6)
    begun = {
        "tokenizer: was '": [changed_tokenizer("encoder")],
        "rows.train: was 5, now 320; ": [runs.tokenizer, "--data", images],
        "rows.train: was 640, now 320; augmentation.crops: was 1, now 0)": [runs.tokenizer, "--crops", "1"],
    }
    for number, (difference, words) in enumerate(begun.items()):
        out = tmp_path / str(number) / "codes"
        assert killed_before(1, ["read"], "encode", *words, "--out", out)
        ended = twostage("encode", runs.tokenizer, "--out", out)
        assert ended.code == 0, ended.err
        assert_names(ended.out, f"{out.with_name('.codes.partial')}: discarded", f"({difference}")
        assert contents(out) == contents(runs.codes)


def test_a_leftover_with_fewer_images_is_discarded(runs, twostage, killed_before, tmp_path):
    words = ["encode", runs.tokenizer, "--out", tmp_path / "codes"]
    words += ["--data", write_images(tmp_path / "images", 6)]
    assert killed_before(1, ["read"], *words)
    Image.new("RGB", (20, 20)).save(tmp_path / "images" / "7.png")
    assert_names(twostage(*words).out, "discarded", "(rows.train: was 5, now 6; ")
    assert len(CodeCache(tmp_path / "codes").splits["train"]) == 6


def test_an_incomplete_leftover_is_discarded(runs, twostage, tmp_path):
    leftover = tmp_path / ".codes.partial"
    leftover.mkdir()
    (leftover / "train.codes.npy").write_bytes(b"half")
    assert twostage("encode", runs.tokenizer, "--out", tmp_path / "codes").code == 0
    assert not leftover.exists()
    assert contents(tmp_path / "codes") == contents(runs.codes)


# --- shares of several machines -------------------------------------------------------------------------------------


def test_shares_of_several_machines_become_the_same_codes(runs, augmented, twostage, killed_before, tmp_path):
    """Four shares of two chunks: the first is killed and resumed, the second is copied here, the others are empty."""
    words = ["encode", runs.tokenizer, "--out", tmp_path / "codes", *AUGMENTED]
    assert killed_before(3, ["flush"], *words, "--shard", "1/4")
    ended = twostage(*words, "--shard", "1/4")
    assert ended.code == 0, ended.err
    assert_names(ended.out, ".codes.shard-1-of-4: resuming", ".codes.shard-1-of-4: done", "without --shard")
    elsewhere = ["encode", runs.tokenizer, "--out", tmp_path / "elsewhere" / "codes", *AUGMENTED]
    assert twostage(*elsewhere, "--shard", "2/4").code == 0
    (tmp_path / "elsewhere" / ".codes.shard-2-of-4").rename(tmp_path / ".codes.shard-2-of-4")
    other = tmp_path / ".codes.shard-9-of-9"
    other.mkdir()
    read = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset_codes, "to_float", lambda pixels: read.append(len(pixels)) or to_float(pixels))
        ended = twostage(*words)
    assert ended.code == 0, ended.err
    assert_names(ended.out, "shard-1-of-4: 1,600 more rows", "shard-2-of-4: 384 more rows", other, "not used")
    assert not read, "all rows were done"
    assert contents(tmp_path / "codes") == contents(augmented)
    assert {path.name for path in tmp_path.glob("*codes*")} == {"codes", other.name}, "only what is not ours is left"


def test_a_missing_share_is_encoded_by_the_last_call(runs, twostage, tmp_path):
    words = ["encode", runs.tokenizer, "--out", tmp_path / "codes"]
    assert twostage(*words, "--shard", "2/2").code == 0
    assert twostage(*words).code == 0
    assert contents(tmp_path / "codes") == contents(runs.codes)


@pytest.mark.parametrize("shard", ["0/4", "5/4", "2", "1/0", "a/b"])
def test_a_share_that_does_not_exist(runs, twostage, tmp_path, shard):
    ended = twostage("encode", runs.tokenizer, "--out", tmp_path / "codes", "--shard", shard)
    assert ended.code == 2
    assert_names(ended.err, f"--shard {shard}", "NUMBER/COUNT", "2/4")
