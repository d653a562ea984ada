"""Neighbours: the most similar earlier member of each sample's cluster. One regroup, from which every ε of dedup is read."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.comparisons import Neighbours, comparison_artifact
from tailwise.catalog.drops import DropList, Survivors
from tailwise.catalog.embeddings import embedding_inputs
from tailwise.catalog.layout import SIMILARITY, WORK
from tailwise.errors import UserError
from tailwise.kernels.keyed import hash_range, stream_key
from tailwise.kernels.similarity import NOTHING_EARLIER, most_similar_earlier
from tailwise.progress import Track, silent
from tailwise.requests import DedupRequest, ScoreRequest
from tailwise.steps.dedup.members import DROPPED, KEPT, NEW, RESULT, Columns, Members, plan_layout, regroup_members
from tailwise.text import command_line, did_you_mean

Values = npt.NDArray[np.float64]


class Comparison:
    """What is compared with what, and in which order: everything about a dedup but ε and rule.

    Attributes:
        catalog: whose newest snapshot is meant.
        clustering: its name; samples are compared inside its clusters.
        column: of embeddings, the clustering's.
        survivors: of the drop lists whose samples take no part.
        base: the drop list that is extended, if one is: what it decided stays.
        old_rows: how many rows it decided.
    """

    def __init__(self, catalog: Catalog, request: DedupRequest, track: Track = silent) -> None:
        """Open all that takes part.

        Raises:
            UserError: unknown order, no such clustering, list or score, or one that was made for another snapshot.
        """
        order, score, without, extends = request.order, request.score, request.without, request.extends
        clustering, seed = request.clustering, request.seed
        if order not in ORDERS:
            raise UserError(f"`order` {order!r}: {did_you_mean(order, ORDERS)}")
        if (order == "score") != (score is not None):
            raise UserError("`order` score and `score` NAME need each other")
        self.catalog, self.clustering, self.order, self.score, self.seed = catalog, clustering, order, score, seed
        self.snapshot = catalog.snapshot()
        self.parts, self.track = catalog.parts(self.snapshot), track
        self._clusters = self._open_clustering()
        self.column = str(self._clusters.column)
        self.blocks = catalog.embedding_parts(self.column, self.snapshot)
        self.survivors = Survivors(catalog, without, self.snapshot)
        self.base = None if extends is None else self._open_base(extends)
        self.old_rows = 0 if self.base is None else self.base.snapshot.rows
        self.config: dict[str, Any] = {
            "clustering": clustering,
            "column": self.column,
            "order": order,
            "score": score,
            "seed": seed if order == "random" else None,
            "without": list(without),
            "extends": extends,
            "snapshot": self.snapshot.number,
        }
        self.inputs = {
            **embedding_inputs(catalog, self.column, self.snapshot),
            "clustering": self._clusters.id,
            **self.survivors.inputs,
            **({} if self.base is None else {"extends": self.base.id}),
            **({} if score is None else {"score": self._score_id()}),
        }

    def _open_clustering(self) -> Clustering:
        remedy = f"make it with {command_line('cluster', self.catalog.folder, k='…', name=self.clustering)}"
        found = Clustering.open(self.catalog, self.clustering, remedy)
        if found.snapshot.number != self.snapshot.number:
            assign = command_line("cluster", self.catalog.folder, extends=self.clustering, name="…")
            raise UserError(
                f"clustering {self.clustering!r} was made for snapshot {found.snapshot.number}, and the newest is {self.snapshot.number}: "
                f"{assign} assigns the new samples"
            )
        if found.column is None:
            raise UserError(
                f"{self.clustering!r} groups samples by something else than embeddings: dedup needs a clustering made by "
                "`tailwise cluster`"
            )
        if found.embeddings_changed:
            raise UserError(
                f"the {found.column} embeddings have changed since clustering {self.clustering!r} was made: cluster anew, under "
                "another name"
            )
        return found

    def _open_base(self, name: str) -> DropList:
        base = DropList(self.catalog, name)
        if base.kind != "dedup":
            raise UserError(f"`extends` {name}: it is a list of {base.kind}, not of dedup")
        if base.snapshot.number == self.snapshot.number:
            raise UserError(f"`extends` {name}: it was made for the newest snapshot already; there are no new samples")
        before = Survivors(self.catalog, base.without, base.snapshot)
        back = 0
        for part in self.parts[: base.snapshot.parts]:
            clustered = self._clusters.labels.read(part) >= 0
            back += int((~before.keeps(part.span) & self.survivors.keeps(part.span) & clustered).sum())
        if back:
            raise UserError(
                f"{back:,} samples that {name!r} was made without ({', '.join(base.without)}) take part now: make those lists for "
                "this snapshot too, and name them with `without`"
            )
        return base

    def _score_id(self) -> str:
        state = hashlib.blake2b(digest_size=16)
        for values in self.orders():
            state.update(values.tobytes())
        return state.hexdigest()

    # --- columns, part by part ------------------------------------------------------------------------------------------

    def labels(self, part: Part) -> npt.NDArray[np.int32]:
        """The cluster of each row of a part, negative for those that take no part: int32 [n]."""
        labels = np.array(self._clusters.labels.read(part))
        labels[~self.survivors.keeps(part.span)] = -1
        return labels

    def ages(self, part: Part) -> npt.NDArray[np.uint8]:
        """Whether each row of a part is KEPT or DROPPED by the extended list, or NEW: uint8 [n]."""
        ages = np.full(part.rows, NEW)
        if self.base is not None and part.first_row < self.old_rows:
            ages[:] = np.where(self.base.mask[part.span], DROPPED, KEPT)
        return ages

    def orders(self) -> Iterator[Values]:
        """The keep-order: rows come in ascending order of these, float64 [n] part by part; ties by row, NaN last."""
        return ORDERS[self.order](self)

    def similarities(self) -> Iterator[Values]:
        """Each row's similarity to its centroid."""
        for values in self._clusters.parts(SIMILARITY):
            yield values.astype(np.float64)

    @cached_property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Members that take part, new and old: int64 [clusters, 2]."""
        count = max((int(self.labels(part).max(initial=-1)) for part in self.parts), default=-1) + 1
        sizes = np.zeros((count, 2), np.int64)
        for part in self.parts:
            labels, new = self.labels(part), self.ages(part) == NEW
            for column, chosen in enumerate((new, ~new)):
                sizes[:, column] += np.bincount(labels[chosen & (labels >= 0)], minlength=count)
        return sizes

    @property
    def new(self) -> int:
        """How many samples are judged."""
        return int(self.sizes[:, 0].sum())

    def columns(self, wanted: npt.NDArray[np.bool_]) -> Iterator[Columns]:
        """What `regroup_members` reads, for some clusters: bool [clusters]."""
        for part, block, order in zip(self.parts, self.blocks, self.orders(), strict=True):
            labels = self.labels(part)
            labels[(labels >= 0) & ~wanted[labels]] = -1
            yield Columns(part.first_row, labels, self.ages(part), order, block)

    def regroup(
        self,
        artifact: Artifact,
        wanted: npt.NDArray[np.bool_],
        judge: Callable[[Members, int], npt.NDArray[Any]],
        max_memory_bytes: int,
        description: str,
    ) -> Iterator[npt.NDArray[Any]]:
        """Applies `judge` to some clusters, bool [clusters]; intermediate files lie in the artifact's folder WORK."""
        sizes = np.where(wanted, self.sizes.sum(axis=1), 0)
        layout = plan_layout(sizes, self.snapshot.rows, self.blocks[0].shape[1], max_memory_bytes)
        folder = artifact.path(WORK)
        return regroup_members(
            folder, sizes, lambda: self.columns(wanted), layout, self.blocks, judge, self.track, description
        )


def _nearest(comparison: Comparison) -> Iterator[Values]:
    return (-values for values in comparison.similarities())


def _random(comparison: Comparison) -> Iterator[Values]:
    key = stream_key(comparison.seed, "keep-order")
    for part in comparison.parts:
        yield (hash_range(key, part.first_row, part.rows) >> np.uint64(11)).astype(np.float64)


def _score(comparison: Comparison) -> Iterator[Values]:
    from tailwise.steps.scoring.scores import score_parts  # noqa: PLC0415  (only this order needs them)

    request = ScoreRequest(str(comparison.score))
    for values in score_parts(comparison.catalog, comparison.snapshot, request, comparison.track):
        yield -values.astype(np.float64)


ORDERS: dict[str, Callable[[Comparison], Iterator[Values]]] = {
    "farthest": Comparison.similarities,
    "nearest": _nearest,
    "random": _random,
    "score": _score,
}


def make_neighbours(comparison: Comparison, *, max_memory_bytes: int, device: str = "auto") -> Neighbours:
    """Finds the neighbours of all samples, or opens them if they are there.

    Args:
        comparison: what is compared.
        max_memory_bytes: refuse what needs more.
        device: of the matrix products; the result doesn't depend on it.

    Raises:
        UserError: the largest cluster needs more memory.
    """
    with comparison_artifact(comparison.catalog, comparison.config, comparison.inputs) as artifact:
        if not artifact.done:
            _compare(comparison, artifact, max_memory_bytes, device)
            shutil.rmtree(artifact.path(WORK), ignore_errors=True)
            artifact.finish({"samples": comparison.new})
        return Neighbours(artifact.folder)


def _compare(comparison: Comparison, artifact: Artifact, max_memory_bytes: int, device: str) -> None:
    if Neighbours.are_written(artifact.folder):  # an interruption came after that
        return

    def judge(members: Members, threads: int) -> npt.NDArray[Any]:
        old = len(members.kept_before)
        similarity, earlier = most_similar_earlier(members.x, judged_from=old, device=device, threads=threads)
        found = np.flatnonzero(earlier >= 0)
        result = np.empty(len(found), RESULT)
        result["row"], result["other"] = members.rows[found], members.rows[earlier[found]]
        result["similarity"] = similarity[found]
        return result

    new, old = comparison.sizes.T
    wanted = (new > 0) & (new + old > 1)
    with Neighbours.writing(artifact.folder, comparison.snapshot.rows) as (similarity, other):
        for part in comparison.parts:
            similarity[part.span], other[part.span] = NOTHING_EARLIER, -1
        for result in comparison.regroup(artifact, wanted, judge, max_memory_bytes, "comparing inside clusters"):
            similarity[result["row"]], other[result["row"]] = result["similarity"], result["other"]
        del similarity, other
