"""Images of every kind, damaged in every way: `inspect` and training read the same ones, report all others, and neither
crashes."""

import io
import json
import random
import resource
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["fuzz_images"]

MEMORY = 6 * 2**30  # address space of a command in bytes; torch's libraries use most of it
NAMES = [
    "a b",
    "new\nline",
    "żółć",
    "train",
    "test.train",
    "back\\slash",
    "-rf",
    "quote'\"",
    "%s{}",
    "\u202eright",
    "dot.",
]
TRAIN = """
run: {dir: run, trackers: []}
data: {source: ../images, image_size: 8, on_bad_image: skip}
model:
  latent_channels: 2
  backbone: {type: conv, channels: 2, channel_mult: [1, 1], num_res_blocks: [0, 0]}
  bottleneck: {type: vector, codebook_size: 4}
train: {batch_size: 4, max_steps: 1}
"""


def fuzz_images(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Write ``count`` mutated images and a tenth as many intact ones, then read them with real commands.

    Returns:
        The figures: mutated files, all files, used and skipped ones, crashes (0).

    Raises:
        AssertionError: a crash, output that is not the program's own, files that are neither used nor skipped, or
            training uses other files than `inspect` reports.
    """
    chance = random.Random(seed)
    total = _write_images(folder / "images", count, chance)
    document = _inspect(folder)
    used = sorted(name for names in document["used"].values() for name in names)
    assert document["files"] == len(used) + len(document["skipped"]) == total, (document["files"], total)
    for in_memory_gb in (4, 0):
        trained = _train(folder, in_memory_gb)
        assert trained == used, f"seed {seed}: training and inspect differ: {sorted({*trained} ^ {*used})}"
    return {"mutated": count, "files": total, "used": len(used), "skipped": len(document["skipped"]), "crashes": 0}


def _write_images(folder: Path, count: int, chance: random.Random) -> int:
    """Write the files; returns their number."""
    parents = [(suffix, write()) for suffix, write in _parents().items()]
    number = 0
    for i in range(count + max(8, count // 10)):
        suffix, content = parents[i % len(parents)]
        mutated = i < count
        if mutated:
            for _ in range(chance.choice([1, 1, 1, 2, 5])):
                content = chance.choice(MUTATIONS)(content, chance)
            if chance.random() < 0.1:
                suffix = chance.choice(["x.png", "x.jpg", "x.gif", "x.webp", "x.tif", "x.bmp"])
        kind = suffix.rpartition(".")[2]
        name = f"{i:04d} {chance.choice(NAMES)}.{chance.choice([kind, kind.upper()])}"
        file = folder / f"class {i % 3}" / chance.choice(["", "deep", "deep/er"]) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        number += 1
    return number


def _inspect(folder: Path) -> dict[str, Any]:
    words = ["inspect", "images", "--json", "found.json", "--out", "sheet.png", "--image-size", "8"]
    _command(words, folder)
    return json.loads((folder / "found.json").read_text(encoding="utf-8"))


def _train(folder: Path, in_memory_gb: float) -> list[str]:
    """The names of the images that training reads, held-out ones included: those in the run's fingerprint."""
    run = folder / f"trained_{in_memory_gb}"
    run.mkdir()
    (run / "config.yaml").write_text(TRAIN, encoding="utf-8")
    words = [f"data.in_memory_gb={in_memory_gb}"]
    _command(["train-tokenizer", "config.yaml", *words], run)
    sources = json.loads((run / "run/sources.json").read_text(encoding="utf-8"))
    script = (
        "import json, torch; from twostage import load_config, load_images\n"
        "from stage1_tokenizer.tokenizer_training import TokenizerConfig\n"
        f"data = load_images(load_config(TokenizerConfig, 'config.yaml', {words}).data)\n"
        "names = [name for split in data.splits.values() for name in split.names(torch.arange(len(split)))]\n"
        "print(json.dumps([data.identity(), names]))"
    )
    identity, names = json.loads(_run(["-c", script], run).stdout)
    assert identity == sources["sources"]["data.source"]["facts"], "training has read other images"
    return sorted(name.removeprefix("../") for name in names)


def _command(words: list[str], folder: Path) -> None:
    done = _run(["-m", "pipelines.cli", *words], folder)
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr[-3000:]}"
    for word in ("Warning", "Traceback", "Error"):  # libtiff prints its own messages, which cannot be suppressed
        assert word not in done.stderr, done.stderr[-3000:]


def _run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    return subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, preexec_fn=limit, timeout=600, check=False
    )


# --- intact images --------------------------------------------------------------------------------------------------


def _parents() -> dict[str, Callable[[], bytes]]:
    """Functions that write an image of each kind."""
    noise = np.random.default_rng(0)
    rgb = Image.fromarray(noise.integers(0, 256, (24, 20, 3), dtype=np.uint8))
    grey16 = Image.fromarray(noise.integers(0, 65536, (16, 16), dtype=np.uint16))
    alpha = Image.fromarray(noise.integers(0, 256, (16, 16, 4), dtype=np.uint8))
    palette = rgb.quantize(16)
    frames = [rgb, rgb.rotate(90), rgb.rotate(180)]
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees

    def saved(image: Image.Image, **options: Any) -> Callable[[], bytes]:
        def write() -> bytes:
            file = io.BytesIO()
            image.save(file, **options)
            return file.getvalue()

        return write

    return {
        "rgb.png": saved(rgb, format="PNG"),
        "interlaced.png": saved(rgb, format="PNG", interlace=1),
        "grey16.png": saved(grey16, format="PNG"),
        "alpha.png": saved(alpha, format="PNG"),
        "palette.png": saved(palette, format="PNG", transparency=3),
        "one.png": saved(Image.new("1", (1, 1)), format="PNG"),
        "wide.png": saved(Image.new("L", (20000, 10), 77), format="PNG"),
        "animated.png": saved(rgb, format="PNG", save_all=True, append_images=frames),
        "rgb.jpg": saved(rgb, format="JPEG"),
        "grey.jpg": saved(rgb.convert("L"), format="JPEG", progressive=True),
        "cmyk.jpg": saved(rgb.convert("CMYK"), format="JPEG"),
        "turned.jpg": saved(rgb, format="JPEG", exif=exif),
        "palette.gif": saved(palette, format="GIF"),
        "animated.gif": saved(rgb, format="GIF", save_all=True, append_images=frames),
        "rgb.webp": saved(rgb, format="WEBP"),
        "alpha.webp": saved(alpha, format="WEBP", lossless=True),
        "animated.webp": saved(rgb, format="WEBP", save_all=True, append_images=frames),
        "rgb.tif": saved(rgb, format="TIFF"),
        "grey16.tif": saved(grey16, format="TIFF"),
        "packed.tif": saved(rgb, format="TIFF", compression="tiff_lzw"),
        "fax.tif": saved(rgb.convert("1"), format="TIFF", compression="group4"),
        "jpeg.tif": saved(rgb, format="TIFF", compression="jpeg"),
        "pages.tif": saved(rgb, format="TIFF", save_all=True, append_images=frames),
        "rgb.bmp": saved(rgb, format="BMP"),
    }


# --- damage ---------------------------------------------------------------------------------------------------------


def _flip(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice([1, 2, 8, 40])):
        if changed:
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _flip_in_head(content: bytes, chance: random.Random) -> bytes:
    return _flip(content[:64], chance) + content[64:]


def _truncate(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content) + 1)]


def _zero(content: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(content) + 1)
    length = min(chance.choice([1, 4, 100]), len(content) - start)
    return content[:start] + chance.choice([b"\0", b"\xff"]) * length + content[start + length :]


def _insert(content: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(content) + 1)
    return content[:start] + chance.randbytes(chance.choice([1, 3, 200])) + content[start:]


def _double(content: bytes, chance: random.Random) -> bytes:
    first, second = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    return content[:second] + content[first:]


def _swap(content: bytes, chance: random.Random) -> bytes:
    first, second, third = sorted(chance.randrange(len(content) + 1) for _ in range(3))
    return content[:first] + content[second:third] + content[first:second] + content[third:]


def _append(content: bytes, chance: random.Random) -> bytes:
    return content + chance.choice([content, b"\0" * 1000, b"%!PS-Adobe-3.0 EPSF-3.0\n"])


def _empty(content: bytes, chance: random.Random) -> bytes:
    return b""


def _other_kind(content: bytes, chance: random.Random) -> bytes:
    """Formats that Pillow knows but twostage does not accept as images, with the programs that they may start."""
    return chance.choice([b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"GIF89a", b"<svg/>", b"P6 9 9 255\n"])


def _change_size(content: bytes, chance: random.Random) -> bytes:
    """Another size in the header (with a correct checksum for PNG), up to a decompression bomb."""
    sides = [chance.choice([0, 1, 7, 10_000, 60_000, 2**31 - 1, 2**32 - 1]) for _ in range(2)]
    if content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) > 33:
        chunk = b"IHDR" + struct.pack(">II", *sides) + content[24:29]
        return content[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:]
    if content[:4] == b"GIF8":
        return content[:6] + struct.pack("<HH", *(side & 0xFFFF for side in sides)) + content[10:]
    if content[:2] == b"BM":
        return content[:18] + struct.pack("<II", *sides) + content[26:]
    start = content.find(b"\xff\xc0")
    if start > 0:
        return content[: start + 5] + struct.pack(">HH", *(side & 0xFFFF for side in sides)) + content[start + 9 :]
    return _flip_in_head(content, chance)


MUTATIONS = [_flip, _flip, _flip_in_head, _truncate, _zero, _insert, _double, _swap, _append, _empty, _other_kind,
             _change_size, _change_size]  # fmt: skip
