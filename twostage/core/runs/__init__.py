"""What is on disk of a run: its folder, checkpoints, model folders, remembered paths."""
