"""Trained models side by side, and the tour, which trains every family and compares them."""
