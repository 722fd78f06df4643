"""What `compare` is made of: models side by side, and the tour."""
