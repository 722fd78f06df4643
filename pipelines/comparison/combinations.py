"""The combinations of a sweep: `key=a,b,c` for several keys, each combination with a run folder of its own."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from twostage.core.errors import InputError

__all__ = ["Combination", "combinations", "split_values"]

CLOSING = {"[": "]", "{": "}", '"': '"', "'": "'"}
MAX_NAME = 200
"""Characters of a folder's name; file systems allow 255 bytes."""


@dataclass(frozen=True)
class Combination:
    """One value for each key that varies."""

    values: dict[str, str]
    """As on the command line, by full key."""

    @property
    def name(self) -> str:
        """The values in the form of a folder's name, such as `lr=1e-3,depth=4`."""
        last = [key.rpartition(".")[2] for key in self.values]
        keys = [short if last.count(short) == 1 else key for key, short in zip(self.values, last, strict=True)]
        pairs = zip(keys, self.values.values(), strict=True)
        return re.sub(r"[^\w.=,+-]+", "_", ",".join(f"{key}={value}" for key, value in pairs))


def combinations(settings: Sequence[str]) -> tuple[list[Combination], list[str]]:
    """All combinations of the values in ``settings``, and the settings that have a single value.

    Raises:
        InputError: no key has several values, a value is missing or given twice, or run folders would have one name.
    """
    varied, fixed = {}, []
    for setting in settings:
        key, separator, text = setting.partition("=")
        values = split_values(text)
        if not separator or not all(values):
            raise InputError(f"{setting}: expected key=value,value such as train.lr=1e-4,1e-3. Add the missing value")
        if twice := [value for value in values if values.count(value) > 1]:
            raise InputError(f"{setting}: has the value {twice[0]} twice. Remove one")
        if key in varied:
            raise InputError(f"{setting}: {key} is given twice. Give all its values at once, separated by commas")
        if key == "run.dir" and len(values) > 1:
            raise InputError(f"{setting}: each run already has a folder of its own. Use another key")
        if len(values) > 1:
            varied[key] = values
        else:
            fixed.append(setting)
    if not varied:
        given = f"got only {', '.join(settings)}" if settings else "got no key"
        raise InputError(f"nothing to vary: {given}; expected a key with several values, such as train.lr=1e-4,1e-3")
    found = [Combination(dict(zip(varied, values, strict=True))) for values in itertools.product(*varied.values())]
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1 or len(name) > MAX_NAME:
            raise InputError(
                f"{name}: cannot name a run folder, because it is too long or two combinations have it. Use values of "
                f"letters and digits, {MAX_NAME} in all"
            )
    return found, fixed


def split_values(text: str) -> list[str]:
    """The values between commas; a comma inside brackets or quotes belongs to the value."""
    values, open_ones = [""], []
    for letter in text:
        if open_ones and letter == open_ones[-1]:
            open_ones.pop()
        elif letter in CLOSING and not (open_ones and open_ones[-1] in "\"'"):
            open_ones.append(CLOSING[letter])
        if letter == "," and not open_ones:
            values.append("")
        else:
            values[-1] += letter
    return [value.strip() for value in values]
