"""python watched_training.py MODULE WORDS...: the module, and a line in $SEEN for each batch that this process reads: the
step and the rows of the whole batch."""

import os
import runpy
import sys

from core.batches import Batches

read_batch = Batches.at


def read_and_note(batches: Batches, step, read):
    with open(f"{os.environ['SEEN']}_{os.environ.get('RANK', '0')}", "a", encoding="utf-8") as file:
        file.write(f"{step} {' '.join(map(str, batches.rows(step).tolist()))}\n")
    return read_batch(batches, step, read)


if __name__ == "__main__":
    Batches.at = read_and_note
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
