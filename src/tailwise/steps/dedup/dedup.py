"""Dedup: near-duplicates inside clusters leave the pool (SemDeDup, arXiv 2303.09540)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tailwise.catalog import layout
from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.comparisons import Neighbours
from tailwise.catalog.drops import DROPPED_SCHEMA, DropList, write_drops
from tailwise.catalog.files import create_array
from tailwise.context import Context
from tailwise.devices import find_device
from tailwise.errors import UserError
from tailwise.execution.base import Worker
from tailwise.kernels.duplicates import duplicate_threshold, greedy, in_doubt
from tailwise.requests import DedupRequest, bytes_of
from tailwise.steps.dedup.comparison import Comparison
from tailwise.steps.dedup.members import RESULT, Judge, Members, regroup
from tailwise.steps.dedup.neighbours import make_neighbours
from tailwise.text import did_you_mean

IDENTICAL = "identical embedding"
NEAR = "near-duplicate"


@dataclass(frozen=True)
class Deduplication:
    """A finished dedup.

    Attributes:
        name: of its drop list.
        summary: the figures of its manifest.
    """

    name: str
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class _Decisions:
    """Decision about each sample, flat over the snapshot, mapped.

    Attributes:
        row: int64 [N], the sample it duplicates; −1: it stays, as far as this dedup is concerned.
        similarity: float64 [N], to it.
    """

    row: npt.NDArray[np.int64]
    similarity: npt.NDArray[np.float64]


def dedup(catalog: Catalog | str | Path, request: DedupRequest, context: Context | None = None) -> Deduplication:
    """Make a drop list of the near-duplicates in the newest snapshot.

    Args:
        catalog: or its path; with a clustering of the newest snapshot.
        request: what is asked for.
        context: runs the tasks and shows progress; by default, on this machine, without progress.

    Raises:
        UserError: something asked for is out of bounds or isn't there, or another list has this name.
    """
    catalog = Catalog.open(catalog)
    epsilon, rule = request.epsilon, request.rule
    device, memory = str(find_device(request.device)), bytes_of("max_memory", request.max_memory)
    if epsilon is None:
        raise UserError("`epsilon` is missing: `suggest` shows what each value would drop; SemDeDup uses 0.01 to 0.1")
    if not 0 <= epsilon <= 1:
        raise UserError(
            f"`epsilon` {epsilon}: must lie between 0 (identical embeddings) and 1; SemDeDup uses 0.01 to 0.1"
        )
    if rule not in RULES:
        raise UserError(f"unknown rule {rule!r}: {did_you_mean(rule, RULES)}")
    compared = Comparison(catalog, request, context or Context())
    config = {"epsilon": epsilon, "rule": rule, **compared.config}
    with Artifact(catalog.drops_folder(request.name), "dedup", config, compared.inputs) as artifact:
        if not artifact.done:
            neighbours = make_neighbours(compared, max_memory_bytes=memory, device=device)
            decide = _Decide(compared, artifact, neighbours, duplicate_threshold(epsilon), memory, device)
            decisions = decide.nearest_alone()
            RULES[rule](decide, decisions)
            _finish(compared, artifact, decisions)
    return Deduplication(request.name, DropList(catalog, request.name).summary)


class _Decide:
    """Decides from the neighbours what goes."""

    def __init__(
        self,
        compared: Comparison,
        artifact: Artifact,
        neighbours: Neighbours,
        threshold: float,
        max_memory_bytes: int,
        device: str,
    ) -> None:
        self.compared, self.artifact, self.neighbours, self.threshold = compared, artifact, neighbours, threshold
        self.max_memory_bytes, self.device = max_memory_bytes, device

    def nearest_alone(self) -> _Decisions:
        """Decide by the most similar earlier sample alone, kept or not."""
        folder, rows = self.artifact.path(layout.DECISIONS), self.compared.snapshot.rows
        decisions = _Decisions(
            create_array(folder / layout.NEAREST_ROW, (rows,), np.int64),
            create_array(folder / layout.NEAREST_SIMILARITY, (rows,), np.float64),
        )
        for part in self.compared.parts:
            similarity, row = self.neighbours.similarity[part.span], self.neighbours.row[part.span]
            decisions.row[part.span] = np.where(similarity > self.threshold, row, -1)
            decisions.similarity[part.span] = similarity
        return decisions

    def any_earlier(self, decisions: _Decisions) -> None:
        """Nothing is left to do: the neighbours decide."""

    def greedy(self, decisions: _Decisions) -> None:
        """Decide, by clusters, the rows in doubt and the rows that depend on them."""
        wanted = np.zeros(len(self.compared.sizes), np.bool_)
        for part in self.compared.parts:
            similarity, judged, certain = self._nearest(part)
            labels = self.compared.labels(part)
            wanted[labels[in_doubt(similarity, self.threshold, judged, certain)]] = True
            # A row identical to a dropped one has the same kept sample.
            duplicates_of_dropped = np.flatnonzero((similarity == 1.0) & judged & ~certain)
            other = self.neighbours.row[part.first_row + duplicates_of_dropped]
            decisions.row[part.first_row + duplicates_of_dropped] = self.neighbours.row[other]
            decisions.similarity[part.first_row + duplicates_of_dropped] = self.neighbours.similarity[other]
        results = regroup(
            self.compared,
            self.artifact.path(layout.WORK),
            wanted,
            lambda members: _Greedy(members, self.neighbours.folder, self.threshold, self.device),
            self.max_memory_bytes,
            "deciding what is in doubt",
        )
        for result in results:
            decisions.row[result["row"]], decisions.similarity[result["row"]] = result["other"], result["similarity"]

    def _nearest(self, part: Part) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Of a part's rows: similarity to the most similar earlier one, whether that is judged, and whether it is certainly kept."""
        similarity = np.asarray(self.neighbours.similarity[part.span])
        other = np.maximum(self.neighbours.row[part.span], 0)
        judged = other >= self.compared.old_rows
        certain = self.neighbours.similarity[other] <= self.threshold
        if self.compared.base is not None:
            old = np.flatnonzero(~judged)
            certain[old] = ~self.compared.base.mask[other[old]]
        return similarity, judged, certain


@dataclass(frozen=True, eq=False)
class _Greedy(Judge):
    """Decide the members of each cluster in keep-order.

    Attributes:
        neighbours: folder of the neighbours.
        threshold: greatest cosine of samples that are no duplicates.
        device: runs the matrix products.
    """

    neighbours: Path
    threshold: float
    device: str

    def judge(self, members: Members, threads: int, worker: Worker) -> npt.NDArray[Any]:  # noqa: ARG002
        neighbours = worker.cached(self.neighbours, lambda: Neighbours(self.neighbours))
        similarity = np.asarray(neighbours.similarity[members.rows])
        by_row = np.argsort(members.rows)
        earlier = by_row[np.searchsorted(members.rows, neighbours.row[members.rows], sorter=by_row) % len(by_row)]
        old = len(members.kept_before)
        kept_row, similarity = greedy(
            members.x, similarity, earlier, self.threshold, kept_before=members.kept_before, device=self.device
        )
        result = np.empty(len(members.rows) - old, RESULT)
        result["row"], result["similarity"] = members.rows[old:], similarity[old:]
        result["other"] = np.where(kept_row[old:] < 0, -1, members.rows[kept_row[old:]])
        return result


RULES: dict[str, Callable[[_Decide, _Decisions], None]] = {"greedy": _Decide.greedy, "any-earlier": _Decide.any_earlier}


def _finish(compared: Comparison, artifact: Artifact, decisions: _Decisions) -> None:
    counts = {"identical": 0, "near": 0}
    frozen = 0

    def tables() -> Iterator[pa.Table]:
        nonlocal frozen
        for part in compared.context.progress(compared.parts, "writing", len(compared.parts)):
            old = _old_table(compared, part)
            new = _new_table(compared, part, decisions)
            frozen += old.num_rows
            identical = int(pc.sum(pc.equal(new.column("reason"), IDENTICAL)).as_py() or 0)
            counts["identical"] += identical
            counts["near"] += new.num_rows - identical
            yield pa.concat_tables([old, new])

    dropped = write_drops(artifact, compared.snapshot.rows, tables())
    for scratch in (layout.WORK, layout.DECISIONS):
        shutil.rmtree(artifact.path(scratch), ignore_errors=True)
    artifact.finish(
        {
            "samples": compared.snapshot.rows,
            "judged": compared.new,
            "dropped": dropped,
            "dropped_before": frozen,
            "dropped_identical": counts["identical"],
            "dropped_near": counts["near"],
            "kept": compared.new + frozen - dropped,
            "clusters": int((compared.sizes.sum(axis=1) > 0).sum()),
            "largest_cluster": int(compared.sizes.sum(axis=1).max(initial=0)),
        }
    )


def _old_table(compared: Comparison, part: Part) -> pa.Table:
    """Return the rows of a part that the extended list dropped and that take part now."""
    if compared.base is None or part.first_row >= compared.old_rows:
        return DROPPED_SCHEMA.empty_table()
    table = compared.base.tables(part.span).cast(DROPPED_SCHEMA)
    present = compared.survivors.keeps(part.span)
    return table.filter(pa.array(present[table.column("row").to_numpy() - part.first_row]))


def _new_table(compared: Comparison, part: Part, decisions: _Decisions) -> pa.Table:
    gone = np.flatnonzero(decisions.row[part.span] >= 0)
    rows = part.first_row + gone
    similarity = decisions.similarity[rows]
    reasons = np.where(similarity == 1, IDENTICAL, NEAR)
    columns = {
        "row": pa.array(rows, pa.int64()),
        "reason": pa.array(reasons.tolist(), pa.string()),
        "value": pa.nulls(len(rows), pa.float64()),
        "cluster": pa.array(compared.labels(part)[gone], pa.int32()),
        "kept_row": pa.array(decisions.row[rows], pa.int64()),
        "similarity": pa.array(similarity.astype(np.float32), pa.float32()),
    }
    return pa.table(columns, schema=DROPPED_SCHEMA)
