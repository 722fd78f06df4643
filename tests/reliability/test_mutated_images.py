"""The short form; the whole one is `make soak`'s."""

from mutated_images import fuzz_images


def test_damaged_pictures_are_used_or_named(tmp_path):
    figures = fuzz_images(60, 0, tmp_path)
    assert figures["used"] > 10
    assert figures["skipped"] > 10
