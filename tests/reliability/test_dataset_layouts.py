"""The short form; the whole one is `make soak`'s."""

from dataset_layouts import fuzz_layouts


def test_right_splits_and_labels_in_every_layout(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert fuzz_layouts(400, 0, tmp_path) == {"layouts": 400}
