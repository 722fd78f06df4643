"""Trained models on disk: where they are, what they were trained on, their figures and their model card."""
