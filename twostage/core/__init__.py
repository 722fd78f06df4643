"""What both stages and the pipelines share: configuration, images, datasets, run folders, checkpoints, training."""
