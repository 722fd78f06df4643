"""Configurations that fit what the user has: the recipes of configs/, and the files that are written after them."""
