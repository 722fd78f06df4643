"""What several tests use: the real data where it is at hand, and one thread a process."""

import os
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny models are faster on one thread, and tests may share the machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data sets: $TWOSTAGE_DATA, or `../shared/data` beside the checkout."""
    folder = Path(os.environ.get("TWOSTAGE_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "mnist" / "train.parquet").is_file():
        pytest.skip(f"no real data: {folder / 'mnist' / 'train.parquet'} is missing (set TWOSTAGE_DATA)")
    return folder
