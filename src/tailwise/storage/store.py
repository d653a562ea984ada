"""Stores: bytes at keys, as a catalog needs them.

A key is a relative path with slashes. What is written under a key is there whole, or not at all. `put_if_absent` and `replace_if` let one
of several writers win, on one machine or many; the others learn that they have lost.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from tailwise.storage.local import TEMPORARY_SUFFIX, folder_locked, put_if_absent, replacing


def check_key(key: str) -> str:
    """Return a key; raise a ValueError if it leads out of the store."""
    parts = PurePosixPath(key).parts
    if not parts or key.startswith("/") or ".." in parts:
        raise ValueError(f"{key!r} is no key: give a relative path without '..'")
    return key


@dataclass(frozen=True)
class Head:
    """Attributes of the bytes at a key.

    Attributes:
        size: in bytes.
        etag: differs whenever the content does.
    """

    size: int
    etag: str


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


class LocalStore:
    """A folder. Its files may be read by any tool."""

    def __init__(self, root: Path) -> None:
        """Name the folder; it is made by the first write."""
        self.root = root

    def get(self, key: str) -> bytes:
        """See `Store`."""
        return self.local_path(key).read_bytes()

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """See `Store`."""
        with self.local_path(key).open("rb") as stream:
            return [os.pread(stream.fileno(), stop - start, start) for start, stop in ranges]

    def put(self, key: str, content: bytes) -> None:
        """See `Store`."""
        with replacing(self.local_path(key), unique=True) as temporary:
            temporary.write_bytes(content)

    def put_if_absent(self, key: str, content: bytes) -> bool:
        """See `Store`."""
        return put_if_absent(self.local_path(key), content)

    def replace_if(self, key: str, etag: str, content: bytes) -> bool:
        """See `Store`."""
        if self.head(key) is None:
            return False
        with folder_locked(self.local_path(key).parent):
            found = self.head(key)
            if found is None or found.etag != etag:
                return False
            self.put(key, content)
            return True

    def head(self, key: str) -> Head | None:
        """See `Store`."""
        try:
            status = self.local_path(key).stat()
        except FileNotFoundError:
            return None
        return Head(status.st_size, f"{status.st_ino}-{status.st_mtime_ns}-{status.st_size}")

    def keys(self, prefix: str) -> Iterator[str]:
        """See `Store`. Temporary files are no keys."""
        folder = self.local_path(prefix) if prefix else self.root
        shown = (path for path in folder.rglob("*") if path.suffix != TEMPORARY_SUFFIX)
        yield from sorted(path.relative_to(self.root).as_posix() for path in shown if path.is_file())

    def delete(self, key: str) -> None:
        """See `Store`."""
        self.local_path(key).unlink(missing_ok=True)

    def local_path(self, key: str) -> Path:
        """See `Store`: the file itself.

        Raises:
            ValueError: the key leads out of the store.
        """
        return self.root / check_key(key)
