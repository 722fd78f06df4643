"""The one kind of error that is the user's to mend; everything else is a bug and keeps its traceback."""

__all__ = ["InputError"]


class InputError(ValueError):
    """A mistake in a config, a path, an image or an option.

    The message names the field or file, what was got, what was expected and what to do. Commands print it as one
    clear sentence without a traceback.
    """
