"""Trained models on disk: pipeline folders, and what a model remembers of its data and its tokenizer."""
