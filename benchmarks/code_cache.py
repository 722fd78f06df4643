"""How fast are random rows of a code cache, and does reading them cost memory?

python -m benchmarks.code_cache [--rows 1000000] [--batches 400] [--repeats 8] [--json FILE]

Writes a cache of that many rows of 256 codes (16x16, uint16; 512 MB for a million) into a temporary folder. Then it
reads random batches of 256 rows, as training does: codes (256, 16, 16) int64. The peer is the usual loop: a shuffled
`DataLoader` over a dataset of single rows of the same memory-mapped array, in this process. A warm-up first reads
every page once, so that the figures do not measure the disk.

The table shows resident memory in MB for the first and the last quarter of our batches. `anon` is the process's own
memory; `file` is the mapped array, which the system reclaims whenever it needs to. Systems without /proc show neither.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.reporting import compared, parser, report
from stage2_prior.codes import CodeCache, CodeSplit, Manifest, SplitFiles, TokenizerReference, code_statistics
from twostage.core.machine.processes import share_cores

GRID, CODEBOOK_SIZE, BATCH_SIZE = (16, 16), 1024, 256
STATUS = Path("/proc/self/status")


class RowDataset(Dataset):
    """One row at a time, as a DataLoader requests them."""

    def __init__(self, codes: np.ndarray) -> None:
        self.codes = codes

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, row: int) -> Tensor:
        return torch.from_numpy(self.codes[row].astype(np.int64))


def write_cache(folder: Path, rows: int) -> None:
    """A code cache of ``rows`` random training rows and one held-out row, which a manifest requires."""
    random, splits = np.random.default_rng(0), {}
    for name, count in {"train": rows, "val": 1}.items():
        shape = (count, *GRID)
        codes = np.lib.format.open_memmap(folder / f"{name}.codes.npy", mode="w+", dtype=np.uint16, shape=shape)
        for start in range(0, count, 10_000):
            part = codes[start : start + 10_000]
            part[:] = random.integers(0, CODEBOOK_SIZE, part.shape, dtype=np.uint16)
        codes.flush()
        splits[name] = codes
    manifest = Manifest(
        tokenizer=TokenizerReference(hash="0" * 64, path="none"),
        source="random numbers",
        image_size=(256, 256),
        channels=3,
        grid=GRID,
        codebook_size=CODEBOOK_SIZE,
        class_names=None,
        validation_split="val",
        splits={
            name: SplitFiles(rows=count, codes=f"{name}.codes.npy", labels=None)
            for name, count in {"train": rows, "val": 1}.items()
        },
        **code_statistics(splits, CODEBOOK_SIZE),
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json(indent=2), encoding="utf-8")


def our_batches(split: CodeSplit) -> Iterator[Tensor]:
    """Rows in random order, epoch after epoch."""
    generator = torch.Generator().manual_seed(0)
    while True:
        for rows in torch.randperm(len(split), generator=generator).split(BATCH_SIZE):
            if len(rows) == BATCH_SIZE:
                yield split.read(rows)


def peer_batches(split: CodeSplit) -> Iterator[Tensor]:
    """The DataLoader's batches, epoch after epoch."""
    loader = DataLoader(RowDataset(split.codes), batch_size=BATCH_SIZE, shuffle=True, drop_last=True)
    while True:
        yield from loader


def seconds_per_batch(batches: Iterator[Tensor], count: int) -> float:
    """Mean seconds of ``count`` batches."""
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return (time.perf_counter() - start) / count


def resident() -> dict[str, float]:
    """Resident memory in MB; {} if the system does not report it."""
    if not STATUS.is_file():
        return {}
    lines = dict(line.split(":", 1) for line in STATUS.read_text(encoding="utf-8").splitlines())
    return {name: int(lines[key].split()[0]) / 1024 for name, key in {"anon": "RssAnon", "file": "RssFile"}.items()}


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--rows", type=int, default=1_000_000)
    arguments.add_argument("--batches", type=int, default=400, help="batches per measurement, at least 10")
    arguments.add_argument("--repeats", type=int, default=8, help="number of measurements, a multiple of 4")
    options = arguments.parse_args()
    share_cores()
    with tempfile.TemporaryDirectory() as folder:
        write_cache(Path(folder), options.rows)
        split = CodeCache(folder).splits["train"]
        ours, peer = our_batches(split), peer_batches(split)
        seconds_per_batch(ours, options.rows // BATCH_SIZE)  # one epoch reads every page
        seconds_per_batch(peer, 10)
        ours_s, peer_s, memory = [], [], []
        for _ in range(options.repeats):
            ours_s.append(seconds_per_batch(ours, options.batches))
            memory.append(resident())
            peer_s.append(seconds_per_batch(peer, options.batches // 10))  # far slower, so a tenth of the batches
        row = compared(f"a batch of {BATCH_SIZE} rows", ours_s, peer_s)
        row |= {f"{name}_rows_per_s": BATCH_SIZE / row[f"{name}_s"] for name in ("ours", "peer")}
        quarter = options.repeats // 4
        for name in memory[0]:
            row[f"{name}_mb_first"] = float(np.mean([m[name] for m in memory[:quarter]]))
            row[f"{name}_mb_last"] = float(np.mean([m[name] for m in memory[-quarter:]]))
        report({"rows": options.rows, "grid": "16x16", "batch_size": BATCH_SIZE}, [row], options.json)


if __name__ == "__main__":
    main()
