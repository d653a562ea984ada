"""Artifacts with a list for each row, such as the bytes of a caption: of each part, the ends of the lists and all their items."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from tailwise.catalog.artifacts import FinishedArtifact, finished_folder, read_manifest
from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.columns import PartColumn, RowsByPart
from tailwise.catalog.kinds import Kind
from tailwise.errors import UserError
from tailwise.mapped import release_pages
from tailwise.storage.lru import LRUCache
from tailwise.text import command_line

OPEN_PARTS = 64  # every map holds a file descriptor
RELEASE_AFTER_ROWS = 1 << 20


class RowLists(FinishedArtifact):
    """Finished lists of a snapshot. May be pickled; files are mapped in the process that reads.

    Attributes:
        kind: of the artifact, whose section is the name of the command that makes it, too.
        files: names of its columns: the ends, int64 [rows], and the items of all lists of a part.
        catalog: the catalog that holds them.
        name: of the lists.
    """

    kind: ClassVar[Kind]
    files: ClassVar[Sequence[str]]

    def __init__(self, catalog: Catalog, name: str) -> None:
        """Open lists.

        Raises:
            UserError: there are none of this name, or they are of another snapshot.
        """
        self.catalog, self.name = catalog, name
        what, place = self.kind.section, self.kind.path(catalog.folder, name)
        self.manifest = read_manifest(
            place, what, f"make them with {command_line(what, catalog.folder, 'TABLE', name=name)}"
        )
        self.folder = finished_folder(place, self.manifest["identity"])
        if self.snapshot.id != self.inputs["snapshot"]:
            raise UserError(f"{what} {name!r} were made for another snapshot {self.snapshot.number}: make them again")
        self.rows = RowsByPart(catalog.parts(self.snapshot))
        self._maps: LRUCache[int, tuple[npt.NDArray[Any], ...]] = LRUCache(OPEN_PARTS)
        self._read_rows = 0

    def __reduce__(self) -> tuple[type[RowLists], tuple[Catalog, str]]:
        return type(self), (self.catalog, self.name)

    def map_part(self, part: Part) -> tuple[npt.NDArray[Any], ...]:
        """Return the two columns of a part, mapped."""
        return self._maps.get(part.number, partial(self.read_part, part))

    def read_part(self, part: Part) -> tuple[npt.NDArray[Any], ...]:
        """Return the two columns of a part, mapped each time: they go when the caller is done with them."""
        return tuple(PartColumn(self.folder, name).read(part) for name in self.files)

    def note_read(self, rows: int) -> None:
        """Count rows that were read, and release the pages of the maps now and then: they would count as memory of this process."""
        self._read_rows += rows
        if self._read_rows > RELEASE_AFTER_ROWS:
            self._read_rows = 0
            for arrays in self._maps.values():
                for array in arrays:
                    release_pages(array)


def places_of_lists(firsts: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return firsts[i] … firsts[i] + counts[i] − 1 for each i, one after another: int64 [sum of counts]. Both are int64 [n]."""
    before = np.cumsum(counts) - counts
    places: npt.NDArray[np.int64] = np.arange(int(counts.sum())) + np.repeat(firsts - before, counts)
    return places
