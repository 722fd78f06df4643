"""Stage two: a prior over the code grids. It sees codes and their manifest, never a tokenizer."""

import twostage  # noqa: F401 - before torch is imported: it limits how long waiting threads spin

__all__ = []
