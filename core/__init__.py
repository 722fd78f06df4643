"""What both stages use and nothing else: configuration, images, the run folder, checkpoints, EMA, schedules."""

import os

__all__ = []

# OpenMP's threads spin while they wait for each other. Where other work shares the cores, that takes the time of the
# threads they wait for, and a step takes many times as long. OpenMP reads the variable when torch loads it, so this
# must run before any import of torch (measured in docs/scaling.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
