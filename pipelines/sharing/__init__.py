"""Sharing models: importing tokenizers of other projects, exporting folders and programs."""
