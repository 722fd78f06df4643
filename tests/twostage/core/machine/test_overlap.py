"""Reading and writing in the background changes no order and loses no error."""

import threading
from collections.abc import Iterator

import pytest

from twostage.core.machine.overlap import BackgroundWriter, read_ahead


@pytest.mark.parametrize("in_thread", [True, False])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_items_come_in_order_each_read_once(count, in_thread):
    read: list[int] = []
    found = list(read_ahead(range(count), lambda item: read.append(item) or -item, in_thread))
    assert found == [(item, -item) for item in range(count)]
    assert read == list(range(count))


def test_the_next_item_is_read_while_this_one_is_used():
    used = threading.Event()

    def read(item: int) -> int:
        assert item == 0 or used.wait(10)  # only passes if the first is used meanwhile
        return item

    items = read_ahead(range(3), read)
    assert next(items) == (0, 0)
    used.set()
    assert list(items) == [(1, 1), (2, 2)]


def test_no_more_than_one_item_is_read_ahead():
    asked: list[int] = []

    def items() -> Iterator[int]:
        for item in range(9):
            asked.append(item)
            yield item

    found = read_ahead(items(), lambda item: item)
    for item in range(5):
        assert next(found) == (item, item)
        assert asked == list(range(item + 2))


@pytest.mark.parametrize("in_thread", [True, False])
def test_an_error_in_reading_is_raised_after_the_items_before_it(in_thread):
    def read(item: int) -> int:
        if item == 2:
            raise OSError("cat.png: input/output error")
        return item

    found = read_ahead(range(5), read, in_thread)
    assert [next(found), next(found)] == [(0, 0), (1, 1)]
    with pytest.raises(OSError, match="cat"):
        next(found)


def test_calls_are_made_in_order_while_the_block_continues():
    continues, written = threading.Event(), list[int]()

    def write(number: int) -> None:
        assert number or continues.wait(10)
        written.append(number)

    with BackgroundWriter() as writer:
        writer(write, 0)
        continues.set()
        for number in range(1, 20):
            writer(write, number)
            assert len(written) >= number  # at most one is unfinished
    assert written == list(range(20))


@pytest.mark.parametrize("later_calls", [0, 3])
def test_an_error_in_writing_is_raised_and_ends_the_block(later_calls):
    written: list[int] = []

    def write(number: int) -> None:
        if number == 2:
            raise OSError("no space left on device")
        written.append(number)

    def block() -> None:
        with BackgroundWriter() as writer:
            for number in range(3 + later_calls):
                writer(write, number)

    with pytest.raises(OSError, match="no space left"):
        block()
    assert written == [0, 1]


def test_a_call_ends_even_if_the_block_fails():
    fails, written = threading.Event(), list[str]()

    def write() -> None:
        assert fails.wait(10)
        written.append("all")

    def block() -> None:
        with BackgroundWriter() as writer:
            writer(write)
            threading.Timer(0.1, fails.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        block()
    assert written == ["all"]
