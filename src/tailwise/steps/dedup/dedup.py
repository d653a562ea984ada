"""Dedup: near-duplicates inside clusters leave the pool (SemDeDup, arXiv 2303.09540)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
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
from tailwise.catalog.drops import DROPPED_SCHEMA, DropList
from tailwise.context import Context
from tailwise.devices import find_device
from tailwise.errors import UserError
from tailwise.execution.base import KERNEL, Task, Worker
from tailwise.kernels.duplicates import duplicate_threshold, greedy, in_doubt
from tailwise.requests import DedupRequest, bytes_of
from tailwise.steps.dedup.comparison import Address, Comparison
from tailwise.steps.dedup.members import RESULT, Buckets, Judge, Members, regroup
from tailwise.steps.dedup.neighbours import make_neighbours
from tailwise.steps.drops import write_drops
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
            decisions = _Decisions(compared.address, neighbours.folder, duplicate_threshold(epsilon), device)
            _finish(compared, artifact, RULES[rule](compared, decisions, artifact.path(layout.WORK), memory))
    return Deduplication(request.name, DropList(catalog, request.name).summary)


@dataclass(frozen=True, eq=False)
class _Decisions:
    """Address of what is decided from the neighbours."""

    compared: Address
    neighbours: Path  # folder of the neighbours
    threshold: float  # greatest cosine of samples that are no duplicates
    device: str  # runs the matrix products
    # clusters with rows in doubt, decided row after row; None: the most similar earlier sample alone decides
    judged: Buckets | None = None

    def open(self, worker: Worker) -> tuple[Comparison, Neighbours]:
        """Return the comparison and the neighbours."""
        compared = self.compared.open(worker)
        return compared, worker.cached(self.neighbours, lambda: Neighbours(compared.catalog, self.neighbours))

    def nearest(
        self, part: Part, worker: Worker
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Of a part's rows: similarity to the most similar earlier one, whether that is judged, and whether it is certainly kept."""
        compared, neighbours = self.open(worker)
        other = np.maximum(neighbours.row[part.span], 0)
        judged = other >= compared.old_rows
        certain = neighbours.similarity[other] <= self.threshold
        if compared.base is not None:
            old = np.flatnonzero(~judged)
            certain[old] = ~compared.base.mask[other[old]]
        return neighbours.similarity[part.span], judged, certain

    def of(self, part: Part, worker: Worker) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Return the sample that each row of a part duplicates, int64 [n], −1 where it stays; and the similarity to it, float64 [n]."""
        _, neighbours = self.open(worker)
        similarity = np.array(neighbours.similarity[part.span])
        nearest = neighbours.row[part.span]
        row = np.where(similarity > self.threshold, nearest, -1)
        if self.judged is not None:
            _, judged, certain = self.nearest(part, worker)
            # A row identical to a dropped one has the same kept sample.
            duplicates_of_dropped = np.flatnonzero((similarity == 1.0) & judged & ~certain)
            other = nearest[duplicates_of_dropped]
            row[duplicates_of_dropped] = neighbours.row[other]
            similarity[duplicates_of_dropped] = neighbours.similarity[other]
            results = self.judged.results_of(part)
            at = results["row"] - part.first_row
            row[at], similarity[at] = results["other"], results["similarity"]
        return row, similarity


@dataclass(frozen=True, eq=False)
class _InDoubt(Task[Part, npt.NDArray[np.bool_]]):
    """Find the clusters with rows in doubt: bool [K]."""

    decisions: _Decisions
    clusters: int

    def run(self, item: Part, worker: Worker) -> npt.NDArray[np.bool_]:
        similarity, judged, certain = self.decisions.nearest(item, worker)
        compared, _ = self.decisions.open(worker)
        found = np.zeros(self.clusters, np.bool_)
        found[compared.labels(item)[in_doubt(similarity, self.decisions.threshold, judged, certain)]] = True
        return found


@dataclass(frozen=True, eq=False)
class _Greedy(Judge):
    """Decide the members of each cluster in keep-order."""

    decisions: _Decisions  # those that the neighbours alone make

    def judge(self, members: Members, threads: int, worker: Worker) -> npt.NDArray[Any]:  # noqa: ARG002
        _, neighbours = self.decisions.open(worker)
        by_row = np.argsort(members.rows)
        earlier = by_row[np.searchsorted(members.rows, neighbours.row[members.rows], sorter=by_row) % len(by_row)]
        old = len(members.kept_before)
        kept_row, similarity = greedy(
            members.x,
            neighbours.similarity[members.rows],
            earlier,
            self.decisions.threshold,
            kept_before=members.kept_before,
            device=self.decisions.device,
        )
        result = np.empty(len(members.rows) - old, RESULT)
        result["row"], result["similarity"] = members.rows[old:], similarity[old:]
        result["other"] = np.where(kept_row[old:] < 0, -1, members.rows[kept_row[old:]])
        return result


def _decide_greedily(compared: Comparison, decisions: _Decisions, folder: Path, max_memory_bytes: int) -> _Decisions:
    """Decide, by clusters, the rows in doubt and the rows that depend on them."""
    task = _InDoubt(decisions, len(compared.sizes))
    wanted = compared.context.executor.reduce(task, compared.parts, np.logical_or, KERNEL)
    judge, description = partial(_Greedy, decisions=decisions), "deciding what is in doubt"
    return replace(decisions, judged=regroup(compared, folder, wanted, judge, max_memory_bytes, description))


RULES: dict[str, Callable[[Comparison, _Decisions, Path, int], _Decisions]] = {
    "greedy": _decide_greedily,
    "any-earlier": lambda _, decisions, *__: decisions,
}


@dataclass(frozen=True, eq=False)
class _Drop(Task[Part, tuple[pa.Table, pa.Table]]):
    """Find the rows of a part that are dropped: those of the extended list, and new ones, DROPPED_SCHEMA each."""

    decisions: _Decisions

    def run(self, item: Part, worker: Worker) -> tuple[pa.Table, pa.Table]:
        compared, _ = self.decisions.open(worker)
        return _old_table(compared, item), _new_table(compared, item, *self.decisions.of(item, worker))


def _finish(compared: Comparison, artifact: Artifact, decisions: _Decisions) -> None:
    counts = {"identical": 0, "near": 0}
    frozen = 0

    def tables() -> Iterator[pa.Table]:
        nonlocal frozen
        for old, new in compared.context.map(_Drop(decisions), compared.parts, "writing", KERNEL):
            frozen += old.num_rows
            identical = int(pc.sum(pc.equal(new.column("reason"), IDENTICAL)).as_py() or 0)
            counts["identical"] += identical
            counts["near"] += new.num_rows - identical
            yield pa.concat_tables([old, new])

    dropped = write_drops(artifact, compared.parts, tables(), compared.context)
    shutil.rmtree(artifact.path(layout.WORK), ignore_errors=True)
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


def _new_table(
    compared: Comparison, part: Part, duplicated: npt.NDArray[np.int64], similarity: npt.NDArray[np.float64]
) -> pa.Table:
    gone = np.flatnonzero(duplicated >= 0)
    similarity = similarity[gone]
    reasons = np.where(similarity == 1, IDENTICAL, NEAR)
    columns = {
        "row": pa.array(part.first_row + gone, pa.int64()),
        "reason": pa.array(reasons.tolist(), pa.string()),
        "value": pa.nulls(len(gone), pa.float64()),
        "cluster": pa.array(compared.labels(part)[gone], pa.int32()),
        "kept_row": pa.array(duplicated[gone], pa.int64()),
        "similarity": pa.array(similarity.astype(np.float32), pa.float32()),
    }
    return pa.table(columns, schema=DROPPED_SCHEMA)
