"""Import: which row of which file belongs to each row of the catalog (a reduce that plans the reads)."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.files import create_array, read_array
from tailwise.catalog.rejections import Rejections, RejectionWriter
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.execution.base import KERNEL, Apply
from tailwise.execution.keys import ABSENT, AMBIGUOUS
from tailwise.mapped import release_pages
from tailwise.shards.columns import DAMAGE
from tailwise.sources.embedding_files import BadPartition, EmbeddingFile, NamedRows
from tailwise.steps.importing.rows import AMBIGUOUS_TAR, ELSEWHERE, RowFinder
from tailwise.storage.local import in_place

INDEX = "index"  # folder for the indices of a join
CHUNK_ROWS = 65_536
FILL_ROWS = 8192
FILL_NUMBERS = 1 << 23  # bounds memory where rows are wide
PLAN_ROW = np.dtype([("file", "<i4"), ("position", "<i8"), ("present", "?")])
Unfit = npt.NDArray[np.bool_]
PartFiles = tuple[Part, Mapping[int, NamedRows]]  # a part, and the files that its rows are read from, by number


@dataclass(frozen=True)
class Joining:
    """Arguments of an import that joins values of files to samples."""

    catalog: Catalog
    rejections: Rejections
    max_rejected: float  # share of the files' rows that may be unusable; without a sample, or a second one, is no fault
    context: Context
    workers: int | None
    given: frozenset[int] | None = None  # shards that came with the files, which then belong to these alone


@dataclass(frozen=True)
class Wording:
    """How a join speaks of what it joins."""

    stage: str  # in lists of what was left out
    value: str  # one row of a file
    step: str  # of the progress


@dataclass(frozen=True)
class JoinPlan:
    """Address of a read plan, PLAN_ROW [rows]: file of each row (−1: none), position in it, and whether it needs no value."""

    folder: Path  # of the array, and of copies of files that cannot be read in place
    first_row: int  # of the plan

    @property
    def path(self) -> Path:
        """File of the plan."""
        return self.folder / "plan.npy"

    def rows(self, part: Part) -> npt.NDArray[Any]:
        """Return the plan of a part, mapped."""
        return read_array(self.path)[self.span(part)]

    def span(self, part: Part) -> slice:
        """Return the rows of a part, counted from the first row of the plan."""
        begin = part.first_row - self.first_row
        return slice(begin, begin + part.rows)

    def unpacked(self, number: int) -> Path:
        """Return the place for a copy of a file."""
        return self.folder / f"rows-{number}.npy"

    def values(
        self, item: PartFiles, width: int, dtype: npt.DTypeLike
    ) -> Generator[tuple[slice, npt.NDArray[Any]], None, None]:
        """Yield consecutive rows of a part, counted from its first, and their values [n, width]; zeros for rows without a value.

        Raises:
            UserError: a file changed since the plan was made.
        """
        part, files = item
        plan, sources, at = self.rows(part), {}, -1
        try:
            for at, source in files.items():
                sources[at] = source.rows(self.unpacked(at))
        except DAMAGE as error:
            raise UserError(f"{files[at].path} changed while it was read ({error}): restore it, then repeat") from error
        step = max(1, min(FILL_ROWS, FILL_NUMBERS // max(1, width)))
        for start in range(0, part.rows, step):
            chunk = plan[start : start + step]
            values = np.zeros((len(chunk), width), dtype)
            for number in np.setdiff1d(chunk["file"], [-1]).tolist():
                mine = np.flatnonzero(chunk["file"] == number)
                at_once = slice(None) if len(mine) == len(chunk) else mine
                with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, and is rejected as such
                    values[at_once] = sources[number][chunk["position"][mine]].reshape(len(mine), width)
                release_pages(sources[number])
            yield slice(start, start + len(chunk)), values


@dataclass(frozen=True)
class _Names:
    """Names of the rows of a file that can be used, and `unfit` of Opened."""

    names: list[pa.Array]
    unfit: Unfit | None


def _open(plan: JoinPlan, dimension: int | None, item: tuple[int, EmbeddingFile]) -> _Names | BadPartition:
    """Check a file, and read its names. Item: its number, and the file."""
    number, file = item
    opened = file.open(dimension, plan.unpacked(number))
    return opened if isinstance(opened, BadPartition) else _Names(list(opened.names), opened.unfit)


class Join:
    """The making of a read plan.

    Attributes:
        plan: its address.
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
        """Begin an empty plan for the rows of some parts."""
        self.log, self._finder, self._wording = log, finder, wording
        self.plan = JoinPlan(work, parts[0].first_row)
        self._writing = ExitStack()
        temporary = self._writing.enter_context(in_place(self.plan.path))
        self._rows = create_array(temporary, (parts[-1].span.stop - parts[0].first_row,), PLAN_ROW)
        self._rows["file"] = -1
        self.matched = self.known = self.read = self.faulty = 0
        self.first_unmatched_key: str | None = None

    def note_present(self, part: Part, present: npt.NDArray[np.bool_]) -> None:
        """Note which rows of a part need no value."""
        self._rows["present"][self.plan.span(part)] = present

    def read_names(
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
        opened = context.executor.map(Apply(partial(_open, self.plan, dimension)), enumerate(files), KERNEL)
        for number, found in enumerate(context.progress(opened, self._wording.step, len(files))):
            if isinstance(found, BadPartition):
                self.reject(found.reason, files[number].path, None, found.detail, found.rows)
                self.read += found.rows
                self.faulty += found.rows
                continue
            start = 0
            for names in found.names:
                for at in range(0, len(names), CHUNK_ROWS):
                    chunk = names.slice(at, CHUNK_ROWS)
                    self.plan_chunk(number, files[number], start, chunk, found.unfit, own[number])
                    start += len(chunk)

    def plan_chunk(
        self, number: int, file: NamedRows, start: int, names: pa.Array, unfit: Unfit | None, own: bool
    ) -> npt.NDArray[np.bool_]:
        """Note the places of some values of a file, which `start` values come before; return which a row gets: bool [n]."""
        names = names.fill_null("")
        rows = self._finder.find(file, names, start, own)
        self.read += len(rows)
        self.faulty += int(np.isin(rows, (AMBIGUOUS, AMBIGUOUS_TAR)).sum())
        value = self._wording.value
        for code, reason, detail in (
            (AMBIGUOUS, f"ambiguous {file.naming}", "several samples have it"),
            (AMBIGUOUS_TAR, "ambiguous tar", "several tars may be the one named, or several named ones the same tar"),
            (ABSENT, f"{value} without sample", None),
        ):
            for at in np.flatnonzero(rows == code):
                self.reject(reason, file.path, names[at].as_py(), detail)
        for at in np.flatnonzero(rows == ABSENT)[:1]:
            self.first_unmatched_key = self.first_unmatched_key or names[at].as_py()
        self.known += int((rows == ELSEWHERE).sum())
        hits = np.flatnonzero(rows >= 0)
        if unfit is not None:
            without = unfit[start : start + len(rows)][hits]
            for at in hits[without]:
                self.reject("no vector of the file's width", file.path, names[at].as_py())
            self.faulty += int(without.sum())
            hits = hits[~without]
        rows -= self.plan.first_row
        there = self._rows["present"][rows[hits]]
        self.known += int(there.sum())
        hits = hits[~there]
        _, first = np.unique(rows[hits], return_index=True)
        keep = np.zeros(len(rows), np.bool_)
        keep[hits[first]] = True
        keep[hits] &= self._rows["file"][rows[hits]] < 0
        for at in hits[~keep[hits]]:
            self.reject(f"duplicate {value}", file.path, names[at].as_py(), "the first one is kept")
        self._rows["file"][rows[keep]] = number
        self._rows["position"][rows[keep]] = start + np.flatnonzero(keep)
        self.matched += int(keep.sum())
        return keep

    def reject(self, reason: str, file: Path | str, key: str | None, detail: str | None = None, rows: int = 1) -> None:
        """Note what is left out."""
        self.log.add(self._wording.stage, reason, str(file), key, detail, rows)

    def part_files(self, parts: Sequence[Part], files: Sequence[NamedRows]) -> list[PartFiles]:
        """Complete the plan; return parts, and those of the files that their rows are read from."""
        self._writing.close()
        numbers = [np.setdiff1d(self._rows["file"][self.plan.span(part)], [-1]).tolist() for part in parts]
        return [(part, {number: files[number] for number in found}) for part, found in zip(parts, numbers, strict=True)]
