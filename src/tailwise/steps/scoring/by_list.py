"""Filter by a list made elsewhere: keeps the samples that it names, or drops them; dead links can be replaced by other samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tailwise.catalog import layout
from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.catalog import Catalog, Part, Snapshot
from tailwise.catalog.drops import DropList, Survivors
from tailwise.catalog.files import create_array, file_digest
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.kernels.keyed import hash_range, stream_key
from tailwise.kernels.selection import order_statistics
from tailwise.requests import FilterRequest
from tailwise.steps.drops import drop_table, write_drops
from tailwise.steps.importing.listed import SUFFIXES, SampleList, check_matched, no_match, read_list
from tailwise.steps.scoring.scores import make_score, score_config, score_inputs
from tailwise.storage.local import scratch

NOT_NAMED, NAMED = "not in the list", "in the list"  # reasons of dropped samples
OTHER, LISTED, FILLED = 0, 1, 2  # states of a sample


def drop_by_list(catalog: Catalog, name: str, request: FilterRequest, context: Context) -> None:
    """Make a drop list of the samples that a file names (`exclude`), or of all others (`only`).

    The summary has pool, samples (that take part), kept, dropped, reasons; matched_by (a kind of MATCHES), entries (of the file), names
    (distinct ones), names_matched (that belong to a sample), samples_matched (that take part); and with `refill` filled.

    Raises:
        UserError: the file cannot be read, no name or too small a share belongs to samples, too few samples are left for `refill`, or all
            would be dropped.
    """
    snapshot = catalog.snapshot()
    listed = _listed(request)
    survivors = Survivors(catalog, request.without, snapshot)
    config: dict[str, Any] = {
        "snapshot": snapshot.number,
        "without": list(request.without),
        "rule": {"list": "only" if request.only is not None else "not", "match": request.match},
    }
    inputs = {"snapshot": snapshot.id, "list": file_digest(listed.path), **survivors.inputs}
    if request.refill == "random":
        config["refill"] = {"name": "random", "seed": request.seed or 0}
    elif request.refill is not None:
        config["refill"] = score_config(request.score)
        inputs |= score_inputs(catalog, snapshot, request.score)
    with Artifact(catalog.drops_folder(name), "filter", config, inputs) as artifact:
        if not artifact.done:
            with scratch(artifact.path(layout.WORK), own=True) as work:
                judge = _Judge(catalog, snapshot, listed, request, survivors, work, context)
                write_drops(artifact, judge.parts, judge.tables(), context)
                summary = judge.summary()
            artifact.finish(summary)
    check_matched(request.strict, DropList(catalog, name).summary, str(listed.path))


def try_list(catalog: Catalog, request: FilterRequest, context: Context) -> dict[str, Any]:
    """Return the summary of the drop list that a request would make; see `drop_by_list`."""
    snapshot = catalog.snapshot()
    survivors = Survivors(catalog, request.without, snapshot)
    with TemporaryDirectory() as folder:
        listed, work = _listed(request), Path(folder) / layout.WORK
        return _Judge(catalog, snapshot, listed, request, survivors, work, context).summary()


def _listed(request: FilterRequest) -> SampleList:
    listed = SampleList(request.only or request.exclude or Path(), match=request.match)
    if listed.path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{listed.path}: samples are read from {', '.join(SUFFIXES)}")
    return listed


class _Judge:
    """Says of each sample whether it stays."""

    def __init__(
        self,
        catalog: Catalog,
        snapshot: Snapshot,
        listed: SampleList,
        request: FilterRequest,
        survivors: Survivors,
        work: Path,
        context: Context,
    ) -> None:
        """Match the list, and choose other samples in place of those that are missing."""
        self._request, self._survivors = request, survivors
        self.parts = catalog.parts(snapshot)
        self._state = create_array(work / "state.npy", (snapshot.rows,), np.uint8)
        matched = read_list(catalog, snapshot, listed, work / "names", context.progress)
        kind, index = matched.kind, matched.index
        for part, places in matched.rows():
            self._state[part.span] = np.where(places >= 0, LISTED, OTHER)
        if not index.matched:
            raise no_match(catalog, snapshot, listed, kind, index)
        figures = {"entries": index.count, "names": index.distinct, "names_matched": index.matched}
        self._figures = {"matched_by": kind, **figures, "example": index.example}
        check_matched(request.strict, self._figures, str(listed.path))
        counts = self._count()
        self._figures["samples_matched"] = int(counts[LISTED])
        if request.refill is not None:
            missing = max(index.distinct - int(counts[LISTED]), 0)
            self._figures["filled"] = missing
            if missing:
                self._fill(catalog, snapshot, missing, context)
        if not self._kept():
            raise UserError(
                f"all {counts.sum():,} samples would be dropped: none of those that take part is left by {listed.path}"
            )

    def _count(self) -> npt.NDArray[np.int64]:
        """Return how many samples that take part have each state: int64 [3]."""
        counts = np.zeros(3, np.int64)
        for part in self.parts:
            counts += np.bincount(self._state[part.span][self._survivors.keeps(part.span)], minlength=3)
        return counts

    def _kept(self) -> int:
        counts = self._count()
        return int(counts[OTHER] if self._request.only is None else counts[LISTED] + counts[FILLED])

    def _fill(self, catalog: Catalog, snapshot: Snapshot, missing: int, context: Context) -> None:
        """Choose `missing` samples that the list does not name: the highest values, ties by row."""
        request = self._request
        column = None if request.refill == "random" else make_score(catalog, snapshot, request.score, context)
        key = stream_key(request.seed or 0, "refill")

        def values(part: Part) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
            """Return the samples of a part that may be chosen, and the opposite of their values."""
            drawn = hash_range(key, part.first_row, part.rows) >> np.uint64(40)  # which a float32 holds
            found = drawn.astype(np.float32) if column is None else column.read(part)
            free = self._survivors.keeps(part.span) & (self._state[part.span] != LISTED) & ~np.isnan(found)
            return part.first_row + np.flatnonzero(free), -found[free]

        free = sum(len(values(part)[0]) for part in self.parts)
        if missing > free:
            raise UserError(
                f"`refill` {request.refill}: {missing:,} samples are missing, and {free:,} others can take their place; leave it out"
            )
        bounds, below = order_statistics(lambda: (values(part)[1] for part in self.parts), [missing - 1])
        ties = missing - int(below[0])
        for part in self.parts:
            rows, found = values(part)
            equal = np.flatnonzero(found == bounds[0])[:ties]
            ties -= len(equal)
            self._state[rows[np.union1d(np.flatnonzero(found < bounds[0]), equal)]] = FILLED

    def tables(self) -> Iterator[pa.Table]:
        """Yield the dropped rows and the reasons, part by part: DROPPED_SCHEMA."""
        drops, reason = (OTHER, NOT_NAMED) if self._request.only is not None else (LISTED, NAMED)
        for part in self.parts:
            rows = np.flatnonzero((self._state[part.span] == drops) & self._survivors.keeps(part.span))
            yield drop_table({"row": part.first_row + rows, "reason": pa.repeat(reason, len(rows))})

    def summary(self) -> dict[str, Any]:
        """Return figures for people."""
        samples, kept = int(self._count().sum()), self._kept()
        reason = NOT_NAMED if self._request.only is not None else NAMED
        counts = {"pool": self._survivors.pool, "samples": samples, "kept": kept, "dropped": samples - kept}
        return {**counts, "reasons": {reason: samples - kept}, **self._figures}
