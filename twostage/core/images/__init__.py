"""Image pixels: reading files, value ranges, uint8 and float conversion, contact sheets and plots."""
