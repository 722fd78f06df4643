"""Stage one: images -> a small grid of codes -> images. One `Autoencoder`: backbone + bottleneck + losses."""
