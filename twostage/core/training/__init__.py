"""The bookkeeping of a training run: batches, randomness, schedules, EMA, metrics, dry runs."""
