"""Import: which row of which file belongs to each row of the catalog (a reduce that plans the reads)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tailwise.catalog.catalog import Part
from tailwise.catalog.files import create_array
from tailwise.catalog.rejections import RejectionWriter
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.execution.keys import ABSENT, AMBIGUOUS
from tailwise.shards.columns import DAMAGE
from tailwise.sources.embedding_files import BadPartition, EmbeddingFile, Opened, StoredRows
from tailwise.steps.importing.rows import AMBIGUOUS_TAR, ELSEWHERE, RowFinder

CHUNK_ROWS = 65_536


@dataclass(frozen=True)
class Wording:
    """How a join speaks of what it joins.

    Attributes:
        stage: in lists of what was left out.
        value: one row of a file.
        step: of the progress.
    """

    stage: str
    value: str
    step: str


class Join:
    """The read plan: for each row, which file and which position in it.

    Attributes:
        file: int32 [rows], −1 for none; mapped. Row 0 is the first of the first part.
        position: int64 [rows], in that file; mapped.
        present: bool [rows], rows that want nothing; mapped.
        matched: rows that get something.
        read: rows of the files, those of unusable files among them, as far as their number is known.
        faulty: rows of the files that can't be used, whatever the catalog holds.
        known: rows of files that are not for the wanted rows, which is no fault.
        first_unmatched_key: the first name that no sample has.
        log: takes what is left out.
    """

    def __init__(
        self, parts: Sequence[Part], finder: RowFinder, work: Path, log: RejectionWriter, wording: Wording
    ) -> None:
        """An empty plan for the rows of some parts."""
        self.log, self._finder, self._work, self._wording = log, finder, work, wording
        self._first_row = parts[0].first_row
        rows = parts[-1].span.stop - self._first_row
        self.file = create_array(work / "file.npy", (rows,), np.int32)
        self.position = create_array(work / "position.npy", (rows,), np.int64)
        self.present = create_array(work / "present.npy", (rows,), np.bool_)
        self.file[:] = -1
        self.matched = self.known = self.read = self.faulty = 0
        self.first_unmatched_key: str | None = None

    def span(self, part: Part) -> slice:
        """Where the rows of a part stand in the plan's arrays."""
        begin = part.first_row - self._first_row
        return slice(begin, begin + part.rows)

    def plan(
        self, files: Sequence[EmbeddingFile], own: Sequence[bool], dimension: int | None, context: Context
    ) -> None:
        """Note for every row the place of its value.

        Args:
            files: in order; the first value of a row is taken.
            own: for each, whether it belongs to the shards that came with it alone.
            dimension: the width of the rows.
            context: runs the tasks and shows progress.
        """
        self._finder.note_tars(files)
        for number, file in enumerate(context.progress(files, self._wording.step, len(files))):
            opened = file.open(dimension, self._unpacked(number))
            if isinstance(opened, BadPartition):
                self.reject(opened.reason, file.path, None, opened.detail, opened.rows)
                self.read += opened.rows
                self.faulty += opened.rows
                continue
            start = 0
            for names in opened.names:
                for at in range(0, len(names), CHUNK_ROWS):
                    chunk = names.slice(at, CHUNK_ROWS)
                    self._plan_chunk(number, file, start, chunk, opened, own[number])
                    start += len(chunk)

    def _unpacked(self, number: int) -> Path:
        return self._work / f"rows-{number}.npy"

    def _plan_chunk(
        self, number: int, file: EmbeddingFile, start: int, names: pa.Array, opened: Opened, own: bool
    ) -> None:
        texts = [name if name is not None else "" for name in names.to_pylist()]
        rows = self._finder.find(file, texts, own)
        self.read += len(rows)
        self.faulty += int(np.isin(rows, (AMBIGUOUS, AMBIGUOUS_TAR)).sum())
        value = self._wording.value
        for code, reason, detail in (
            (AMBIGUOUS, f"ambiguous {file.naming}", "several samples have it"),
            (AMBIGUOUS_TAR, "ambiguous tar", "several tars may be the one named, or several named ones the same tar"),
            (ABSENT, f"{value} without sample", None),
        ):
            for at in np.flatnonzero(rows == code):
                self.reject(reason, file.path, texts[at], detail)
        for at in np.flatnonzero(rows == ABSENT)[:1]:
            self.first_unmatched_key = self.first_unmatched_key or texts[at]
        self.known += int((rows == ELSEWHERE).sum())
        hits = np.flatnonzero(rows >= 0)
        if opened.unfit is not None:
            unfit = opened.unfit[start : start + len(rows)]
            for at in hits[unfit[hits]]:
                self.reject("no vector of the file's width", file.path, texts[at])
            self.faulty += int(unfit[hits].sum())
            hits = hits[~unfit[hits]]
        there = self.present[rows[hits] - self._first_row]
        self.known += int(there.sum())
        hits = hits[~there]
        _, first = np.unique(rows[hits], return_index=True)
        keep = np.zeros(len(rows), np.bool_)
        keep[hits[first]] = True
        keep[hits] &= self.file[rows[hits] - self._first_row] < 0
        for at in hits[~keep[hits]]:
            self.reject(f"duplicate {value}", file.path, texts[at], "the first one is kept")
        self.file[rows[keep] - self._first_row] = number
        self.position[rows[keep] - self._first_row] = start + np.flatnonzero(keep)
        self.matched += int(keep.sum())

    def reject(self, reason: str, file: Path | str, key: str | None, detail: str | None = None, rows: int = 1) -> None:
        """Notes what is left out."""
        self.log.add(self._wording.stage, reason, str(file), key, detail, rows)

    def sources(self, part: Part, files: Sequence[EmbeddingFile]) -> dict[int, npt.NDArray[Any] | StoredRows]:
        """The rows of the files that rows of a part are read from, by the file's number.

        Raises:
            UserError: a file changed since it was planned.
        """
        sources, at = {}, -1
        try:
            for at in np.setdiff1d(self.file[self.span(part)], [-1]).tolist():
                sources[at] = files[at].rows(self._unpacked(at))
        except DAMAGE as error:
            raise UserError(f"{files[at].path} changed while it was read ({error}): restore it, then repeat") from error
        return sources
