"""A bounded cache that threads and forked processes may share without a lock."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class LRUCache(Generic[Key, Value]):
    """A bounded number of values, those used longest ago let go first.

    Without a lock, which a fork could copy while it is held: each step is atomic, so threads that ask for the same value may at worst
    make it each.
    """

    def __init__(self, most: int) -> None:
        """Holds nothing yet; `most` ≥ 1 at once, the one that is being made included, and one more for each further thread that asks."""
        self.most = most
        self._values: dict[Key, Value] = {}  # the latest used come last

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of that key, made where it isn't there; None is never kept. It lives as long as the caller holds it."""
        values = self._values
        value = values.pop(key, None)
        if value is None:
            self._let_go(self.most - 1)
            value = make()
        if value is not None:
            values[key] = value
            self._let_go(self.most)
        return value

    def _let_go(self, most: int) -> None:
        """Of the oldest, until so many are left."""
        if len(self._values) > most:
            held = list(self._values)
            for oldest in held[: len(held) - most]:
                self._values.pop(oldest, None)

    def values(self) -> list[Value]:
        """All that are held."""
        return list(self._values.values())

    def clear(self) -> None:
        """Lets go of all."""
        self._values.clear()

    def __len__(self) -> int:
        """How many are held."""
        return len(self._values)
