"""Numbered series (snapshots, removals): 000001.json, 000002.json, …, and head.json with the hash of each.

An append writes the entry first and the head second. A process that ends between the two leaves an entry that the head does not list.
The entry holds the hash of the series before it, so that readers accept exactly this one, and the next append lists it.
Everything else that differs from the head is refused: a lost removal would bring removed samples back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tailwise.catalog import layout
from tailwise.catalog.files import (
    FileStamp,
    digest,
    file_digest,
    file_stamp,
    read_record,
    record_bytes,
)
from tailwise.catalog.layout import HEAD
from tailwise.errors import ConflictError, UserError
from tailwise.storage.local_store import store_at
from tailwise.storage.store import Store

PREVIOUS = "previous"  # in an entry: the hash of the series before it


@dataclass(frozen=True)
class Series:
    """One numbered series of a catalog."""

    folder: Path  # of the entries

    @property
    def _store(self) -> Store:
        return store_at(self.folder)

    def path(self, number: int) -> Path:
        """Return the path of an entry."""
        return layout.numbered(self.folder, number)

    def begin(self) -> None:
        """Write the head of an empty series, unless there is one."""
        self._store.put_if_absent(HEAD, record_bytes({"entries": []}))

    def read(self) -> list[dict[str, Any]]:
        """Return all entries, oldest first, without what links them.

        Raises:
            UserError: an entry or the head is missing, changed or surplus; names the file and the remedy.
        """
        entries, _ = self._checked()
        return [{name: value for name, value in entry.items() if name != PREVIOUS} for entry in entries]

    def known(self) -> list[dict[str, Any]]:
        """Return the same as `read`. A process reads each state of the files once; a change by any process is another state."""
        paths = [
            path for path in sorted(self.folder.glob(f"*{layout.RECORD}")) if path.name == HEAD or path.stem.isdigit()
        ]
        return [dict(entry) for entry in _entries(self, tuple(map(file_stamp, paths)))]

    def append(self, value: Mapping[str, Any]) -> int:
        """Write the next entry; returns its number.

        Raises:
            ConflictError: another process appends at the same time.
            UserError: as `read`.
        """
        entries, hashes = self._checked()
        self._list(hashes)
        path = self.path(len(entries) + 1)
        if not self._store.put_if_absent(path.name, record_bytes({**value, PREVIOUS: digest(hashes)})):
            raise ConflictError(f"another process has written {path} at this moment: repeat this command")
        self._list([*hashes, file_digest(path)])
        return len(entries) + 1

    def settle(self) -> None:
        """List an entry whose writer ended before it could. No other process may be appending."""
        self._list(self._checked()[1])

    def _list(self, hashes: list[str]) -> None:
        """Write the head, unless it is as it should be."""
        head = self._store.head(HEAD)
        if (
            head is not None
            and self._listed() != hashes
            and not self._store.replace_if(HEAD, head.etag, record_bytes({"entries": hashes}))
        ):
            raise ConflictError(f"another process has written {self.folder / HEAD} at this moment: repeat this command")

    def _checked(self) -> tuple[list[dict[str, Any]], list[str]]:
        """Return all entries and the hash of each file."""
        # The folder is listed before the head is read: another process may be appending.
        there = self._there()
        listed = self._listed()
        entries, hashes = [], []
        for number in range(1, len(listed) + 1):
            entries.append(self._entry(number, listed))
            hashes.append(file_digest(self.path(number)))
            if hashes[-1] != listed[number - 1]:
                raise self._refused(self.path(number), f"is not the entry that {HEAD} lists")
        following = self.path(len(entries) + 1)
        if following in there:
            entry = self._entry(len(entries) + 1, listed)
            if entry.get(PREVIOUS) != digest(hashes):
                raise self._refused(following, f"is not listed in {HEAD}, and does not follow the entries before it")
            entries.append(entry)
            hashes.append(file_digest(following))
        surplus = [path for path in there if int(path.stem) > len(entries) or path != self.path(int(path.stem))]
        if surplus:
            raise self._refused(surplus[0], f"is not listed in {HEAD}")
        return entries, hashes

    def _there(self) -> list[Path]:
        return sorted(path for path in self.folder.glob(f"??????{layout.RECORD}") if path.stem.isdigit())

    def _listed(self) -> list[str]:
        """Return the hashes in the head."""
        path = self.folder / HEAD
        if not path.exists():
            raise self._refused(path, "is missing")
        entries = read_record(path).get("entries")
        if not isinstance(entries, list):
            raise self._refused(path, "is damaged")
        return entries

    def _entry(self, number: int, listed: list[str]) -> dict[str, Any]:
        path = self.path(number)
        if not path.exists():
            raise self._refused(path, f"is missing ({HEAD} lists {len(listed)} entries)")
        return read_record(path)

    def _refused(self, path: Path, fault: str) -> UserError:
        return UserError(
            f"{path} {fault}: restore the folder {self.folder.name} from a backup of this catalog; without one, import the pool into "
            "a new catalog and repeat the removals there"
        )


@lru_cache(maxsize=64)
def _entries(series: Series, stamps: tuple[FileStamp, ...]) -> list[dict[str, Any]]:  # noqa: ARG001  (the state of the files)
    return series.read()
