"""Captions that were joined from tables, beside those that samples have of their own.

Of each part there are two files: the ends of the captions, and the text of all of them, UTF-8. An empty caption is none.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.catalog import layout
from tailwise.catalog.artifacts import FinishedArtifact, finished_folder, read_manifest
from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.columns import PartColumn, RowsByPart
from tailwise.catalog.kinds import CAPTIONS
from tailwise.errors import UserError
from tailwise.mapped import release_pages
from tailwise.storage.lru import LRUCache
from tailwise.text import command_line

ORIGINAL = "original"  # the name of samples' own captions
OPEN_PARTS = 64  # every map holds a file descriptor
RELEASE_AFTER_ROWS = 1 << 20


class Captions(FinishedArtifact):
    """Finished captions of a snapshot. May be pickled; files are mapped in the process that reads.

    Attributes:
        catalog: the catalog that holds them.
        name: of them.
    """

    def __init__(self, catalog: Catalog, name: str) -> None:
        """Open captions.

        Raises:
            UserError: there are none of this name.
        """
        self.catalog, self.name = catalog, name
        place = CAPTIONS.path(catalog.folder, name)
        remedy = f"make them with {command_line('captions', catalog.folder, 'TABLE', name=name)}"
        self.manifest = read_manifest(place, "captions", remedy)
        self.folder = finished_folder(place, self.manifest["identity"])
        if self.snapshot.id != self.inputs["snapshot"]:
            raise UserError(f"captions {name!r} were made for another snapshot {self.snapshot.number}: make them again")
        self._rows = RowsByPart(catalog.parts(self.snapshot))
        self._maps: LRUCache[int, tuple[npt.NDArray[Any], ...]] = LRUCache(OPEN_PARTS)
        self._read_rows = 0

    def __reduce__(self) -> tuple[type[Captions], tuple[Catalog, str]]:
        return Captions, (self.catalog, self.name)

    def of(self, rows: npt.NDArray[np.int64]) -> list[str | None]:
        """Return the caption of each row of the catalog, int64 [n] in any order; None where there is none."""
        texts: list[str | None] = [None] * len(rows)
        known = np.flatnonzero(rows < len(self._rows))  # newer samples have none
        for part, where in self._rows.split(rows[known]):
            ends, text = self._maps.get(part.number, partial(self._map, part))
            places = known[where]
            local = rows[places] - part.first_row
            starts = np.where(local > 0, ends[local - 1], 0)
            for place, start, stop in zip(places.tolist(), starts.tolist(), ends[local].tolist(), strict=True):
                if stop > start:
                    texts[place] = text[start:stop].tobytes().decode()
        self._read_rows += len(rows)
        if self._read_rows > RELEASE_AFTER_ROWS:  # else all pages would count as memory of this process
            self._read_rows = 0
            for arrays in self._maps.values():
                for array in arrays:
                    release_pages(array)
        return texts

    def lacking(self, part: Part) -> int:
        """Return the number of rows of a part of the catalog that have none."""
        if part.number >= self.snapshot.parts:
            return part.rows
        ends = caption_columns(self)[0].read(part)
        return int((np.diff(ends, prepend=0) == 0).sum())

    def _map(self, part: Part) -> tuple[npt.NDArray[Any], ...]:
        return tuple(column.read(part) for column in caption_columns(self))


def caption_columns(artifact: Any) -> tuple[PartColumn, PartColumn]:  # noqa: ANN401  (finished, or being made)
    """Return the ends of the captions in the text, int64 [rows], and the text of all captions of a part, uint8 [bytes]."""
    return PartColumn(artifact.folder, layout.CAPTION_ENDS), PartColumn(artifact.folder, layout.CAPTION_TEXT)


def find_captions(catalog: Catalog, name: str | None) -> Captions | None:
    """Return captions by name; None for ORIGINAL, the samples' own, and for no name."""
    return None if name in (None, ORIGINAL) else Captions(catalog, str(name))
