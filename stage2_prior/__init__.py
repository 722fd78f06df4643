"""Stage two: a prior over the code grids. It sees codes and their manifest, never a tokenizer."""
