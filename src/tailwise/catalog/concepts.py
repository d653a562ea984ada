"""Lists of concepts: several a sample, such as tags, or the entries of a list that its caption holds.

Of each part there are two files: the ends of the lists, and the concepts of all of them, as numbers. Concepts are numbered in the order
of their names, so that the order of the numbers is that of the names.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.catalog import layout
from tailwise.catalog.catalog import Part, Snapshot
from tailwise.catalog.columns import PartColumn
from tailwise.catalog.files import read_table
from tailwise.catalog.kinds import CONCEPTS
from tailwise.catalog.matches import Found
from tailwise.catalog.row_lists import RowLists, places_of_lists
from tailwise.errors import UserError


class Concepts(RowLists):
    """Finished lists of concepts of a snapshot, see `RowLists`."""

    kind, files = CONCEPTS, (layout.CONCEPT_ENDS, layout.CONCEPT)

    @cached_property
    def entries(self) -> list[str]:
        """Return the names of the K concepts, sorted by code point."""
        names: list[str] = read_table(self.folder / layout.ENTRY_TABLE).column("concept").to_pylist()
        return names

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Return the number of samples that have each concept: int64 [K]. Drop lists and removals change nothing."""
        counts: npt.NDArray[np.int64] = read_table(self.folder / layout.ENTRY_TABLE).column("count").to_numpy()
        return counts

    def check_covers(self, snapshot: Snapshot) -> None:
        """Raise a UserError if a snapshot has samples that were imported after the lists were made."""
        if self.snapshot.rows < snapshot.rows:
            newer = snapshot.rows - self.snapshot.rows
            raise UserError(
                f"concepts {self.name!r} are of snapshot {self.snapshot.number}: {newer:,} samples of snapshot {snapshot.number} "
                "have none yet; make concepts of the newest snapshot under another name"
            )

    def part(self, part: Part, kept: npt.NDArray[np.bool_]) -> Found:
        """Return the number of concepts of each row of a part, and the concepts; rows that are not kept have none."""
        ends, entries = self.read_part(part)
        counts = np.diff(ends, prepend=0)
        if kept.all():
            return counts.astype(np.int32), entries
        return np.where(kept, counts, 0).astype(np.int32), entries[np.repeat(kept, counts)]

    def of(self, rows: npt.NDArray[np.int64]) -> Found:
        """Return the lists of rows of the catalog, int64 [n] in any order: how long each is, int32 [n], and all concepts, int32 [m]."""
        counts, firsts = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
        parts = list(self.rows.split(rows))
        for part, where in parts:
            ends, _ = self.map_part(part)
            local = rows[where] - part.first_row
            firsts[where] = np.where(local > 0, ends[local - 1], 0)
            counts[where] = ends[local] - firsts[where]
        before = np.cumsum(counts) - counts
        entries = np.empty(int(counts.sum()), np.int32)
        for part, where in parts:
            _, own = self.map_part(part)
            places = places_of_lists(before[where], counts[where])
            entries[places] = own[places_of_lists(firsts[where], counts[where])]
        self.note_read(len(rows))
        return counts.astype(np.int32), entries


def concept_columns(artifact: Any) -> tuple[PartColumn, PartColumn]:  # noqa: ANN401  (finished, or being made)
    """Return the ends of the lists of a part, int64 [rows], and the concepts of all its lists, int32 [m]."""
    return PartColumn(artifact.folder, layout.CONCEPT_ENDS), PartColumn(artifact.folder, layout.CONCEPT)
