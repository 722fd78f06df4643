"""Everything that needs both stages or a trained model: encode, generate, reconstruct, inspect, the command line."""

import twostage  # noqa: F401 - before torch is imported: it limits how long waiting threads spin

__all__ = []
