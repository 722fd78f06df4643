"""What both stages use and nothing else: configuration, images, the run folder, checkpoints, EMA, schedules."""

import os

__all__ = []

# Threads of a parallel region that wait for each other may spin. Where other work shares the cores, they spin at its
# expense and their own: a step then takes many times as long. OpenMP reads this when torch loads it, which is why it
# stands here, before any import of torch (docs/scaling.md has what was measured).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
