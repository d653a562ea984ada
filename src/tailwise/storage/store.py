"""Stores: bytes at keys, as a catalog needs them.

A key is a relative path with slashes. What is written under a key is there whole, or not at all. `put_if_absent` and `replace_if` let one
of several writers win, on one machine or many; the others learn that they have lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

THREADS = 16  # that wait for requests at a time


def check_key(key: str) -> str:
    """Return a key; raise a ValueError if it leads out of the store."""
    parts = PurePosixPath(key).parts
    if not parts or key.startswith("/") or ".." in parts:
        raise ValueError(f"{key!r} is no key: give a relative path without '..'")
    return key


@dataclass(frozen=True)
class Head:
    """Attributes of the bytes at a key."""

    size: int  # in bytes
    etag: str  # differs whenever the content does


class Store(Protocol):
    """Bytes at keys; tests/storage/test_store.py holds the contract of all stores."""

    def get(self, key: str) -> bytes:
        """Return the bytes at a key; a FileNotFoundError says that there are none."""

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of each range [start, stop), as far as they go."""

    def put(self, key: str, content: bytes) -> None:
        """Write the bytes at a key, over what is there."""

    def put_if_absent(self, key: str, content: bytes) -> bool:
        """Write the bytes at a key where nothing is; return False where something is."""

    def replace_if(self, key: str, etag: str, content: bytes) -> bool:
        """Write the bytes over those of an etag; return False where others, or none, are there."""

    def head(self, key: str) -> Head | None:
        """Return size and etag of what is at a key; None for nothing."""

    def keys(self, prefix: str) -> Iterator[str]:
        """Yield the keys that begin with a prefix (of whole names: "plans/"), in order."""

    def delete(self, key: str) -> None:
        """Remove what is at a key, if anything is."""

    def local_path(self, key: str) -> Path:
        """Return the path of a file with the bytes at a key, for memory maps."""
