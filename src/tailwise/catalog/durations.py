"""Seconds that artifacts and embedding columns took, beside their files. Only the ledger of a comparison reads them.

Each process writes a file of its own, so that several can work on one artifact. The time of a killed process is not counted.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import ClassVar
from uuid import uuid4

from tailwise.catalog.files import read_record, write_record
from tailwise.catalog.layout import RECORD, SECONDS
from tailwise.errors import UserError


class Watch:
    """Measures a block, without the blocks of other watches inside it."""

    _running: ClassVar[list[Watch]] = []

    def __init__(self) -> None:
        """Start."""
        self._file, self._began, self._inside = f"{SECONDS}{uuid4().hex}{RECORD}", perf_counter(), 0.0

    def __enter__(self) -> Watch:
        """Count the watches of the block apart."""
        self._running.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        """Take the seconds off those of the block around this one."""
        self._running.remove(self)
        if self._running:
            self._running[-1]._inside += perf_counter() - self._began

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return perf_counter() - self._began - self._inside

    def save(self, folder: Path) -> None:
        """Write the seconds so far to the folder of an artifact or a column."""
        with suppress(OSError, UserError):  # nothing depends on this file
            write_record(folder / self._file, {"seconds": round(self.seconds, 3)})


def seconds_spent(folder: Path) -> float | None:
    """Return the seconds that all processes spent on an artifact or a column; None if they are not known."""
    found = []
    for path in folder.glob(f"{SECONDS}*{RECORD}"):
        with suppress(UserError):  # a damaged file
            found.append(float(read_record(path)["seconds"]))
    return sum(found) if found else None
