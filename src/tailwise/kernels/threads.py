"""Threads that each do whole tiles of work, matrix products included.

A matrix product that shares one tile among threads makes them wait for one another, and spin while they wait; here each thread has tiles of
its own, and its products run in that thread alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

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
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(work, range(workers)))
    finally:
        torch.set_num_threads(before)  # what threads that are made later begin with
    if failed:
        raise min(failed, key=lambda failure: failure[0])[1]
