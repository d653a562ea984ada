"""Dedup: near-duplicates that share a cluster leave the pool (SemDeDup, arXiv 2303.09540)."""

from __future__ import annotations

import operator
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
from tailwise.catalog.columns import PlainColumn, RowColumn, RowsByPart
from tailwise.catalog.comparisons import Neighbours
from tailwise.catalog.drops import DROPPED_SCHEMA, DropList
from tailwise.context import Context
from tailwise.devices import find_device
from tailwise.errors import UserError
from tailwise.execution.base import KERNEL, Fill, WithWorker, Worker
from tailwise.kernels.duplicates import duplicate_threshold, first_status, look_back
from tailwise.kernels.nearest import DROPPED, KEPT, OPEN
from tailwise.requests import DedupRequest, bytes_of
from tailwise.steps.dedup.against import decontaminate
from tailwise.steps.dedup.comparison import NEW, Address, Comparison
from tailwise.steps.dedup.exact import drop_identical
from tailwise.steps.dedup.members import RESULT, Buckets, Judge, Members, make_neighbours, most_similar, regroup
from tailwise.steps.dedup.suggest import find_epsilon
from tailwise.steps.drops import drop_table, write_drops
from tailwise.storage.local import remove_folder
from tailwise.text import did_you_mean

IDENTICAL = "identical embedding"
NEAR = "near-duplicate"
# Fates of rows that were open, and are dropped: for the most similar kept sample, or for one, while the fate of another was open.
LATE, UNSURE = np.uint8(3), np.uint8(4)


@dataclass(frozen=True)
class Deduplication:
    """A finished dedup.

    Attributes:
        name: of its drop list.
        summary: the figures of its manifest.
        table: file that lists what it drops.
    """

    name: str
    summary: Mapping[str, Any]
    table: Path


def dedup(catalog: Catalog | str | Path, request: DedupRequest, context: Context | None = None) -> Deduplication:
    """Make a drop list of the near-duplicates in the newest snapshot; or of identical images, or of images of evaluation sets.

    Args:
        catalog: or its path; with a clustering of the newest snapshot, unless the request has `exact` or `against`.
        request: what is asked for.
        context: runs the tasks and shows progress; by default, on this machine, without progress.

    Raises:
        UserError: something asked for is out of bounds or isn't there, or another list has this name.
    """
    catalog, context = Catalog.open(catalog), context or Context()
    if request.against or request.exact is not None:
        (decontaminate if request.against else drop_identical)(catalog, request, context)
    else:
        _drop_near(catalog, request, context)
    made = DropList(catalog, request.list_name)
    return Deduplication(made.name, made.summary, made.folder / layout.DROPPED_TABLE)


def _drop_near(catalog: Catalog, request: DedupRequest, context: Context) -> None:
    epsilon, share, rule = request.epsilon, request.target_share, request.rule
    device, memory = str(find_device(request.device)), bytes_of("max_memory", request.max_memory)
    if epsilon is None and share is None:
        raise UserError("`epsilon` is missing: `suggest` shows what each value would drop; SemDeDup uses 0.01 to 0.1")
    if share is not None:
        _check_share(request, share)
    if epsilon is not None and not 0 <= epsilon <= 1:
        raise UserError(
            f"`epsilon` {epsilon}: must lie between 0 (identical embeddings) and 1; SemDeDup uses 0.01 to 0.1"
        )
    if rule not in RULES:
        raise UserError(f"unknown rule {rule!r}: {did_you_mean(rule, RULES)}")
    compared = Comparison(catalog, request, context)
    asked = {"epsilon": epsilon} if share is None else {"target_share": share}
    config = {**asked, "rule": rule, **compared.config}
    with Artifact(catalog.drops_folder(request.list_name), "dedup", config, compared.inputs) as artifact:
        if not artifact.done:
            context.executor.forget()  # what workers keep of an earlier run of this name
            neighbours = make_neighbours(compared, max_memory_bytes=memory, device=device)
            work = artifact.path(layout.WORK)

            def decide(epsilon: float, folder: Path) -> _Decisions:
                threshold = duplicate_threshold(epsilon)
                return RULES[rule](
                    compared, _Decisions(compared.address, neighbours.folder, folder, threshold, device), memory
                )

            def dropped(epsilon: float) -> int:
                trial = work / f"trial-{epsilon}"
                count = WithWorker(decide(epsilon, trial).count)
                found = context.executor.reduce(count, compared.parts, operator.add, KERNEL)
                remove_folder(trial)
                return found

            found = {}
            if epsilon is None:
                epsilon = find_epsilon(compared, neighbours, share or 0, dropped)
                found = {"epsilon": epsilon, "pool": compared.survivors.pool}
            _finish(compared, artifact, decide(epsilon, work), found)


def _check_share(request: DedupRequest, share: float) -> None:
    if request.epsilon is not None:
        raise UserError("`epsilon` and `target_share` both say how much goes: give one")
    if request.extends is not None:
        raise UserError("`target_share` does nothing with `extends`: give the `epsilon` of the earlier list")
    if not 0 < share <= 1:
        raise UserError(f"`target_share` {share}: must be above 0 and at most 1")


@dataclass(frozen=True, eq=False)
class _Decisions:
    compared: Address
    neighbours: Path  # folder of the neighbours
    folder: Path  # of the fates of rows, while they are decided
    threshold: float  # greatest cosine of samples that are no duplicates
    device: str  # runs the matrix products
    # number of rounds that decided open rows; None: the most similar earlier sample alone decides
    rounds: int | None = None
    found: tuple[Buckets, ...] = ()  # of all rounds: the samples for which open rows went

    def open(self, worker: Worker) -> tuple[Comparison, Neighbours]:
        compared = self.compared.open(worker)
        return compared, worker.cached(self.neighbours, lambda: Neighbours(compared.catalog, self.neighbours))

    def fate(self, number: int) -> PlainColumn:
        """Return the column of fates before a round: uint8, KEPT, DROPPED, OPEN, LATE or UNSURE."""
        return PlainColumn(self.folder, f"{layout.FATE}{number}")

    def fates(self, number: int, worker: Worker) -> RowColumn:
        """Return the fates before a round, of all rows."""
        parts = self.compared.open(worker).parts
        return worker.cached((self.folder, number), lambda: RowColumn(self.fate(number).path, parts, np.uint8))

    def first(self, part: Part, worker: Worker) -> npt.NDArray[np.uint8]:
        """Return the fates of a part's rows that the neighbours alone decide."""
        compared, neighbours = self.open(worker)
        other = np.maximum(neighbours.row[part.span], 0)
        judged = other >= compared.old_rows
        certain = neighbours.similarity[other] <= self.threshold
        if compared.base is not None:
            old = np.flatnonzero(~judged)
            certain[old] = ~compared.base.mask[other[old]]
        ages = compared.ages(part)
        return np.where(
            ages == NEW, first_status(neighbours.similarity[part.span], self.threshold, judged, certain), ages
        )

    def clusters(self, number: int, fate: np.uint8, count: int, part: Part, worker: Worker) -> npt.NDArray[np.bool_]:
        """Return which clusters, of K = `count`, a part's rows of some fate before a round take part in: bool [K]."""
        places = self.open(worker)[0].places(part)[self.fate(number).read(part) == fate]
        found = np.zeros(count, np.bool_)
        found[places[places >= 0]] = True
        return found

    def settled(self, number: int, found: Buckets, part: Part, worker: Worker) -> npt.NDArray[np.uint8]:  # noqa: ARG002
        """Return the fates of a part's rows after a round, which found these buckets."""
        fates = np.array(self.fate(number).read(part))
        results = found.results_of(part)
        at, dropped, waits = results["row"] - part.first_row, results["other"] >= 0, results["waits"]
        fates[at] = KEPT
        fates[at[waits]] = OPEN
        gone = at[dropped]
        fates[gone] = np.where(fates[gone] == OPEN, UNSURE, LATE)
        return fates

    def of(self, part: Part, worker: Worker) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Return the sample that each row of a part duplicates, int64 [n], −1 where it stays; and the similarity to it, float64 [n]."""
        compared, neighbours = self.open(worker)
        row, similarity = np.array(neighbours.row[part.span]), np.array(neighbours.similarity[part.span])
        row[similarity <= self.threshold] = -1
        if self.rounds is None:
            return row, similarity
        mine = part.first_row + np.flatnonzero(row >= 0)
        row[mine - part.first_row], similarity[mine - part.first_row] = self._decided(mine, worker)
        # A row that is identical to an earlier one shares its fate: the sample for which that one goes.
        copies = np.flatnonzero((similarity == 1.0) & (row >= compared.old_rows))
        others, found = self._decided(row[copies], worker)
        gone = others >= 0
        row[copies[gone]], similarity[copies[gone]] = others[gone], found[gone]
        return row, similarity

    def count(self, part: Part, worker: Worker) -> int:
        return int((self.of(part, worker)[0] >= 0).sum())

    def tables(self, part: Part, worker: Worker) -> tuple[pa.Table, pa.Table]:
        """Return the rows of a part that are dropped: those of the extended list, and new ones, DROPPED_SCHEMA each."""
        compared, _ = self.open(worker)
        return _old_table(compared, part), _new_table(compared, part, *self.of(part, worker))

    def _decided(
        self, rows: npt.NDArray[np.int64], worker: Worker
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Return the same as `of` for some rows, where identical rows are not looked at."""
        compared, neighbours = self.open(worker)
        others, similarity = neighbours.row[rows], neighbours.similarity[rows]
        fates = self.fates(self.rounds or 0, worker)[rows]
        others[fates == KEPT] = -1
        late = np.flatnonzero((fates == LATE) | (fates == UNSURE))
        for part, places in RowsByPart(compared.parts).split(rows[late]):
            results = most_similar(np.concatenate([buckets.results_of(part) for buckets in self.found]))
            at = np.searchsorted(results["row"], rows[late[places]])
            others[late[places]], similarity[late[places]] = results["other"][at], results["similarity"][at]
        return others, similarity


@dataclass(frozen=True, eq=False)
class _LookBack(Judge):
    """Look for earlier duplicates of rows of some fate. `other` of a result is one that is kept, −1 where there is none."""

    decisions: _Decisions
    number: int  # of the round
    fate: np.uint8

    def judge(self, members: Members, threads: int, worker: Worker) -> npt.NDArray[Any]:  # noqa: ARG002
        fates = self.decisions.fates(self.number, worker)[members.rows]
        asked = np.flatnonzero(fates == self.fate)
        status = np.where(fates > OPEN, DROPPED, fates)
        alone = self.decisions.compared.open(worker).probe == 1
        waits, kept, similarity = look_back(
            members.x, asked, status, self.decisions.threshold, alone=alone, device=self.decisions.device
        )
        result = np.empty(len(asked), RESULT)
        result["row"], result["similarity"], result["waits"] = members.rows[asked], similarity, waits
        result["other"] = np.where(kept >= 0, members.rows[kept], -1)
        return result


def _decide_greedily(compared: Comparison, decisions: _Decisions, max_memory_bytes: int) -> _Decisions:
    """Decide the rows that are open, in rounds.

    A row takes part in several clusters. In a round each of these looks whether it has an earlier duplicate there that is kept (then it
    goes) or open (then it waits); if none of them has either, the row is kept. The first open row is decided in each round, and mostly
    nearly all are. In the end the most similar kept sample is found for those that went while another was open.
    """
    context, clusters = compared.context, len(compared.sizes)
    context.run(Fill(decisions.fate(0), decisions.first), compared.parts, "deciding by the most similar", KERNEL)

    def look(number: int, fate: np.uint8, description: str) -> Buckets | None:
        places = partial(decisions.clusters, number, fate, clusters)
        wanted = context.executor.reduce(WithWorker(places), compared.parts, np.logical_or, KERNEL)
        folder = decisions.folder / f"{fate}-{number}"
        judge = partial(_LookBack, decisions=decisions, number=number, fate=fate)
        return regroup(compared, folder, wanted, judge, max_memory_bytes, description) if wanted.any() else None

    found, number = list[Buckets](), 0
    while (buckets := look(number, OPEN, f"deciding what is in doubt, round {number + 1}")) is not None:
        settle = Fill(decisions.fate(number + 1), partial(decisions.settled, number, buckets))
        context.run(settle, compared.parts, "settling", KERNEL)
        found.append(buckets)
        number += 1
    last = look(number, UNSURE, "finding what they duplicate")
    return replace(decisions, rounds=number, found=(*found, *([] if last is None else [last])))


RULES: dict[str, Callable[[Comparison, _Decisions, int], _Decisions]] = {
    "greedy": _decide_greedily,
    "any-earlier": lambda _, decisions, __: decisions,
}


def _finish(compared: Comparison, artifact: Artifact, decisions: _Decisions, found: Mapping[str, float]) -> None:
    counts = {"identical": 0, "near": 0}
    frozen = 0

    def tables() -> Iterator[pa.Table]:
        nonlocal frozen
        for old, new in compared.context.map(WithWorker(decisions.tables), compared.parts, "writing", KERNEL):
            frozen += old.num_rows
            identical = int(pc.sum(pc.equal(new.column("reason"), IDENTICAL)).as_py() or 0)
            counts["identical"] += identical
            counts["near"] += new.num_rows - identical
            yield pa.concat_tables([old, new])

    dropped = write_drops(artifact, compared.parts, tables(), compared.context)
    remove_folder(artifact.path(layout.WORK))
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
            **found,
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
        "cluster": pa.array(compared.labels(part)[gone], pa.int32()),
        "kept_row": pa.array(duplicated[gone], pa.int64()),
        "similarity": pa.array(similarity.astype(np.float32), pa.float32()),
    }
    return drop_table(columns)
