"""Stage two: a prior over code grids. It knows codes and their manifest, but no tokenizer."""

import twostage  # noqa: F401 - before torch: it limits how long waiting threads spin

__all__ = []
