"""Code shared by both stages and the pipelines: configuration, images, datasets, runs, checkpoints, training."""
