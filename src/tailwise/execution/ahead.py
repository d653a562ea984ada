"""Items that are made in a thread while earlier ones are used."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

Item = TypeVar("Item")
_END = object()


def ahead(items: Generator[Item, None, None]) -> Generator[Item, None, None]:
    """Yield items; a thread makes the next one meanwhile. What making an item raises is raised in its place."""
    with closing(items), ThreadPoolExecutor(1) as thread:  # the thread ends first
        coming = thread.submit(next, items, _END)
        while (item := coming.result()) is not _END:
            coming = thread.submit(next, items, _END)
            yield item  # type: ignore[misc]  # of `items`
