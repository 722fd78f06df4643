"""python watched_training.py MODULE WORDS...: run the module and write one line per batch that this process reads: the
step and the rows of the whole batch. The file is $SEEN_RANK."""

import os
import runpy
import sys
from pathlib import Path

from twostage.core.training.batches import Batches

read_batch = Batches.at


def read_and_note(batches: Batches, step, read):
    with Path(f"{os.environ['SEEN']}_{os.environ.get('RANK', '0')}").open("a", encoding="utf-8") as file:
        file.write(f"{step} {' '.join(map(str, batches.rows(step).tolist()))}\n")
    return read_batch(batches, step, read)


if __name__ == "__main__":
    Batches.at = read_and_note
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
