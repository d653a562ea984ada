"""Captions that were joined from tables, beside those that samples have of their own.

Of each part there are two files: the ends of the captions, and the text of all of them, UTF-8. An empty caption is none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.catalog import layout
from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.columns import PartColumn
from tailwise.catalog.kinds import CAPTIONS
from tailwise.catalog.row_lists import RowLists

ORIGINAL = "original"  # the name of samples' own captions


class Captions(RowLists):
    """Finished captions of a snapshot, see `RowLists`."""

    kind, files = CAPTIONS, (layout.CAPTION_ENDS, layout.CAPTION_TEXT)

    def of(self, rows: npt.NDArray[np.int64]) -> list[str | None]:
        """Return the caption of each row of the catalog, int64 [n] in any order; None where there is none."""
        texts: list[str | None] = [None] * len(rows)
        known = np.flatnonzero(rows < len(self.rows))  # newer samples have none
        for part, where in self.rows.split(rows[known]):
            ends, text = self.map_part(part)
            places = known[where]
            local = rows[places] - part.first_row
            starts = np.where(local > 0, ends[local - 1], 0)
            for place, start, stop in zip(places.tolist(), starts.tolist(), ends[local].tolist(), strict=True):
                if stop > start:
                    texts[place] = text[start:stop].tobytes().decode()
        self.note_read(len(rows))
        return texts

    def lacking(self, part: Part) -> int:
        """Return the number of rows of a part of the catalog that have none."""
        if part.number >= self.snapshot.parts:
            return part.rows
        ends = caption_columns(self)[0].read(part)
        return int((np.diff(ends, prepend=0) == 0).sum())


def caption_columns(artifact: Any) -> tuple[PartColumn, PartColumn]:  # noqa: ANN401  (finished, or being made)
    """Return the ends of the captions in the text, int64 [rows], and the text of all captions of a part, uint8 [bytes]."""
    return PartColumn(artifact.folder, layout.CAPTION_ENDS), PartColumn(artifact.folder, layout.CAPTION_TEXT)


def find_captions(catalog: Catalog, name: str | None) -> Captions | None:
    """Return captions by name; None for ORIGINAL, the samples' own, and for no name."""
    return None if name in (None, ORIGINAL) else Captions(catalog, str(name))
