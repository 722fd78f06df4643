"""`twostage` in a process of its own, to be stopped or harmed, and in this process, which starts no other."""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from benchmarks.reliability.processes import Command


@pytest.fixture(scope="session")
def begin() -> Callable[..., Command]:
    """``begin(words, folder, processes=1)``: a real command, running in ``folder``."""

    def begin(words: Sequence[object], folder: Path, processes: int = 1) -> Command:
        return Command(["-m", "pipelines.cli", *words], folder, processes)

    return begin


@pytest.fixture(scope="session")
def here(twostage) -> Callable:
    """``here(words, folder)``: how `twostage WORDS` ends in ``folder``, without a process of its own."""

    def here(words: Sequence[object], folder: Path):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            ended = twostage(*words)
        if ended.code:
            gc.collect()  # the error still refers to the run, which locks its folder until it is collected
        return ended

    return here


@pytest.fixture(scope="session")
def done(here) -> Callable[[Sequence[object], Path], str]:
    """``done(words, folder)``: the output of a command that has to succeed, without a process of its own."""

    def done(words: Sequence[object], folder: Path) -> str:
        ended = here(words, folder)
        assert ended.code == 0, ended.err[-4000:]
        return ended.out + ended.err

    return done
