"""Drawing images from trained models: the pipeline object, sampling in batches, edits."""
