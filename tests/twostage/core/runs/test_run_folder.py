"""A run folder belongs to one configuration, and its metrics to the steps that were kept."""

import pytest
import yaml
from messages import refuses

from twostage.core.config.sections import RunConfig, Section
from twostage.core.runs.run_folder import RunFolder, read_metrics


class Training(Section):
    run: RunConfig
    lr: float = 1e-3
    sizes: tuple[int, int] = (8, 8)


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "first")


def config(folder: RunFolder, **changes: object) -> Training:
    return Training.model_validate({"run": {"dir": str(folder.path)}, **changes})


def everything_in(folder: RunFolder) -> dict[str, bytes]:
    return {str(p.relative_to(folder.path)): p.read_bytes() for p in folder.path.rglob("*") if p.is_file()}


def test_a_new_folder_gets_the_resolved_configuration(folder):
    folder.check(config(folder))
    assert not folder.path.exists(), "a check writes nothing"
    folder.create(config(folder))
    assert folder.samples.is_dir()
    assert folder.stored_config() == yaml.safe_load(folder.config_file.read_text()) == {
        "run": {"dir": str(folder.path), "seed": 0, "trackers": ["tensorboard"], "project": "twostage"},
        "lr": 0.001, "sizes": [8, 8]
    }  # fmt: skip


def test_the_same_configuration_changes_nothing(folder):
    folder.create(config(folder, lr=1e-7))
    before = folder.config_file.stat()
    folder.check(config(folder, lr=1e-7))
    folder.create(config(folder, lr=1e-7))
    assert folder.config_file.stat() == before


def test_a_different_configuration_is_refused_and_nothing_is_changed(folder):
    folder.create(config(folder))
    folder.append_metrics({"step": 1, "split": "train", "loss": 1.0})
    before = everything_in(folder)
    with refuses(f"run.dir {folder.path}", "run.seed", "0", "lr", "0.001", "0.01", "Nothing was changed", "run.dir="):
        folder.check(config(folder, lr=1e-2, run={"dir": str(folder.path), "seed": 1}))
    assert everything_in(folder) == before


def test_keys_that_change_no_step_may_change(folder):
    folder.create(config(folder))
    changed = config(folder, run={"dir": str(folder.path), "trackers": []})
    folder.check(changed)
    folder.create(changed)
    assert (folder.stored_config() or {})["run"]["trackers"] == []


def test_a_folder_of_something_else_is_refused(folder):
    folder.path.mkdir(parents=True)
    folder.check(config(folder))  # an empty folder counts as new
    (folder.path / "thesis.doc").touch()
    with refuses(f"run.dir {folder.path}", "not a twostage run", "run.dir="):
        folder.check(config(folder))


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    folder = RunFolder(tmp_path / "file")
    with refuses(f"run.dir {folder.path}", "not a twostage run", "run.dir="):
        folder.check(config(folder))


def test_metrics_are_one_object_per_line(folder):
    folder.create(config(folder))
    lines = [{"step": step, "split": "train", "loss": 1 / step} for step in (1, 2, 3)]
    for line in lines:
        folder.append_metrics(line)
    assert read_metrics(folder.metrics_file) == lines
    assert len(folder.metrics_file.read_text().splitlines()) == 3


def test_metrics_after_the_checkpoint_are_cut(folder):
    folder.create(config(folder))
    for step in (1, 2, 3):
        for split in ("train", "val"):
            folder.append_metrics({"step": step, "split": split})
    with folder.metrics_file.open("a") as file:
        file.write('{"step": 4, "spl')  # killed while writing
    folder.cut_metrics(2)
    folder.append_metrics({"step": 3, "split": "train"})
    found = [(line["step"], line["split"]) for line in read_metrics(folder.metrics_file)]
    assert found == [(1, "train"), (1, "val"), (2, "train"), (2, "val"), (3, "train")]
    assert len(folder.metrics_file.read_text().splitlines()) == 5


def test_no_metrics_need_no_cut(folder):
    folder.create(config(folder))
    folder.cut_metrics(0)
    assert not folder.metrics_file.exists()
