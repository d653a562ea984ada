"""Reading ahead in threads, where there is nothing to decode: the bytes needn't cross from one process to another."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import TypeVar

Item = TypeVar("Item")


def read_ahead(read: Callable[[int], Item], first: int, threads: int, ahead: int) -> Iterator[Item]:
    """Yields read(first), read(first + 1), … without end; `threads` at a time, each `ahead` items ahead."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="tailwise-read")
    under_way: deque[Future[Item]] = deque()
    try:
        for number in count(first):
            under_way.append(pool.submit(read, number))
            if len(under_way) > threads * ahead:
                yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
