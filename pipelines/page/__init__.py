"""The page of `app`, and the actions of its buttons."""
