"""The checks of `twostage doctor`."""
