"""Threads that work a bounded number of items ahead of whoever consumes their results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_ahead(do: Callable[[T], R], items: Iterable[T], workers: int, *, ahead: int) -> Iterator[R]:
    """``do(item)`` of all items, in order, in ``workers`` threads and at most ``ahead`` items before they are needed.

    Closing the iterator early cancels what has not begun and waits for what has.
    """
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(do, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
