"""What `encode` is made of: variants of images, and what an interrupted run left."""
