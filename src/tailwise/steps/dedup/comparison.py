"""Comparison: what a dedup compares with what, and in which order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.catalog import layout
from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.columns import PlainColumn, RowColumn
from tailwise.catalog.comparisons import comparison_artifact
from tailwise.catalog.drops import DropList, Survivors
from tailwise.catalog.embeddings import check_column, column_dimension, embedding_inputs, present
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.execution.base import KERNEL, Fill, WithWorker, Worker
from tailwise.kernels.assign import Assigner
from tailwise.kernels.grid import row_chunks
from tailwise.kernels.keyed import hash_range, stream_key
from tailwise.kernels.nearest import DROPPED, KEPT
from tailwise.kernels.next_nearest import next_nearest
from tailwise.requests import DedupRequest, ScoreRequest
from tailwise.text import command_line, did_you_mean

NEW = np.uint8(2)  # age of a row that is to be judged; of others, the fate that was decided before
MOST_PROBES = 16
CHUNK_ROWS = 65_536
Values = npt.NDArray[np.float64]


class Comparison:
    """All settings of a dedup but ε and rule: samples that are compared, and their order.

    Attributes:
        catalog: of the samples.
        snapshot: whose rows; the newest by default.
        clustering: its name; samples are compared inside its clusters.
        probe: number of nearest clusters that each sample takes part in.
        column: of the embeddings that are compared.
        survivors: of the drop lists whose samples take no part.
        base: the drop list that is extended, if one is: what it decided stays.
        old_rows: how many rows it decided.
    """

    def __init__(self, catalog: Catalog, request: DedupRequest, context: Context, snapshot: int | None = None) -> None:
        """Open all that takes part.

        Raises:
            UserError: unknown order, no such clustering, list or score, or one that was made for another snapshot.
        """
        order, score, without, extends = request.order or "farthest", request.score, request.without, request.extends
        clustering, seed = request.clustering, request.seed
        if order not in ORDERS:
            raise UserError(f"`order` {order!r}: {did_you_mean(order, ORDERS)}")
        if (order == "score") != (score is not None):
            raise UserError("`order` score and `score` NAME need each other")
        if not 1 <= request.probe <= MOST_PROBES:
            raise UserError(f"`probe` {request.probe}: must lie between 1 (a sample's own cluster) and {MOST_PROBES}")
        self.catalog, self.request, self.context, self.probe = catalog, request, context, request.probe
        self.clustering, self.order_name, self.score, self.seed = clustering, order, score, seed
        self.snapshot = catalog.snapshot(snapshot)
        self.parts = catalog.parts(self.snapshot)
        self._clusters = self._open_clustering()
        self.column = check_column(catalog, str(request.column or self._clusters.column))
        catalog.require_embeddings(self.column, self.snapshot)
        self.survivors = Survivors(catalog, without, self.snapshot)
        self.base = None if extends is None else self._open_base(extends)
        self.old_rows = 0 if self.base is None else self.base.snapshot.rows
        self.config: dict[str, Any] = {
            "clustering": clustering,
            "probe": request.probe,
            "column": self.column,
            "order": order,
            "score": score,
            "seed": seed if order == "random" else None,
            "without": list(without),
            "extends": extends,
            "snapshot": self.snapshot.number,
        }

    @cached_property
    def inputs(self) -> dict[str, str]:
        """Name and hash of each input."""
        return {
            **embedding_inputs(self.catalog, self.column, self.snapshot),
            "clustering": self._clusters.id,
            **self.survivors.inputs,
            **({} if self.base is None else {"extends": self.base.id}),
            **({} if self.score is None else {"score": self._score_id()}),
        }

    @property
    def address(self) -> Address:
        """Address of the comparison, for tasks."""
        return Address(self.catalog.folder, self.request, self.snapshot.number, self)

    @property
    def dimension(self) -> int:
        """Dimension d of the embeddings."""
        return column_dimension(self.catalog, self.column) or 0

    def embeddings(self, part: Part) -> npt.NDArray[np.float16]:
        """Return the embeddings of a part, mapped: float16 [n, d]."""
        return self.catalog.embedding(self.column, part)

    @cached_property
    def x(self) -> RowColumn:
        """Embeddings of all rows: float16 [N, d]."""
        path = partial(self.catalog.embedding_path, self.column)
        return RowColumn(path, self.parts, np.float16, (self.dimension,))

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
                f"the {found.column} embeddings have changed since clustering {self.clustering!r} was made: cluster again, under "
                "another name"
            )
        return found

    def _open_base(self, name: str) -> DropList:
        base = DropList(self.catalog, name)
        if base.clustering is None:
            raise UserError(f"`extends` {name}: it is a list of {base.kind}, not of dedup inside clusters")
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
        for part in self.parts:
            state.update(self.order(part).tobytes())
        return state.hexdigest()

    # --- columns of a part ----------------------------------------------------------------------------------------------

    def labels(self, part: Part) -> npt.NDArray[np.int32]:
        """The cluster of each row of a part, negative for those that take no part: int32 [n]."""
        labels = np.array(self._clusters.labels.read(part))
        labels[~self.survivors.keeps(part.span)] = -1
        if self.column != self._clusters.column:
            labels[~present(self.embeddings(part))] = -1
        return labels

    def places(self, part: Part) -> npt.NDArray[np.int32]:
        """Return the clusters that each row of a part takes part in, its own first: int32 [n, probe], negative where there are no more."""
        labels = self.labels(part)[:, None]
        if self.probe == 1:
            return labels
        return np.concatenate([labels, np.where(labels >= 0, self._next_clusters.read(part), -1)], axis=1)

    @property
    def _next_clusters(self) -> PlainColumn:
        return PlainColumn(comparison_artifact(self.catalog, self.config, self.inputs).folder, layout.NEXT_CLUSTERS)

    def find_places(self) -> None:
        """Find the clusters of all rows beside their own ones; they are kept with the comparison."""
        if self.probe > 1:
            task = Fill(self._next_clusters, self.address.next_clusters)
            self.context.run(task, self.parts, "finding the next nearest clusters", KERNEL)

    def find_next(self, part: Part) -> npt.NDArray[np.int32]:
        """Return the next nearest clusters of the rows of a part: int32 [n, probe − 1], negative for rows without a cluster."""
        labels, assigner = self._clusters.labels.read(part), Assigner(self._clusters.centroids, device="cpu")
        found = np.empty((part.rows, self.probe - 1), np.int32)
        block = self.catalog.embedding(str(self._clusters.column), part)
        for start, chunk in row_chunks([block], CHUNK_ROWS):
            some = slice(start, start + len(chunk))
            found[some] = next_nearest(chunk, np.asarray(labels[some]), assigner, self.probe - 1)
        return found

    def ages(self, part: Part) -> npt.NDArray[np.uint8]:
        """Return the age of each row of a part: KEPT or DROPPED by the extended list, or NEW, uint8 [n]."""
        ages = np.full(part.rows, NEW)
        if self.base is not None and part.first_row < self.old_rows:
            ages[:] = np.where(self.base.mask[part.span], DROPPED, KEPT)
        return ages

    def order(self, part: Part) -> Values:
        """Return the keep-order of the rows of a part: rows come in ascending order of these, float64 [n]; ties by row, NaN last."""
        return ORDERS[self.order_name](self, part)

    def similarity(self, part: Part) -> Values:
        """Return the similarity of each row to its centroid."""
        return self._clusters.similarities.read(part).astype(np.float64)

    @cached_property
    def scores(self) -> list[npt.NDArray[np.float32]]:
        """The score of `order` score, part by part, mapped."""
        from tailwise.steps.scoring.scores import score_parts  # noqa: PLC0415  (only this order needs them)

        request = ScoreRequest(str(self.score))
        return list(score_parts(self.catalog, self.snapshot, request, self.context))

    @cached_property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Members that take part, new and old: int64 [clusters, 2]."""
        return self._count(own=True)

    @cached_property
    def compared_sizes(self) -> npt.NDArray[np.int64]:
        """Samples that are compared in each cluster, new and old: int64 [clusters, 2]; after `find_places`."""
        return self.sizes if self.probe == 1 else self._count(own=False)

    def _count(self, own: bool) -> npt.NDArray[np.int64]:
        task = WithWorker(partial(self.address.sizes, self._clusters.table.num_rows, own))
        return self.context.executor.reduce(task, self.parts, np.add, KERNEL)

    @property
    def new(self) -> int:
        """How many samples are judged."""
        return int(self.sizes[:, 0].sum())


@dataclass(frozen=True, eq=False)
class Address:
    """Address of a comparison."""

    catalog: Path
    request: DedupRequest
    snapshot: int
    opened: Comparison | None = None  # in the driver's process

    def __reduce__(self) -> tuple[type[Address], tuple[Path, DedupRequest, int]]:
        """Pickle the address alone: another process opens the comparison again."""
        return Address, (self.catalog, self.request, self.snapshot)

    def open(self, worker: Worker) -> Comparison:
        """Return the comparison."""
        make = lambda: Comparison(Catalog.open(self.catalog), self.request, Context(), self.snapshot)  # noqa: E731
        return self.opened or worker.cached(repr((self.catalog, self.request, self.snapshot)), make)

    def sizes(self, clusters: int, own: bool, part: Part, worker: Worker) -> npt.NDArray[np.int64]:
        """Count a part's members of each cluster that take part, new and old: int64 [clusters, 2].

        `own`: a row counts in its own cluster alone.
        """
        compared = self.open(worker)
        places = compared.labels(part)[:, None] if own else compared.places(part)
        new = compared.ages(part) == NEW
        columns = (places[chosen].ravel() for chosen in (new, ~new))
        counts = [np.bincount(column[column >= 0], minlength=clusters) for column in columns]
        return np.stack(counts, axis=1)

    def next_clusters(self, part: Part, worker: Worker) -> npt.NDArray[np.int32]:
        """Return the next nearest clusters of the rows of a part; see `Comparison.find_next`."""
        return self.open(worker).find_next(part)


def _nearest(comparison: Comparison, part: Part) -> Values:
    return -comparison.similarity(part)


def _random(comparison: Comparison, part: Part) -> Values:
    key = stream_key(comparison.seed, "keep-order")
    order: Values = (hash_range(key, part.first_row, part.rows) >> np.uint64(11)).astype(np.float64)
    return order


def _score(comparison: Comparison, part: Part) -> Values:
    return -comparison.scores[part.number].astype(np.float64)


ORDERS: dict[str, Callable[[Comparison, Part], Values]] = {
    "farthest": Comparison.similarity,
    "nearest": _nearest,
    "random": _random,
    "score": _score,
}
