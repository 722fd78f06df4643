"""The short form; the whole one is `make soak`'s."""

from mutated_configs import fuzz_configs


def test_a_mutated_config_trains_a_step_or_is_refused_in_a_sentence(tmp_path):
    figures = fuzz_configs(60, 0, tmp_path)
    assert figures["trained"] > 0
    assert figures["refused"] > 0
