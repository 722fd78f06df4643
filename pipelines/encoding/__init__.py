"""Encoding a dataset: its images with their variants, and the folder that an interrupted call resumes from."""
