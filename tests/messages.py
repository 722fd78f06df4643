"""How tests check a message: it must name the field, the value and the remedy, in any wording."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from twostage import InputError


def assert_names(message: str, *parts: object) -> None:
    """Fail unless ``message`` contains each of ``parts``: the field, the value, the remedy."""
    missing = [str(part) for part in parts if str(part) not in message]
    assert not missing, f"the message lacks {missing}:\n{message}"
    assert "Traceback" not in message


@contextmanager
def refuses(*parts: object) -> Iterator[pytest.ExceptionInfo[InputError]]:
    """``with refuses("train.lr", "'fast'", "expected"): ...`` checks that an `InputError` names all of these."""
    with pytest.raises(InputError) as refused:
        yield refused
    assert_names(str(refused.value), *parts)
