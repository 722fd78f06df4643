"""Files that people give or get: images, masks, generated images, HTML reports."""
