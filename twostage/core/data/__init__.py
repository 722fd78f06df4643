"""Datasets: sources, folders, tables, splits, labels, decoding."""
