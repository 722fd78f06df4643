"""Arrays, idx files and CIFAR's batches as sources; their pickles run nothing."""

import os
import pickle

import numpy as np
import pytest
from messages import assert_names, refuses

from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images
from twostage.core.data.records import Columns
from twostage.core.data.sources import find_source

PIXELS = np.random.default_rng(0).integers(0, 255, (4, 8, 6, 3), dtype=np.uint8)


def load(source, **options):
    return load_images(DataConfig(source=str(source), image_size=(8, 6), **options))


@pytest.mark.parametrize(
    "images",
    [PIXELS, PIXELS.transpose(0, 3, 1, 2), PIXELS.astype(np.uint16) * 257, (PIXELS / 255).astype(np.float64)],
    ids=["channels last", "channels first", "16 bits", "floats"],
)
def test_the_forms_of_images(tmp_path, images):
    np.savez(tmp_path / "x.npz", x_train=images, y_train=[3, 5, 5, 3], x_test=images[:2], y_test=[[5], [3]])
    data = load(tmp_path / "x.npz")
    assert np.array_equal(data.splits["train"].pixels.numpy().transpose(0, 2, 3, 1), PIXELS)
    assert data.class_names == ["3", "5"]
    assert (data.splits["train"].labels.tolist(), data.splits["test"].labels.tolist()) == ([0, 1, 1, 0], [1, 0])
    pickle.dumps(data.splits["train"])


def test_arrays_in_files_of_their_own(tmp_path):
    np.save(tmp_path / "images.npy", PIXELS[..., 0] > 100)
    np.save(tmp_path / "labels.npy", np.array(["b", "a", "b", "a"]))
    np.save(tmp_path / "weights.npy", np.ones(4))
    data = load(tmp_path, channels=1, validation_share=0.25)
    assert data.class_names == ["a", "b"]
    assert set(np.unique(data.splits["train"].pixels)) == {0, 255}
    assert_names(" ".join(data.skipped), f"{tmp_path}/weights.npy (float64 [4])")
    assert find_source(str(tmp_path), Columns(label=None)).class_names is None


@pytest.mark.parametrize(
    ("arrays", "parts"),
    [
        ({"vectors": PIXELS[:, 0, 0]}, ["expected an array of images", "vectors uint8 [4, 3]", "another file"]),
        ({"images": np.array([{}, 1])}, ["expected an array of images", "images object"]),
        ({"images": PIXELS, "labels": [1, 2]}, ["labels has 2 classes for the 4 images", "Fix"]),
        ({"a": PIXELS, "b": PIXELS}, ["x.npz:a, x.npz:b", "expected one", "rename one to images"]),
        ({"images": PIXELS, "class": range(4), "target": range(4)}, ["x.npz:class, x.npz:target", "data.label_column"]),
        ({"x_train_test": PIXELS}, ["could be test or train", "Rename"]),
    ],
)
def test_an_npz_that_is_no_dataset(tmp_path, arrays, parts):
    np.savez(tmp_path / "x.npz", **arrays)
    with refuses(f"data.source {tmp_path}/x.npz", *parts):
        find_source(str(tmp_path / "x.npz"))


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "train-images-idx3-ubyte", "train-images-idx3-ubyte.gz"])
def test_a_damaged_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK nothing")
    for given in (tmp_path, tmp_path / name):
        with refuses(f"data.source {tmp_path / name}", "not a readable file of arrays", "Copy the file again"):
            find_source(str(given))


def test_images_of_five_channels_say_so(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((3, 8, 6, 5), np.uint8))
    with refuses("3 unreadable images", "5 channels, expected data.channels=3; set data.channels=5"):
        load(tmp_path / "x.npy")


def idx(array: np.ndarray) -> bytes:
    shape = b"".join(side.to_bytes(4, "big") for side in array.shape)
    return bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()


def test_mnist_as_it_is_published(tmp_path):
    grey = PIXELS[..., 0]
    for name, rows in {"train": [0, 1, 2], "t10k": [3]}.items():
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(idx(grey[rows]))
        (tmp_path / f"{name}-labels-idx1-ubyte").write_bytes(idx(np.array([7] * len(rows), np.uint8)))
    data = load(tmp_path, channels=1)
    assert np.array_equal(data.splits["train"].pixels[:, 0], grey[:3])
    assert np.array_equal(data.splits["test"].pixels[:, 0], grey[3:])
    assert data.class_names == ["7"]
    assert data.skipped == []


def write_cifar(folder, names=("data_batch_1", "data_batch_2", "test_batch"), labels="labels"):
    folder.mkdir()
    for i, name in enumerate(names):
        rows = np.full((2, 3072), 10 * i, np.uint8)
        rows[:, :1024] = 200
        (folder / name).write_bytes(pickle.dumps({b"data": rows, labels.encode(): [1, 0]}, protocol=2))


def test_the_batches_of_cifar(tmp_path):
    write_cifar(tmp_path / "cifar-10-batches-py")
    names = {b"label_names": [b"plane", b"car"]}
    (tmp_path / "cifar-10-batches-py" / "batches.meta").write_bytes(pickle.dumps(names, protocol=2))
    source = find_source(str(tmp_path))
    assert (source.class_names, source.splits["train"].labels.tolist()) == (["plane", "car"], [1, 0, 1, 0])
    assert [np.asarray(source.splits["train"].open(row))[0, 0].tolist() for row in (0, 2)] == [
        [200, 0, 0],
        [200, 10, 10],
    ]
    assert source.skipped == []
    write_cifar(tmp_path / "c100", ("train", "test"), "fine_labels")
    (tmp_path / "c100" / "meta").write_bytes(pickle.dumps({b"fine_label_names": [b"bee", b"cup"]}, protocol=2))
    assert find_source(str(tmp_path / "c100")).class_names == ["bee", "cup"]


class _Bomb:
    def __init__(self, marker) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["data_batch_1", "batches.meta"])
def test_a_batch_runs_nothing(tmp_path, name):
    write_cifar(tmp_path / "cifar")
    (tmp_path / "cifar" / name).write_bytes(pickle.dumps({b"data": _Bomb(tmp_path / "executed")}, protocol=2))
    with refuses(f"cifar/{name}", "posix.mkdir", "Copy the file again"):
        find_source(str(tmp_path / "cifar"))
    assert not (tmp_path / "executed").exists()
