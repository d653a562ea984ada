"""Bytes at keys in a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from tailwise.storage.local import TEMPORARY_SUFFIX, folder_locked, put_if_absent, replacing
from tailwise.storage.store import Head, Store, check_key
from tailwise.storage.store_path import stored


def store_at(folder: Path) -> Store:
    """Return the store of the files in a folder."""
    place = stored(folder)
    return LocalStore(folder) if place is None else place.as_store()


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
