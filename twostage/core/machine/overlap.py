"""Reading and writing in the background, while a network computes."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

__all__ = ["BackgroundWriter", "read_ahead"]

ItemT = TypeVar("ItemT")
DataT = TypeVar("DataT")


def read_ahead(
    items: Iterable[ItemT], read: Callable[[ItemT], DataT], in_thread: bool = True
) -> Iterator[tuple[ItemT, DataT]]:
    """Yields each item and what ``read`` makes of it, in order. A thread reads the next item in the meantime.

    Args:
        in_thread: False: each item is read when it is needed, for data in memory.
    """
    if not in_thread:
        yield from ((item, read(item)) for item in items)
        return
    with ThreadPoolExecutor(1) as pool:
        begun: list[tuple[ItemT, Future[DataT]]] = []
        for item in items:
            data = [(before, future.result()) for before, future in begun]
            begun = [(item, pool.submit(read, item))]
            yield from data
        yield from ((item, future.result()) for item, future in begun)


class BackgroundWriter:
    """Calls functions in a thread, one after another, while the block continues. At most one call is unfinished: the
    next waits for it. An error in a call is raised by the next one, or at the end of the block. Calls that have begun
    end even if the block fails.
    """

    def __enter__(self) -> Self:
        self._pool, self._last = ThreadPoolExecutor(1), None
        return self

    def __call__(self, function: Callable[..., object], *arguments: object) -> None:
        self._finish()
        self._last: Future[object] | None = self._pool.submit(function, *arguments)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        if error is None:
            self._finish()

    def _finish(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()
