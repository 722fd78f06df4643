"""Tar and zip files read in place: as folders are, damaged ones named, nothing unpacked to disk."""

import io
import json
import pickle
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from messages import assert_names, refuses
from PIL import Image

from twostage.core.data import archives
from twostage.core.data.archives import list_members, read_member
from twostage.core.data.data_config import DataConfig
from twostage.core.data.dataset import load_images
from twostage.core.data.sources import find_source


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write(file: Path, members: dict[str, bytes]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as opened:
            for name, content in members.items():
                opened.writestr(name, content)
        return file
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def reds(source, split: str = "train") -> list[int]:
    records = source.splits[split]
    return [np.asarray(records.open(row))[0, 0, 0].item() for row in range(len(records))]


@pytest.mark.parametrize("suffix", ["zip", "tar"])
def test_an_archive_is_read_as_its_folder_would_be(tmp_path, suffix):
    members = {"pets/train/cat/1.png": png(1), "pets/train/dog/2.png": png(2), "pets/test/cat/3.png": png(3),
               "pets/notes.txt": b"no image", "./pets/train/dog/../dog/4.png": png(4)}  # fmt: skip
    file = write(tmp_path / f"pets.{suffix}", members)
    source = find_source(str(file))
    assert source.class_names == ["cat", "dog"]
    assert (reds(source), source.splits["train"].labels.tolist()) == ([1, 2, 4], [0, 1, 1])
    assert reds(source, "test") == [3]
    assert source.skipped == [f"{file}/pets/notes.txt (not an image: .txt)"]
    assert source.splits["train"].names[0] == f"{file}/pets/train/cat/1.png"
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name]
    assert reds(find_source(str(tmp_path))) == [1, 2, 4], "the only archive in a folder"
    assert pickle.loads(pickle.dumps(source.splits["train"])).open(1).size == (8, 8)


def test_the_shards_of_a_webdataset(tmp_path):
    for shard in (0, 1):
        samples = {}
        for i in (0, 1):  # every shard counts from 0
            samples |= {f"{i:03d}.jpg": png(10 * shard + i), f"{i:03d}.cls": str(shard).encode(),
                        f"{i:03d}.txt": b"a cat\n", f"{i:03d}.json": json.dumps({"name": "tabby"}).encode(),
                        f"{i:03d}.seg.png": png(255)}  # fmt: skip
        write(tmp_path / f"pets-train-{shard:06d}.tar", samples)
    write(tmp_path / "pets-val-000000.tar", {"000.jpg": png(99), "000.cls": b"1"})
    source = find_source(str(tmp_path))
    assert (source.class_names, source.splits["train"].labels.tolist()) == (["0", "1"], [0, 0, 1, 1])
    assert (reds(source), reds(source, "val")) == ([0, 1, 10, 11], [99])
    assert source.splits["train"].captions == [("a cat",)] * 4
    assert [line.partition(" (")[0] for line in source.skipped] == [
        f"{tmp_path}/pets-train-{shard:06d}.tar/{i:03d}.seg.png" for shard in (0, 1) for i in (0, 1)
    ]
    data = load_images(DataConfig(source=str(tmp_path), image_size=8, caption_column=None, in_memory_gb=0))
    assert data.splits["train"].read(np.array([2]))[0, 0, 0, 0] == 10


def test_classes_in_json_and_in_cls_files_must_not_contradict_each_other(tmp_path):
    def source(*named: tuple[str, str]):
        members = {}
        for i, (number, name) in enumerate(named):
            label = json.dumps({"label": name}).encode()
            members |= {f"{i}.png": png(i), f"{i}.cls": number.encode(), f"{i}.json": label}
        return find_source(str(write(tmp_path / "x.tar", members)))

    assert source(("0", "cat"), ("1", "dog"), ("0", "cat")).class_names == ["cat", "dog"]
    assert source(("0", "cat"), ("1", "dog"), ("0", "tiger")).class_names == ["cat", "dog", "tiger"]
    with refuses("x.tar/2.png", "'dog'", "'0'", "data.label_column=label", "data.label_column=cls"):
        source(("0", "cat"), ("1", "dog"), ("0", "dog"))


def test_the_index_of_a_large_archive_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MIN_CACHED", 2)
    file = write(tmp_path / "x.tar", {"a.png": png(1), "b.png": png(2)})
    first = list_members(file)
    monkeypatch.setattr(archives.tarfile, "open", None)
    assert list_members(file) == first
    monkeypatch.undo()
    monkeypatch.setattr(archives, "MIN_CACHED", 2)
    assert len(list_members(write(tmp_path / "x.tar", {"a.png": png(1), "b.png": png(2), "c.png": png(3)}))) == 3


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda content: content[:700], ["not a readable .tar file", "Copy the file again"]),
        (lambda content: content[:1024] + b"\1" * 512 + content[1536:], ["byte 1,024", "Copy the file again"]),
        (lambda content: b"no tar", ["not a readable .tar file"]),
        (lambda content: b"", ["not a readable .tar file"]),
    ],
)
def test_a_damaged_tar_is_named(tmp_path, damage, parts):
    file = write(tmp_path / "x.tar", {"a.png": png(1), "b.png": png(2)})
    file.write_bytes(damage(file.read_bytes()))
    with refuses(f"data.source {file}", *parts):
        find_source(str(file))


def test_damage_and_size_in_a_zip_are_found_in_each_image(tmp_path):
    file = write(tmp_path / "x.zip", {"a.png": png(1), "b.png": png(2), "c.png": png(3)})
    offset = list_members(file)[1].offset
    content = bytearray(file.read_bytes())
    content[offset + 5] ^= 255
    file.write_bytes(content)
    data = load_images(DataConfig(source=str(file), image_size=8, on_bad_image="skip"))
    assert [line.partition(" (")[0] for line in data.bad] == [f"{file}/b.png"]
    bomb = list_members(file)[0]._replace(size=archives.MAX_SIZE + 1)
    with pytest.raises(ValueError, match="expected at most"):
        read_member(bomb)
    zeros = write(tmp_path / "bomb.zip", {"a.png": b"\0" * 10_000_000})
    member = list_members(zeros)[0]._replace(size=1000, crc=zlib.crc32(b"\0" * 1000))
    with pytest.raises(ValueError, match="damaged"):
        read_member(member)


def test_an_encrypted_zip_and_a_compressed_tar_have_a_remedy(tmp_path):
    file = write(tmp_path / "x.zip", {"a.png": png(1)})
    content = bytearray(file.read_bytes())
    content[content.rindex(b"PK\1\2") + 8] |= 1
    file.write_bytes(content)
    with refuses(f"data.source {file}", "a.png is encrypted", "Unpack it"):
        find_source(str(file))
    file.write_bytes(b"PK\3\4 cut")
    with refuses(f"data.source {file}", "not a readable .zip file", "Copy the file again"):
        find_source(str(file))
    (tmp_path / "y").mkdir()
    with tarfile.open(tmp_path / "y" / "x.tar.gz", "w:gz"):
        pass
    for given in (tmp_path / "y", tmp_path / "y" / "x.tar.gz"):
        with refuses("x.tar.gz", "tar xf x.tar.gz", "set data.source to the folder"):
            find_source(str(given))


def test_two_files_of_one_name_and_archives_of_no_split(tmp_path):
    file = write(tmp_path / "x.tar", {"a.png": png(1), "./a.png": png(2)})
    with refuses(f"data.source {file}", "two files named a.png", "different names"):
        find_source(str(file))
    file.unlink()
    for name in ("train.zip", "test.zip", "extra.zip"):
        write(tmp_path / name, {"a.png": png(1), "b.png": png(2)})
    source = find_source(str(tmp_path))
    assert set(source.splits) == {"train", "test"}
    assert_names(" ".join(source.skipped), f"{tmp_path}/extra.zip (an archive that is not a split)")
