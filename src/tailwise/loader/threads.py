"""Reading ahead in threads if nothing is decoded, so that the bytes need not be sent between processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import TypeVar

Item = TypeVar("Item")


def read_ahead(read: Callable[[int], Item], first: int, threads: int, ahead: int) -> Iterator[Item]:
    """Yield read(first), read(first + 1), … without end; `threads` threads read `ahead` items ahead each."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="tailwise-read")
    under_way: deque[Future[Item]] = deque()
    try:
        for number in count(first):
            under_way.append(pool.submit(read, number))
            if len(under_way) > threads * ahead:
                yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
