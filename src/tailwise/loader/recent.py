"""A bounded cache that threads and forked processes may share without a lock."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """A bounded number of values, those used longest ago let go first.

    Without a lock, which a fork could copy while it is held: each step is atomic, so threads that ask for the same value may at worst
    make it each.
    """

    def __init__(self, most: int) -> None:
        """Holds nothing yet; `most` at once, and one more for each thread that is just asking."""
        self.most = most
        self._values: dict[Key, Value] = {}  # the latest used come last

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of that key, made where it isn't there; None is never kept. It lives as long as the caller holds it."""
        values = self._values
        value = values.pop(key, None)
        if value is None:
            value = make()
        if value is not None:
            values[key] = value
            if len(values) > self.most:
                for oldest in list(values)[: -self.most]:
                    values.pop(oldest, None)
        return value

    def values(self) -> list[Value]:
        """All that are held."""
        return list(self._values.values())

    def clear(self) -> None:
        """Lets go of all."""
        self._values.clear()

    def __len__(self) -> int:
        """How many are held."""
        return len(self._values)
