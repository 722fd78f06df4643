"""What `export` and `import` are made of: programs, the model card, others' tokenizers."""
