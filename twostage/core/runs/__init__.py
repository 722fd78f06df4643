"""Runs on disk: the run folder, checkpoints, model folders, stored paths."""
