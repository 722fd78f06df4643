"""What `app` shows: the page and what its buttons do."""
