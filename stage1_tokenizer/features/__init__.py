"""Networks whose features compare images, for losses and for judging."""
