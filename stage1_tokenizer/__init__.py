"""Stage one: images -> a small grid of codes -> images. One `Autoencoder`: backbone + bottleneck + losses."""

import twostage  # noqa: F401 - before torch is imported: it limits how long waiting threads spin

__all__ = []
