"""Threads that each do whole tiles of work, matrix products included.

A matrix product that shares one tile among threads makes them wait for one another, and spin while they wait; here each thread has tiles of
its own, and its products run in that thread alone.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
Tile = TypeVar("Tile")
Scratch = TypeVar("Scratch")


class Shared:
    """A change of settings of the whole process: made when the first thread asks for it, taken back when the last is done with it."""

    def __init__(self, change: Callable[[], Callable[[], None]]) -> None:
        """Takes a function that makes the change, and returns one that takes it back."""
        self._change, self._lock, self._users = change, threading.Lock(), 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The change holds inside."""
        with self._lock:
            if not self._users:
                self._restore = self._change()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._restore()


def _remember_threads() -> Callable[[], None]:
    before = torch.get_num_threads()
    return lambda: torch.set_num_threads(before)  # what threads that are made later begin with


_own_threads = Shared(_remember_threads)


def run_tiles(
    task: Callable[[Tile, Scratch], None], tiles: Sequence[Tile], threads: int, scratch: Callable[[], Scratch]
) -> None:
    """Runs `task(tile, scratch)` for every tile; each thread makes its own scratch memory once.

    Raises:
        Exception: what the earliest failing tile raised.
    """
    left, lock, stopped = iter(enumerate(tiles)), threading.Lock(), threading.Event()
    failed: list[tuple[int, Exception]] = []

    def work(_: int) -> None:
        torch.set_num_threads(1)
        number = -1
        try:
            memory = scratch()
            while not failed and not stopped.is_set():
                with lock:
                    number, tile = next(left, (-1, None))
                if tile is None:
                    return
                task(tile, memory)
        except Exception as error:  # noqa: BLE001  (raised below, in the order of tiles)
            failed.append((number, error))

    workers = max(1, min(threads, len(tiles)))
    with _own_threads():
        if workers == 1:
            before = torch.get_num_threads()
            try:
                work(0)
            finally:
                torch.set_num_threads(before)
        else:
            with ThreadPoolExecutor(workers) as pool:
                try:
                    list(pool.map(work, range(workers)))
                except BaseException:  # Ctrl-C: the tiles that are being worked on are the last
                    stopped.set()
                    raise
    if failed:
        raise min(failed, key=lambda failure: failure[0])[1]


def map_in_order(
    task: Callable[[Item, int], Result], items: Iterable[Item], threads: int, large: Callable[[Item], bool]
) -> Iterator[Result]:
    """Yields `task(item, threads it may use)` for every item, in order: small ones side by side in one thread each, large ones alone.

    At most `threads` + 1 small items are held at a time.
    """
    with _own_threads(), ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[Result]] = deque()
        for item in items:
            if large(item):
                while pending:
                    yield pending.popleft().result()
                yield task(item, threads)
                continue
            pending.append(pool.submit(task, item, 1))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
