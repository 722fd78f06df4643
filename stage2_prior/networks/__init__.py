"""The networks that predict codes, and how each is sampled."""
