"""Drawing images with trained models: the sampler, edits, the pipeline object, and what the commands write."""
