"""Threads that work a bounded number of items ahead of the code that consumes their results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_ahead(function: Callable[[T], R], items: Iterable[T], workers: int, *, ahead: int) -> Generator[R, None, None]:
    """Yield ``function(item)`` for each item, in order, computed by ``workers`` threads.

    At most ``ahead`` results are computed before they are consumed, which bounds the memory. ``items`` is iterated
    in the calling thread. An exception in ``function`` is raised when its result is due. Closing the iterator early
    cancels calls that have not begun and waits for those that have.
    """
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
