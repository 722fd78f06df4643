"""A user's mistake ends a command with one message and a status, never with a traceback."""

import pytest
import typer
from messages import assert_names

from twostage.core.errors import InputError
from twostage.core.machine.command import as_command


def fail(error: type[BaseException]) -> int:
    """Runs a command that raises; returns its exit status."""

    def command(message: str) -> None:
        raise error(message)

    with pytest.raises(typer.Exit) as ended:
        as_command(command)("train.lr: expected greater than 0, got -1")
    return ended.value.exit_code


def test_a_mistake_is_one_sentence_on_the_error_stream(capsys):
    assert fail(InputError) == 2
    assert capsys.readouterr() == ("", "error: train.lr: expected greater than 0, got -1\n")


def test_only_the_main_process_prints_it(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert fail(InputError) == 2
    assert capsys.readouterr() == ("", "")


def test_an_interrupt_says_how_to_resume(capsys):
    assert fail(KeyboardInterrupt) == 130
    assert_names(capsys.readouterr().err, "stopped", "same command again to resume")


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        as_command(lambda: 1 / 0)()


def test_a_path_that_cannot_be_written_is_one_line(capsys, tmp_path):
    def write() -> None:
        (tmp_path / "there").mkdir()
        (tmp_path / "file").write_text("")
        (tmp_path / "file" / "below").write_text("")

    with pytest.raises(typer.Exit) as ended:
        as_command(write)()
    assert ended.value.exit_code == 2
    shown = capsys.readouterr().err
    assert_names(shown, f"error: {tmp_path / 'file' / 'below'}: Not a directory", "choose another path")
    assert shown.count("\n") == 1
    with pytest.raises(FileNotFoundError):  # a bug of the program itself
        as_command((tmp_path / "nothing").read_text)()
