"""The short form of three parts of `make soak`: damaged images, datasets of every layout, mutated configurations."""

from benchmarks.reliability.dataset_layouts import fuzz_layouts
from benchmarks.reliability.mutated_configs import fuzz_configs
from benchmarks.reliability.mutated_images import fuzz_images


def test_damaged_images_are_used_or_named(tmp_path):
    figures = fuzz_images(60, 0, tmp_path)
    assert figures["used"] > 10
    assert figures["skipped"] > 10


def test_every_layout_gives_the_right_splits_and_labels(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert fuzz_layouts(400, 0, tmp_path) == {"layouts": 400}


def test_a_mutated_config_trains_a_step_or_is_refused_in_one_sentence(tmp_path):
    figures = fuzz_configs(60, 0, tmp_path)
    assert figures["trained"] > 0
    assert figures["refused"] > 0
