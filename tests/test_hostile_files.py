"""Malicious files: nothing in them is executed, nothing outside is read, and each gives one error message."""

import json
import os
import pickle
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from pipelines.drawing.two_stage import TwoStagePipeline
from stage1_tokenizer.features.feature_network import FeatureNetwork, FeatureNetworkConfig


@pytest.fixture(autouse=True)
def _own_machine(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TWOSTAGE_DATA", raising=False)


class _Bomb:
    """Creates `executed` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def bomb(tmp_path) -> dict[str, bytes]:
    """The same pickle in each of the file formats of weights."""
    marker = tmp_path / "executed"
    plain = pickle.dumps({"state_dict": _Bomb(marker)})
    torch.save({"state_dict": _Bomb(marker), "model": _Bomb(marker)}, tmp_path / "saved")
    np.save(tmp_path / "array.npy", np.array([_Bomb(marker)], dtype=object), allow_pickle=True)
    found = {name: (tmp_path / name).read_bytes() for name in ("saved", "array.npy")}
    for name in found:
        (tmp_path / name).unlink()
    return {"pickle": plain, **found}


@pytest.fixture
def refused(twostage, tmp_path) -> Callable[..., str]:
    """``refused(*words)``: the one error message of `twostage WORDS`; nothing was executed."""

    def refused(*words: object) -> str:
        ended = twostage(*words)
        assert ended.code == 2, ended
        assert ended.err.count("error: ") == 1
        assert "Traceback" not in ended.err
        assert not (tmp_path / "executed").exists(), "it was executed"
        return ended.err

    return refused


def test_the_bomb_is_a_real_one(bomb, tmp_path):
    pickle.loads(bomb["pickle"])
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("wrapping", ["pickle", "saved"])
def test_weights_that_are_a_pickle(refused, runs, bomb, wrapping, tmp_path):
    for name in ("tokenizer", "prior"):
        shutil.copytree(getattr(runs, name), tmp_path / name)
        (tmp_path / name / "model" / "model.safetensors").write_bytes(bomb[wrapping])
    assert "model.safetensors cannot be read" in refused("reconstruct", "./tokenizer")
    assert "model.safetensors cannot be read" in refused("encode", "./tokenizer", "--out", "codes")
    assert "model.safetensors cannot be read" in refused("generate", "./prior", "--out", "out")

    TwoStagePipeline.from_runs(runs.prior).save_pretrained(tmp_path / "pipeline")
    (tmp_path / "pipeline/prior/model.safetensors").write_bytes(bomb[wrapping])
    assert "prior/model.safetensors has the hash" in refused("generate", "./pipeline", "--out", "out")
    document = json.loads((tmp_path / "pipeline/pipeline.json").read_text())  # even if it lists that hash
    from twostage.core.files import file_sha256

    document["sha256"]["prior/model.safetensors"] = file_sha256(tmp_path / "pipeline/prior/model.safetensors")
    (tmp_path / "pipeline/pipeline.json").write_text(json.dumps(document))
    assert "model.safetensors cannot be read" in refused("generate", "./pipeline", "--out", "out")

    config = FeatureNetworkConfig(image_size=(16, 16), channels=3, class_names=["a", "b"], widths=[4])
    FeatureNetwork(config).save_pretrained(tmp_path / "features")
    (tmp_path / "features/model.safetensors").write_bytes(bomb[wrapping])
    assert "model.safetensors cannot be read" in refused("evaluate", runs.tokenizer, "--features", "features")


@pytest.mark.parametrize("wrapping", ["pickle", "saved"])
@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin"])
def test_published_weights_that_are_a_pickle(refused, bomb, wrapping, name, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / name).write_bytes(bomb[wrapping])
    (tmp_path / "source" / "config.json").write_text("{}")
    refused("import", f"source/{name}", "--out", "runs/imported")
    refused("import", "source", "--out", "runs/imported")


@pytest.mark.parametrize("wrapping", ["pickle", "saved"])
def test_perceptual_and_inception_weights_that_are_a_pickle(refused, runs, configs, bomb, wrapping, tmp_path):
    (tmp_path / "vgg16-397923af.pth").write_bytes(bomb[wrapping])
    (tmp_path / "pt_inception.pth").write_bytes(bomb[wrapping])
    words = ["train-tokenizer", configs / "tokenizer.yaml", "run.dir=run", "train.max_steps=1", "data.image_size=32"]
    refused(*words, "loss.perceptual={type: lpips}", "--weights-dir", ".")
    refused("evaluate", runs.tokenizer, "--inception", "pt_inception.pth")


def test_arrays_that_are_a_pickle(refused, runs, configs, bomb, tmp_path):
    shutil.copytree(runs.codes, tmp_path / "codes")
    (tmp_path / "codes" / "train.codes.npy").write_bytes(bomb["array.npy"])
    words = ["train-prior", configs / "prior.yaml", "run.dir=run"]
    assert "train.codes.npy: expected integers, found object" in refused(*words, "codes=codes")
    shutil.rmtree(tmp_path / "codes")
    shutil.copytree(runs.codes, tmp_path / "codes")
    (tmp_path / "codes" / "train.labels.npy").write_bytes(bomb["array.npy"])
    assert "train.labels.npy: expected integers, found object" in refused(*words, "codes=codes")


def test_an_interrupted_encode_that_is_a_pickle(twostage, runs, bomb, tmp_path):
    """It is discarded and never loaded."""
    partial = tmp_path / ".codes.partial"
    shutil.copytree(runs.codes, partial / "codes")
    (partial / "identity.json").write_text("{}")
    for split in ("train", "test"):
        (partial / f"{split}.done.npy").write_bytes(bomb["array.npy"])
    ended = twostage("encode", runs.tokenizer, "--out", "codes")
    assert ended.code == 0, ended.err
    assert "discarded" in ended.out
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_that_is_a_pickle(refused, configs, twostage, bomb, tmp_path):
    words = [
        "train-tokenizer",
        configs / "tokenizer.yaml",
        "run.dir=run",
        "train.max_steps=5",
        "train.checkpoint_every=2",
    ]
    assert twostage(*words, "--time-limit", "0").code == 75
    folder = tmp_path / "run/checkpoints/step_00000001"
    (folder / "model.safetensors").write_bytes(bomb["saved"])
    assert "model.safetensors has changed since it was written" in refused(*words)
    from twostage.core.runs.checkpoint import _fingerprint

    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = _fingerprint(folder / "model.safetensors")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "model.safetensors cannot be read" in refused(*words)


@pytest.mark.parametrize("text", ["!!python/object/apply:os.mkdir ['executed']", "run: !!python/name:os.system {}"])
def test_yaml_that_would_run_something(refused, runs, text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    assert "not valid YAML" in refused("train-tokenizer", "config.yaml")
    shutil.copytree(runs.tokenizer, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(text)
    assert "config.yaml" in refused("encode", "./run", "--out", "codes")


# --- paths that leave a folder --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "tokenizer/../../secret", "a\0b", "..\\secret"])
def test_a_pipeline_that_lists_files_outside(refused, runs, name, tmp_path):
    (tmp_path / "secret").write_text("secret")
    TwoStagePipeline.from_runs(runs.prior).save_pretrained(tmp_path / "pipeline")
    document = json.loads((tmp_path / "pipeline/pipeline.json").read_text())
    document["sha256"][name] = "0" * 64
    (tmp_path / "pipeline/pipeline.json").write_text(json.dumps(document))
    said = refused("generate", "./pipeline", "--out", "out")
    assert "which is not a file of this folder" in said
    assert "has the hash" not in said, "it was not read"


def test_a_manifest_with_codes_outside(refused, runs, configs, tmp_path):
    shutil.copytree(runs.codes, tmp_path / "codes")
    (tmp_path / "codes/train.codes.npy").rename(tmp_path / "train.codes.npy")
    document = json.loads((tmp_path / "codes/manifest.json").read_text())
    document["splits"]["train"]["codes"] = "../train.codes.npy"
    (tmp_path / "codes/manifest.json").write_text(json.dumps(document))
    said = refused("train-prior", configs / "prior.yaml", "run.dir=run", "codes=codes")
    assert "codes/train.codes.npy: missing" in said


@pytest.mark.parametrize("path", ["/etc/hostname", "../outside.png", "link/outside.png"])
def test_a_table_whose_paths_lead_outside(twostage, path, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    (tmp_path / "data").mkdir()
    for name in ("outside.png", "data/inside.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    (tmp_path / "data/link").symlink_to("..")
    cells = [{"bytes": None, "path": "inside.png"}] * 4
    pq.write_table(pa.table({"image": cells}), tmp_path / "data/train.parquet")
    pq.write_table(pa.table({"image": [*cells, {"bytes": None, "path": path}]}), tmp_path / "data/test.parquet")
    ended = twostage("inspect", "./data", "--json", "found.json", "--image-size", "8")
    assert ended.code == 0, ended.err
    document = json.loads((tmp_path / "found.json").read_text())
    assert {name: len(used) for name, used in document["used"].items()} == {"train": 4, "test": 4}
    assert document["skipped"] == [
        f"data:test:4 (the path {path} leaves the table's folder)",
        "data/link/data (a link to a parent folder)",
        *(["data/link/outside.png (in no table)"] if path == "/etc/hostname" else []),
    ]


# --- documents and headers with wrong values ------------------------------------------------------------------------

LIES = [None, True, -1, 2**70, 1.5, "x", "", [], {}, [[]], {"a": 1}, float("nan")]


def places(document: dict, prefix: tuple = ()) -> list[tuple]:
    found = []
    for key, value in document.items():
        found.append((*prefix, key))
        if isinstance(value, dict):
            found += places(value, (*prefix, key))
    return found


@pytest.mark.parametrize("file", ["tokenizer/model/config.json", "prior/model/config.json", "codes/manifest.json",
                                  "pipeline/pipeline.json", "out/settings.json"])  # fmt: skip
def test_every_key_of_every_document_may_lie(twostage, runs, configs, file, tmp_path):
    """Whatever the value of a key, even a missing one: the command works, or gives one error message."""
    for name in ("tokenizer", "prior", "codes"):
        shutil.copytree(getattr(runs, name), tmp_path / name)
    TwoStagePipeline.from_runs(runs.prior).save_pretrained(tmp_path / "pipeline")
    generate = ["--num-images", 2, "--out", "out"]
    words = {
        "tokenizer": ["reconstruct", "./tokenizer", "--data", "shapes", "--out", "image.png"],
        "prior": ["generate", "./prior", *generate],
        "codes": ["train-prior", configs / "prior.yaml", "codes=codes", "run.dir=run", "train.max_steps=1"],
        "pipeline": ["generate", "./pipeline", *generate],
        "out": ["generate", "./pipeline", *generate],
    }[file.split("/")[0]]
    if file.startswith("out"):
        assert twostage(*words).code == 0
    whole = json.loads((tmp_path / file).read_text())
    contents = ["", "{", "[]", "7", "[" * 100_000, '{"a": ' * 100_000, "\0", '{"format_version": 99}']
    chosen = np.random.default_rng(0)
    for place in places(whole):
        for value in [*chosen.choice(len(LIES), 2, replace=False), None]:
            document = json.loads(json.dumps(whole))
            group = document
            for key in place[:-1]:
                group = group[key]
            if value is None:
                del group[place[-1]]
            else:
                group[place[-1]] = LIES[value]
            contents.append(json.dumps(document))
    refused = 0
    for content in contents:
        (tmp_path / file).write_text(content)
        for made in ("run", "image.png", *([] if file.startswith("out") else ["out"])):
            shutil.rmtree(tmp_path / made, ignore_errors=True)
        ended = twostage(*words)
        assert ended.code in (0, 2), content[:300]
        if ended.code == 2:
            refused += 1
            assert ended.err.count("error: ") == 1, (content[:300], ended.err)
            assert "Traceback" not in ended.err
    assert refused > 8


@pytest.mark.parametrize("header", [
    b"\xff" * 8,
    struct.pack("<Q", 2**40) + b"{}",
    struct.pack("<Q", 2) + b"[]",
    struct.pack("<Q", 90) + b'{"a": {"dtype": "F32", "shape": [10000000], "data_offsets": [0, 40000000]}}'.ljust(90),
    struct.pack("<Q", 100) + b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}'.ljust(100) + b"1234",
    struct.pack("<Q", 100) + b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}'.ljust(100) + b"1234",
])  # fmt: skip
def test_weights_whose_header_lies(refused, runs, header, tmp_path):
    shutil.copytree(runs.tokenizer, tmp_path / "run")
    (tmp_path / "run/model/model.safetensors").write_bytes(header)
    assert "model.safetensors cannot be read" in refused("reconstruct", "./run")


def test_a_config_cannot_ask_for_more_memory_than_its_weights_take(refused, runs, tmp_path):
    shutil.copytree(runs.tokenizer, tmp_path / "run")
    file = tmp_path / "run/model/config.json"
    document = json.loads(file.read_text())
    document["model"]["backbone"]["channels"] = 65_536
    file.write_text(json.dumps(document))
    assert "the weights do not fit config.json" in refused("reconstruct", "./run")


def test_a_run_of_a_newer_version_says_so(refused, runs, tmp_path):
    shutil.copytree(runs.tokenizer, tmp_path / "run")
    document = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    document["model"]["colour_theory"] = 1
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(document))
    (tmp_path / "new.yaml").write_text(yaml.safe_dump(yaml.safe_load((runs.tokenizer / "config.yaml").read_text())))
    assert "model.colour_theory: unknown key" in refused("train-tokenizer", "new.yaml", "run.dir=run")


# --- the page -------------------------------------------------------------------------------------------------------


def test_the_page_only_serves_its_own_files_and_this_machine(runs, tmp_path):
    """Raw requests: no client cleans up the paths."""
    import subprocess
    import sys

    (tmp_path / "secret.txt").write_text("the secret")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "pipelines.cli", "app", str(runs.prior), "--port", str(port)]
    environment = {**os.environ, "LOCAL_WORLD_SIZE": "1000"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            for _ in range(600):
                if process.poll() is not None or answer(port, "/").startswith(b"HTTP/1.1 200"):
                    break
                __import__("time").sleep(0.1)
            assert answer(port, "/").startswith(b"HTTP/1.1 200")
            for path in [
                "/file=/etc/passwd", "/gradio_api/file=/etc/passwd", "/gradio_api/file=secret.txt",
                f"/gradio_api/file={tmp_path}/secret.txt", f"/file={tmp_path}/secret.txt", "/../../../../etc/passwd",
                "/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "/static/../../../../../../etc/passwd",
                "/assets/..%2f..%2f..%2f..%2f..%2fetc/passwd", "//etc/passwd", f"/{tmp_path}/secret.txt",
                "/gradio_api/file=/proc/self/environ", f"/gradio_api/file={Path(__file__).parents[1] / 'README.md'}",
                f"/gradio_api/file={runs.prior}/config.yaml", "/gradio_api/file=https://127.0.0.1/x",
                f"/gradio_api/proxy=http://127.0.0.1:{port}/", "/gradio_api/file=/proc/self/cwd/secret.txt",
            ]:  # fmt: skip
                found = answer(port, path)
                status = found.split(b" ", 2)[1]
                # A redirection does not serve a file either.
                assert status[:1] in (b"3", b"4") or (status == b"200" and b"<html" in found), (path, found[:200])
                for secret in (b"the secret", b"root:x:", b"LOCAL_WORLD_SIZE", b"run:\n", b"# twostage"):
                    assert secret not in found, (path, secret)
            own = socket.gethostbyname(socket.gethostname())
            if not own.startswith("127."):
                with pytest.raises(OSError, match="refused"):
                    socket.create_connection((own, port), timeout=5).close()
            with pytest.raises(OSError, match="refused"):
                socket.create_connection(("127.0.0.2", port), timeout=5).close()  # loopback, but another address
        finally:
            process.terminate()


def answer(port: int, path: str) -> bytes:
    """The server's answer to a GET of exactly this path; b"" if it does not listen yet."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode())
            parts = []
            while part := connection.recv(65536):
                parts.append(part)
            return b"".join(parts)
    except ConnectionError:
        return b""
