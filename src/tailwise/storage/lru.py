"""A bounded cache that threads and forked processes may share without a lock."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class LRUCache(Generic[Key, Value]):
    """A bounded number of values; the least recently used are dropped first.

    There is no lock: a fork could copy one that is held. Each step is atomic; at worst, threads make a value each.
    """

    def __init__(self, most: int) -> None:
        """Take the bound, at least 1. It includes a value that is being made; each further thread that asks adds one."""
        self.most = most
        self._values: dict[Key, Value] = {}  # the most recently used come last

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """Return the value of a key, made if it is missing; None is never kept."""
        values = self._values
        value = values.pop(key, None)
        if value is None:
            self._shrink(self.most - 1)
            value = make()
        if value is not None:
            values[key] = value
            self._shrink(self.most)
        return value

    def find(self, key: Key) -> Value | None:
        """Return the value of a key; None if it is not kept."""
        value = self._values.pop(key, None)
        if value is not None:
            self._values[key] = value
        return value

    def _shrink(self, most: int) -> None:
        if len(self._values) > most:
            held = list(self._values)
            for oldest in held[: len(held) - most]:
                self._values.pop(oldest, None)

    def values(self) -> list[Value]:
        """Return all values."""
        return list(self._values.values())

    def clear(self) -> None:
        """Drop all values."""
        self._values.clear()
