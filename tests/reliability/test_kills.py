"""The short form of the kills of `make soak`."""

import pytest

from benchmarks.reliability.kills import KillHarness


@pytest.fixture(scope="module")
def harness(tmp_path_factory) -> KillHarness:
    return KillHarness(tmp_path_factory.mktemp("kills"), seed=0)


@pytest.mark.parametrize(("name", "processes", "kills"), [("VQ-GAN", 1, 2), ("prior", 2, 1), ("encode", 1, 1),
                                                          ("generate", 2, 1)])  # fmt: skip
def test_a_killed_command_resumes_to_the_same_bytes(harness, name, processes, kills):
    while kills > 0:
        kills -= harness.chain(name, processes, kills)
