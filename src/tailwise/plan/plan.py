"""The plan: which copies of which rows an epoch holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from tailwise.catalog.artifacts import read_manifest
from tailwise.catalog.catalog import Catalog, Snapshot
from tailwise.catalog.files import read_array
from tailwise.errors import UserError
from tailwise.plan.bernoulli import bernoulli_copies
from tailwise.plan.quotas import UNIT_BITS, UNITS
from tailwise.plan.stream import Stream

CHUNK_ROWS = 1 << 20
Rows = slice | npt.NDArray[np.int64]


class Plan:
    """A plan of a catalog. Small, immutable, and opened without reading it: its arrays are memory-mapped.

    Attributes:
        name: of the plan.
        config: all that decides it.
        snapshot: the rows it speaks of are those of this snapshot.
    """

    def __init__(self, catalog: Catalog, name: str) -> None:
        """Opens a finished plan.

        Raises:
            UserError: there is none of this name, or the catalog's snapshot isn't the one the plan was made for.
        """
        self.catalog, self.name = catalog, name
        self.folder = catalog.plan_folder(name)
        remedy = f"make it with `tailwise plan {catalog.folder} {name} --method …`"
        self.manifest = read_manifest(self.folder, "plan", remedy)
        self.config: Mapping[str, Any] = self.manifest["identity"]["config"]
        self.snapshot: Snapshot = catalog.snapshot(self.config["snapshot"])
        if self.snapshot.id != self.manifest["identity"]["inputs"]["snapshot"]:
            raise UserError(f"plan {name!r} was made for another snapshot {self.snapshot.number}: make it anew")

    @property
    def rows(self) -> int:
        """Rows of the snapshot; those that the plan never draws included."""
        return self.snapshot.rows

    @property
    def dynamic(self) -> bool:
        """Whether each epoch is drawn anew; else every epoch is epoch 0."""
        return bool(self.config["dynamic"])

    @property
    def draw_name(self) -> str:
        """How it is drawn: a name of DRAWS."""
        return str(self.config["draw"])

    @property
    def by_rate(self) -> bool:
        """Whether it carries one rate per row, in place of clusters and quotas."""
        return bool(self.config["method"] == "rates")

    @cached_property
    def rates(self) -> npt.NDArray[np.float32]:
        """Expected copies of each row per epoch, float32 [N]; only of a plan by rate."""
        return read_array(self.folder / "rate.npy")

    @cached_property
    def groups(self) -> npt.NDArray[np.int32]:
        """Cluster of each row, int32 [N]; −1 for rows that are never drawn."""
        return read_array(self.folder / "group.npy")

    @cached_property
    def ranks(self) -> npt.NDArray[np.uint32]:
        """In-cluster rank of each row, uint32 [N]: of appearance, or in the order of the pick."""
        return read_array(self.folder / "rank.npy")

    @cached_property
    def shard_offsets(self) -> npt.NDArray[np.int64]:
        """First row of each shard, and the number of rows: int64 [shards + 1]."""
        return read_array(self.folder / "shard_offsets.npy")

    @cached_property
    def sizes(self) -> npt.NDArray[np.int64]:
        """n, members of each cluster: int64 [K]."""
        return self._group_table("size")

    @cached_property
    def quotas(self) -> npt.NDArray[np.int64]:
        """q, copies of each cluster per epoch, in units of 2⁻³⁰ samples: int64 [K]."""
        return self._group_table("quota_units")

    def _group_table(self, column: str) -> npt.NDArray[np.int64]:
        table = pq.read_table(self.folder / "groups.parquet", columns=[column])
        values: npt.NDArray[np.int64] = table.column(0).to_numpy()
        return values

    @cached_property
    def stream(self) -> Stream:
        """The streams of a plan that is drawn by stream."""
        return Stream(self.sizes, lambda _: self.quotas, self.config["seed"])

    def drawn_epoch(self, epoch: int) -> int:
        """The epoch whose draw is used: `epoch` itself, or 0 for a static plan.

        Raises:
            UserError: the epoch is negative.
        """
        if epoch < 0:
            raise UserError(f"epoch {epoch}: epochs are counted from 0")
        return epoch if self.dynamic else 0

    def counts(self, epoch: int) -> npt.NDArray[np.int64]:
        """Copies of each cluster in an epoch, known before any row is looked at: int64 [K]; of stream and ranked draws.

        Raises:
            UserError: the plan is drawn by Bernoulli, whose counts are random.
        """
        if self.draw_name == "bernoulli":
            raise UserError(f"plan {self.name!r} is drawn by bernoulli: its counts are known only after the draw")
        if self.draw_name == "ranked":
            return self.quotas >> UNIT_BITS
        return self.stream.counts(self.drawn_epoch(epoch))

    def draw(self, epoch: int, rows: Rows | None = None) -> npt.NDArray[np.uint8]:
        """Copies of rows in an epoch: a pure function of (plan, epoch, rows).

        Args:
            epoch: 0, 1, …
            rows: a slice with a start and a stop, or int64 [n]; None for all N rows (N bytes).

        Returns:
            uint8 [n].
        """
        if rows is None:
            pieces = [self.draw(epoch, span) for span in self.spans()]
            return np.concatenate(pieces) if pieces else np.empty(0, np.uint8)
        return DRAWS[self.draw_name](self, self.drawn_epoch(epoch), rows)

    def spans(self, chunk_rows: int = CHUNK_ROWS) -> Iterator[slice]:
        """The rows in slices of at most `chunk_rows`."""
        for start in range(0, self.rows, chunk_rows):
            yield slice(start, min(start + chunk_rows, self.rows))

    def rate(self, rows: Rows) -> npt.NDArray[np.float64]:
        """Expected copies of rows per epoch, float64 [n]; 0 or 1 where a ranked pick decides."""
        if self.by_rate:
            return self.rates[rows].astype(np.float64)
        groups = self.groups[rows]
        if self.draw_name == "ranked":
            return _ranked(self, 0, rows).astype(np.float64)
        return np.where(groups >= 0, self.cluster_rates[groups], 0.0)

    @cached_property
    def cluster_rates(self) -> npt.NDArray[np.float64]:
        """r_j = q_j / n_j: expected copies of a member per epoch, float64 [K]."""
        return self.quotas / UNITS / np.maximum(self.sizes, 1)


def _row_numbers(rows: Rows) -> npt.NDArray[np.int64]:
    return np.arange(rows.start, rows.stop, dtype=np.int64) if isinstance(rows, slice) else rows


def _stream(plan: Plan, epoch: int, rows: Rows) -> npt.NDArray[np.uint8]:
    return plan.stream.copies(epoch, np.asarray(plan.groups[rows]), np.asarray(plan.ranks[rows]))


def _bernoulli(plan: Plan, epoch: int, rows: Rows) -> npt.NDArray[np.uint8]:
    seed, numbers = plan.config["seed"], _row_numbers(rows)
    if plan.by_rate:
        return bernoulli_copies(seed, epoch, numbers, np.asarray(plan.rates[rows]))
    return bernoulli_copies(seed, epoch, numbers, plan.cluster_rates, np.asarray(plan.groups[rows]))


def _ranked(plan: Plan, _: int, rows: Rows) -> npt.NDArray[np.uint8]:
    groups = np.asarray(plan.groups[rows])
    chosen = (groups >= 0) & (plan.ranks[rows] < (plan.quotas >> UNIT_BITS)[groups])
    return chosen.astype(np.uint8)


DRAWS: Mapping[str, Callable[[Plan, int, Rows], npt.NDArray[np.uint8]]] = {
    "stream": _stream,
    "bernoulli": _bernoulli,
    "ranked": _ranked,
}
