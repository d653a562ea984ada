"""Threads that each do whole tiles of work, matrix products included.

A matrix product that shares one tile among threads makes them wait for one another, and spin while they wait; here each thread has tiles of
its own, and its products run in that thread alone.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
Tile = TypeVar("Tile")
Scratch = TypeVar("Scratch")


def run_tiles(
    task: Callable[[Tile, Scratch], None], tiles: Sequence[Tile], threads: int, scratch: Callable[[], Scratch]
) -> None:
    """Runs `task(tile, scratch)` for every tile; each thread makes its own scratch memory once.

    Raises:
        Exception: what the earliest failing tile raised.
    """
    left, lock = iter(enumerate(tiles)), threading.Lock()
    failed: list[tuple[int, Exception]] = []

    def work(_: int) -> None:
        torch.set_num_threads(1)
        memory = scratch()
        while not failed:
            with lock:
                number, tile = next(left, (-1, None))
            if tile is None:
                return
            try:
                task(tile, memory)
            except Exception as error:  # noqa: BLE001  (raised below, in the order of tiles)
                failed.append((number, error))

    before = torch.get_num_threads()
    workers = max(1, min(threads, len(tiles)))
    try:
        if workers == 1:
            work(0)
        else:
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(work, range(workers)))
    finally:
        torch.set_num_threads(before)  # what threads that are made later begin with
    if failed:
        raise min(failed, key=lambda failure: failure[0])[1]


def map_in_order(
    task: Callable[[Item, int], Result], items: Iterable[Item], threads: int, large: Callable[[Item], bool]
) -> Iterator[Result]:
    """Yields `task(item, threads it may use)` for every item, in order: small ones side by side in one thread each, large ones alone.

    At most `threads` + 1 small items are held at a time.
    """
    with ThreadPoolExecutor(threads) as pool:
        begun: deque[Future[Result]] = deque()
        for item in items:
            if large(item):
                while begun:
                    yield begun.popleft().result()
                yield task(item, threads)
                continue
            begun.append(pool.submit(task, item, 1))
            if len(begun) > threads:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
