"""Numbered series (snapshots, removals): 000001.json, 000002.json, …, and head.json with the hash of each.

An append writes the entry first and the head second. A process that ends between the two leaves an entry that the head does not list.
The entry holds the hash of the series before it, so that readers accept exactly this one, and the next append lists it.
Everything else that differs from the head is refused: a lost removal would bring removed samples back.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tailwise.catalog import layout
from tailwise.catalog.files import FileStamp, digest, file_digest, file_stamp, read_record, write_json, write_record
from tailwise.catalog.layout import HEAD
from tailwise.errors import UserError

PREVIOUS = "previous"  # in an entry: the hash of the series before it; absent where an older version wrote it


@dataclass(frozen=True)
class Series:
    """One numbered series of a catalog.

    Attributes:
        folder: where its entries lie.
        required: whether the head must exist. A catalog that an older version made has none until the series is read.
    """

    folder: Path
    required: bool

    def path(self, number: int) -> Path:
        """Return the path of an entry."""
        return layout.numbered(self.folder, number)

    def begin(self) -> None:
        """Write the head of an empty series."""
        write_record(self.folder / HEAD, {"entries": []})

    def read(self) -> list[dict[str, Any]]:
        """Return all entries, oldest first, without what links them.

        Raises:
            UserError: an entry or the head is missing, changed or surplus; names the file and the remedy.
        """
        entries, hashes = self._checked()
        if hashes and not (self.folder / HEAD).exists():
            self._adopt(hashes)
        return [{name: value for name, value in entry.items() if name != PREVIOUS} for entry in entries]

    def known(self) -> list[dict[str, Any]]:
        """Return the same as `read`. A process reads each state of the files once; a change by any process is another state."""
        paths = [path for path in (self.folder / HEAD, *self._there()) if path.exists()]
        return [dict(entry) for entry in _entries(self, tuple(map(file_stamp, paths)))]

    def append(self, value: Mapping[str, Any]) -> int:
        """Write the next entry; returns its number. No other process may be appending.

        Raises:
            UserError: as `read`.
        """
        entries, hashes = self._checked()
        path = self.path(len(entries) + 1)
        write_record(self.folder / HEAD, {"entries": hashes})
        write_json(path, {**value, PREVIOUS: digest(hashes)})
        write_record(self.folder / HEAD, {"entries": [*hashes, file_digest(path)]})
        return len(entries) + 1

    def settle(self) -> None:
        """List an entry whose writer ended before it could. No other process may be appending."""
        _, hashes = self._checked()
        if self._listed() not in (None, hashes):
            write_record(self.folder / HEAD, {"entries": hashes})

    def _adopt(self, hashes: list[str]) -> None:
        """Write the head of an older version's series, where the folder can be written to: else a lost newest entry is not missed."""
        made = self.folder / f".{uuid.uuid4().hex}.{HEAD}"
        with suppress(OSError):
            write_record(made, {"entries": hashes})
            try:
                (self.folder / HEAD).hardlink_to(made)  # which never replaces a head that another process has written
            finally:
                made.unlink()

    def _checked(self) -> tuple[list[dict[str, Any]], list[str]]:
        """Return all entries and the hash of each file."""
        # The folder is listed before the head is read: another process may be appending.
        there = self._there()
        listed = self._listed()
        entries, hashes = [], []
        for number in range(1, len(there if listed is None else listed) + 1):
            entries.append(self._entry(number, listed))
            hashes.append(file_digest(self.path(number)))
            if listed is None and PREVIOUS in entries[-1]:
                raise self._refused(self.folder / HEAD, "is missing")
            if listed is not None and hashes[-1] != listed[number - 1]:
                raise self._refused(self.path(number), f"is not the entry that {HEAD} lists")
        following = self.path(len(entries) + 1)
        if following in there and listed is not None:
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

    def _listed(self) -> list[str] | None:
        """Return the hashes in the head; None in a catalog that may do without."""
        path = self.folder / HEAD
        if not path.exists():
            if self.required:
                raise self._refused(path, "is missing")
            return None
        entries = read_record(path).get("entries")
        if not isinstance(entries, list):
            raise self._refused(path, "is damaged")
        return entries

    def _entry(self, number: int, listed: list[str] | None) -> dict[str, Any]:
        path = self.path(number)
        if not path.exists():
            known = f"{HEAD} lists {len(listed)} entries" if listed is not None else "later entries exist"
            raise self._refused(path, f"is missing ({known})")
        return read_record(path)

    def _refused(self, path: Path, fault: str) -> UserError:
        return UserError(
            f"{path} {fault}: restore the folder {self.folder.name} from a backup of this catalog; without one, import the pool into "
            "a new catalog and repeat the removals there"
        )


@lru_cache(maxsize=64)
def _entries(series: Series, stamps: tuple[FileStamp, ...]) -> list[dict[str, Any]]:  # noqa: ARG001  (the state of the files)
    return series.read()
