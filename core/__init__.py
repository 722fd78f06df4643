"""What both stages use and nothing else: configuration, images, the run folder, checkpoints, EMA, schedules."""
