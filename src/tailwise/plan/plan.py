"""The plan: which copies of which rows an epoch holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.catalog import layout
from tailwise.catalog.artifacts import FinishedArtifact, finished_folder, read_manifest
from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.columns import PlainColumn, RowColumn, Rows
from tailwise.catalog.files import map_array, map_cache, note_digest, read_table, write_array
from tailwise.errors import DamagedError, UserError
from tailwise.execution.base import KERNEL, Executor, WithWorker, Worker
from tailwise.execution.local import LocalExecutor
from tailwise.kernels.ranks import rank_dtype
from tailwise.notebook import BLUE, GREY, areas, shown
from tailwise.plan.bernoulli import bernoulli_copies
from tailwise.plan.quotas import UNIT_BITS, UNITS
from tailwise.plan.stream import Stream
from tailwise.storage.local import locked
from tailwise.text import command_line

CHUNK_ROWS = 1 << 20
MAX_EPOCH = 10_000  # the counts of an epoch need those of all earlier epochs


class Plan(FinishedArtifact):
    """A plan of a catalog: small and immutable. Its arrays are memory-mapped when they are first used.

    Attributes:
        name: name of the plan.
    """

    def __init__(self, catalog: Catalog | str | Path, name: str) -> None:
        """Open a finished plan.

        Raises:
            UserError: there is no plan of this name, or it was made for another snapshot.
        """
        catalog = Catalog.open(catalog)
        self.catalog, self.name = catalog, name
        place = catalog.plan_folder(name)
        remedy = f"make it with {command_line('plan', catalog.folder, name, method='…')}"
        self.manifest = read_manifest(place, "plan", remedy)
        self.folder = finished_folder(place, self.manifest["identity"])
        if self.snapshot.id != self.inputs["snapshot"]:
            raise UserError(f"plan {name!r} was made for another snapshot {self.snapshot.number}: make it again")
        self._slots: tuple[int, RowColumn] | None = None  # an epoch, and the slots before it

    def _repr_html_(self) -> str:
        """Return the key figures, and the sizes and quotas of the clusters, for notebooks."""
        facts: dict[str, object] = {
            "method": self.config["method"],
            "epochs": "another draw in each" if self.dynamic else "the same draw in all",
            "pool": self.pool,
            "can be drawn": self.summary["eligible"],
            "clustering": self.clustering,
            "without": ", ".join(self.config.get("without", ())),
        }
        if self.by_rate:
            return shown(f"plan {self.name}", facts)
        budget, order = self.quotas.sum() / UNITS, np.argsort(-self.sizes, kind="stable")
        facts["budget of an epoch"] = f"{budget:,.0f} ({budget / self.pool:.1%} of the pool)"
        curves = {"samples of clusters": (GREY, self.sizes), "in an epoch": (BLUE, self.quotas / UNITS)}
        picture = areas({label: (color, values[order]) for label, (color, values) in curves.items()})
        return shown(f"plan {self.name}", facts, picture)

    def __reduce__(self) -> tuple[type[Plan], tuple[Catalog, str]]:
        """Pickle catalog and name only: another process opens the plan again."""
        return Plan, (self.catalog, self.name)

    @property
    def rows(self) -> int:
        """Number of rows of the snapshot, including rows that are never drawn."""
        return self.snapshot.rows

    @property
    def pool(self) -> int:
        """Number of samples of the snapshot that were not removed when the plan was made."""
        return int(self.summary["pool"])

    @property
    def clustering(self) -> str | None:
        """Name of the plan's clustering; None for a plan without clusters."""
        return self.config.get("clustering") or None

    @property
    def dynamic(self) -> bool:
        """True if each epoch has its own draw; else every epoch is epoch 0."""
        return bool(self.config["dynamic"])

    @property
    def annealed(self) -> bool:
        """True if quotas change from epoch to epoch."""
        return self._annealed is not None

    @property
    def changes(self) -> bool:
        """True if epochs differ."""
        return self.dynamic and not self.whole

    @cached_property
    def whole(self) -> bool:
        """True if every epoch takes the same whole number of copies of each sample, so that nothing is left to chance."""
        if self.by_rate:
            return not any(bool((self.rates[span] % 1 > 0).any()) for span in self.spans())
        return not (self.annealed or (self.quotas % np.maximum(self.sizes << UNIT_BITS, 1) > 0).any())

    @property
    def draw_name(self) -> str:
        """The draw: a name of DRAWS."""
        return str(self.config["draw"])

    @cached_property
    def by_rate(self) -> bool:
        """True if the plan has one rate per row instead of clusters and quotas."""
        return layout.plain_file(layout.RATE, 0) in self.manifest["files"]

    @property
    def has_clusters(self) -> bool:
        """True if groups are clusters, or the pool as one; False with a rate per row, and for groups of about equal rates."""
        return not (self.by_rate or self.config.get("rate_groups"))

    @cached_property
    def rates(self) -> RowColumn:
        """Expected copies of each row per epoch, float32 [N]; only in a plan by rate."""
        return self.row_column(layout.RATE, np.float32)

    @cached_property
    def origins(self) -> RowColumn | None:
        """Row of each sample in the catalog that a plan bundle came from, int64 [N]: Bernoulli draws go by it. None of other plans."""
        there = layout.plain_file(layout.ORIGIN, 0) in self.manifest["files"]
        return self.row_column(layout.ORIGIN, np.int64) if there else None

    @property
    def incomplete(self) -> bool:
        """True if it came from a plan bundle, and samples are missing: the groups have fewer members than their sizes."""
        return bool(self.summary.get("absent"))

    @cached_property
    def groups(self) -> RowColumn:
        """Cluster of each row, int32 [N]; −1 for rows that are never drawn."""
        return self.row_column(layout.GROUP, np.int32)

    def groups_at(self, rows: Rows) -> npt.NDArray[np.int32]:
        """Return clusters of rows (see `groups`), checked to be below K because compiled code does not check.

        Raises:
            DamagedError: a cluster is not below K.
        """
        groups: npt.NDArray[np.int32] = self.groups[rows]
        if groups.max(initial=-1) >= len(self.sizes):
            path = self.groups.file_of(int(_numbers(rows)[groups.argmax()]))
            problem = f"names the group {groups.max():,} of {len(self.sizes):,}: it is damaged"
            raise DamagedError(f"{path} {problem}; restore it, or make the plan again")
        return groups

    @cached_property
    def ranks(self) -> RowColumn:
        """In-cluster rank of each row, [N], by first row or by the pick; see `rank_dtype`."""
        return self.row_column(layout.RANK, self._rank_type)

    @property
    def _rank_type(self) -> np.dtype[Any]:
        return rank_dtype(int(self.sizes.max(initial=0)))

    @cached_property
    def shard_offsets(self) -> npt.NDArray[np.int64]:
        """First row of each shard, and the number of rows at the end: int64 [shards + 1]."""
        return map_array(self.folder / layout.SHARD_OFFSETS)

    def rows_of(self, shard: int) -> slice:
        """Return the rows of a shard."""
        return slice(int(self.shard_offsets[shard]), int(self.shard_offsets[shard + 1]))

    def shards_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """Return the shard of each row: int32, the shape of `rows`."""
        return (np.searchsorted(self.shard_offsets, rows, side="right") - 1).astype(np.int32)

    @cached_property
    def sizes(self) -> npt.NDArray[np.int64]:
        """n, members of each cluster: int64 [K]."""
        return self._group_table("size")

    @cached_property
    def quotas(self) -> npt.NDArray[np.int64]:
        """q, copies of each cluster per epoch, in units of 2⁻³⁰ samples: int64 [K]; of epoch 0, if the plan is annealed."""
        return self._group_table("quota_units")

    @cached_property
    def _annealed(self) -> npt.NDArray[np.int64] | None:
        """Quotas of epochs 0, …, E − 1, int64 [E, K]; the last holds for all later epochs. None where quotas do not change."""
        return map_array(self.folder / layout.QUOTAS) if layout.QUOTAS in self.manifest["files"] else None

    def quotas_at(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return quotas of an epoch, in units of 2⁻³⁰ samples: int64 [K]."""
        if self._annealed is None:
            return self.quotas
        return np.asarray(self._annealed[min(self.drawn_epoch(epoch), len(self._annealed) - 1)])

    @cached_property
    def reachable(self) -> npt.NDArray[np.bool_]:
        """True for clusters that give a copy in some epoch: bool [K]."""
        quotas = self.quotas if self._annealed is None else self._annealed.max(axis=0)
        return np.asarray(quotas > 0)

    def _group_table(self, column: str) -> npt.NDArray[np.int64]:
        table = read_table(self.folder / layout.GROUP_TABLE, [column])
        values: npt.NDArray[np.int64] = table.column(0).to_numpy()
        return values

    @cached_property
    def stream(self) -> Stream:
        """The streams of a plan with the stream draw."""
        return Stream(self.sizes, self.quotas_at, self.config["seed"])

    def drawn_epoch(self, epoch: int) -> int:
        """Return the epoch whose draw is used: `epoch` itself, or 0 for a static plan.

        Raises:
            UserError: the epoch is out of bounds.
        """
        if not 0 <= epoch <= MAX_EPOCH:
            raise UserError(f"epoch {epoch:,}: must lie between 0 and {MAX_EPOCH:,}")
        return epoch if self.dynamic else 0

    @property
    def exact(self) -> bool:
        """True if counts are known before the draw; Bernoulli's are random, and not known where samples are missing."""
        return DRAWS[self.draw_name].counts is not None and not self.incomplete

    @property
    def sizes_known(self) -> bool:
        """True if the number of samples of each epoch is known before the draw."""
        return self.exact or self.whole

    def counts(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the copies of each cluster in an epoch, without reading any row: int64 [K].

        Raises:
            UserError: the plan's draw is random.
        """
        counts = DRAWS[self.draw_name].counts
        if counts is None or self.incomplete:
            known = "its counts are known only after the draw: use `draw`"
            raise UserError(f"plan {self.name!r} is drawn by {self.draw_name}: {known}")
        return counts(self, self.drawn_epoch(epoch))

    def draw(self, epoch: int, rows: Rows | None = None) -> npt.NDArray[np.uint8]:
        """Return the copies of rows in an epoch, uint8 [n]: a pure function of (plan, epoch, rows).

        Args:
            epoch: 0, 1, …
            rows: a slice, as of any sequence of N rows, or int64 [n], each in [0, N); None for all N rows (N bytes).

        Raises:
            UserError: the epoch is negative, or a row is outside [0, N).
        """
        if rows is None:
            pieces = [self.draw(epoch, span) for span in self.spans()]
            return np.concatenate(pieces) if pieces else np.empty(0, np.uint8)
        return DRAWS[self.draw_name].copies(self, self.drawn_epoch(epoch), self._checked(rows))

    def keep_slots(self, epoch: int, executor: Executor | None = None) -> None:
        """Write the slots of all rows before `epoch` into the plan's folder (4 bytes a row), and keep the latest two earlier ones.

        Draws of that epoch and of later ones are then faster, because they need not replay all earlier epochs. Draws do not change. Does
        nothing unless the plan is dynamic and drawn by stream.

        Raises:
            UserError: another process is writing slots of this plan.
            OSError: the plan's folder cannot be written to.
        """
        if self.draw_name != "stream" or not self.dynamic or epoch < 1:
            return
        parts, kept = self.catalog.parts(self.snapshot), self._slots_before(epoch)
        missing = [part for part in parts if not _holds(kept, part)]
        if not missing:
            return
        first = kept.path(parts[0])
        with locked(layout.lock(first.parent), str(first)):
            # The first file, whose name is the epoch's, comes last.
            task = WithWorker(partial(_write_slots, self, epoch))
            for _ in (executor or LocalExecutor()).map(task, reversed(missing), KERNEL):
                pass
        for other in [other for other in self._epochs_with_slots() if other <= epoch][:-2]:
            # Others may still read the epoch before; another training may need later ones.
            for path in map(self._slots_before(other).path, parts):
                path.unlink(missing_ok=True)
                layout.marker(path).unlink(missing_ok=True)

    def _slots_before(self, epoch: int) -> RowColumn:
        """Return the column of the slots that may be kept before an epoch."""
        return RowColumn(
            _slot_column(self.folder, epoch).path, self.catalog.parts(self.snapshot), self._rank_type, read=_read_cache
        )

    def _epochs_with_slots(self) -> list[int]:
        """Return the epochs with slots in the folder, ascending."""
        paths = (self.folder / layout.SLOTS).glob(f"{layout.SLOTS_BEFORE}*{layout.ARRAY}")
        stems = (path.stem.removeprefix(layout.SLOTS_BEFORE) for path in paths)
        return sorted(int(stem) for stem in stems if stem.isdigit())

    def slots(self, epoch: int, rows: Rows) -> npt.NDArray[Any]:
        """Return slots of rows before an epoch, from the latest that are kept: [n]; only in a plan drawn by stream."""
        rows = self._checked(rows)
        groups = self.groups_at(rows)
        first, slots = self._kept_slots(epoch, rows)
        if slots is None:
            slots = self.stream.first_slots(groups, self.ranks[rows])
        return self.stream.advance_slots(groups, slots, first, epoch)

    def _kept_slots(self, epoch: int, rows: Rows) -> tuple[int, npt.NDArray[Any] | None]:
        """Return the latest epoch up to `epoch` with kept slots of some rows, and these; epoch 0 and None if there are none."""
        held = self._slots  # a local name: another thread may be drawing another epoch
        if held is not None and held[0] == epoch:  # parts that are mapped stay so, even if the file is gone
            with suppress(UserError):
                return epoch, held[1][rows]
        for first in reversed([first for first in self._epochs_with_slots() if first <= epoch] if epoch else []):
            kept = held if held is not None and held[0] == first else (first, self._slots_before(first))
            with suppress(UserError):  # the file is damaged, or another process has just removed it
                slots = kept[1][rows]
                self._slots = kept
                return first, slots
        return 0, None

    def release_pages(self) -> None:
        """Release the pages of mapped columns: they stay in the system's cache, and no longer count as this process's memory."""
        columns = [self.__dict__.get(name) for name in ("groups", "ranks", "rates", "origins")]
        for column in (*columns, self._slots and self._slots[1]):
            if column is not None:
                column.release_pages()

    def _checked(self, rows: Rows) -> Rows:
        """Return rows that are in bounds, because compiled code does not check."""
        if isinstance(rows, slice):
            start, stop, step = rows.indices(self.rows)
            return slice(start, max(start, stop)) if step == 1 else np.arange(start, stop, step, dtype=np.int64)
        numbers = np.asarray(rows)
        if not numbers.size:
            return np.empty(0, np.int64)
        if numbers.dtype.kind not in "iu" or numbers.ndim != 1:
            given = f"{numbers.dtype} {list(numbers.shape)}"
            raise UserError(f"rows are a slice or a 1-D array of row numbers, not {given}")
        if not (numbers.min() >= 0 and numbers.max() < self.rows):
            raise UserError(f"rows {numbers.min()} … {numbers.max()}: must lie in [0, {self.rows})")
        return numbers.astype(np.int64, copy=False)

    def spans(self) -> Iterator[slice]:
        """Yield all rows in slices of at most CHUNK_ROWS."""
        for start in range(0, self.rows, CHUNK_ROWS):
            yield slice(start, min(start + CHUNK_ROWS, self.rows))

    def rate(self, rows: Rows, epoch: int = 0) -> npt.NDArray[np.float64]:
        """Return expected copies of rows (see `draw`) in an epoch, float64 [n]; 0 or 1 where a ranked pick decides.

        All epochs have the same, unless the plan is annealed.
        """
        return DRAWS[self.draw_name].rate(self, self.drawn_epoch(epoch), self._checked(rows))

    def candidates(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """Mark rows of a rate above 0, or of a cluster: bool [n]."""
        inside: npt.NDArray[np.bool_] = self.rates[rows] > 0 if self.by_rate else self.groups[rows] >= 0
        return inside

    def drawable(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """Mark candidates whose cluster gives a copy in some epoch: bool [n]."""
        inside = self.candidates(rows)
        return inside if self.by_rate else inside & self.reachable[self.groups[rows]]

    def cluster_rates(self, epoch: int = 0) -> npt.NDArray[np.float64]:
        """Return r_j = q_j / n_j, expected copies of a member in an epoch: float64 [K]."""
        return self.quotas_at(epoch) / UNITS / np.maximum(self.sizes, 1)


def _write_slots(plan: Plan, epoch: int, part: Part, worker: Worker) -> None:
    """Write the slots of the rows of a part before an epoch."""
    plan = worker.cached((plan.folder, plan.id), lambda: plan)
    path = _slot_column(plan.folder, epoch).path(part)
    write_array(path, plan.slots(epoch, part.span), unique=True)
    note_digest(path)


def _slot_column(plan: Path, epoch: int) -> PlainColumn:
    """Return the column of the slots that may be kept before an epoch, in the folder of a plan."""
    return PlainColumn(plan / layout.SLOTS, layout.slots_before(epoch))


def _read_cache(path: Path) -> npt.NDArray[Any]:
    """Map a file of kept slots; a UserError says that it is missing or damaged."""
    if (slots := map_cache(path)) is None:
        raise DamagedError(f"{path} is missing or damaged")
    return slots


def _holds(column: RowColumn, part: Part) -> bool:
    """Return True if the file of a part is sound."""
    with suppress(UserError):
        return len(column.read(part)) == part.rows
    return False


def _numbers(rows: Rows) -> npt.NDArray[np.int64]:
    return np.arange(rows.start, rows.stop, dtype=np.int64) if isinstance(rows, slice) else rows


def _stream_copies(plan: Plan, epoch: int, rows: Rows) -> npt.NDArray[np.uint8]:
    groups, ranks = plan.groups_at(rows), plan.ranks[rows]
    return plan.stream.copies(epoch, groups, ranks, plan.slots(epoch, rows))


def _bernoulli_copies(plan: Plan, epoch: int, rows: Rows) -> npt.NDArray[np.uint8]:
    seed = plan.config["seed"]
    numbers = _numbers(rows) if plan.origins is None else np.asarray(plan.origins[rows])
    if plan.by_rate:
        return bernoulli_copies(seed, epoch, numbers, plan.rates[rows])
    return bernoulli_copies(seed, epoch, numbers, plan.cluster_rates(epoch), plan.groups_at(rows))


def _ranked_copies(plan: Plan, _: int, rows: Rows) -> npt.NDArray[np.uint8]:
    groups = plan.groups_at(rows)
    chosen = (groups >= 0) & (plan.ranks[rows] < (plan.quotas >> UNIT_BITS)[groups])
    return chosen.astype(np.uint8)


def _ranked_rate(plan: Plan, epoch: int, rows: Rows) -> npt.NDArray[np.float64]:
    return _ranked_copies(plan, epoch, rows).astype(np.float64)


def _random_rate(plan: Plan, epoch: int, rows: Rows) -> npt.NDArray[np.float64]:
    if plan.by_rate:
        return plan.rates[rows].astype(np.float64)
    groups = plan.groups_at(rows)
    return np.where(groups >= 0, plan.cluster_rates(epoch)[groups], 0.0)


@dataclass(frozen=True)
class Draw:
    """One way to draw an epoch."""

    copies: Callable[[Plan, int, Rows], npt.NDArray[np.uint8]]  # (plan, epoch, rows) → uint8 [n]
    # (plan, epoch, rows) → float64 [n], expected copies in the epoch
    rate: Callable[[Plan, int, Rows], npt.NDArray[np.float64]]
    counts: Callable[[Plan, int], npt.NDArray[np.int64]] | None  # (plan, epoch) → int64 [K]; None if counts are random


DRAWS: Mapping[str, Draw] = {
    "stream": Draw(_stream_copies, _random_rate, lambda plan, epoch: plan.stream.counts(epoch)),
    "bernoulli": Draw(_bernoulli_copies, _random_rate, None),
    "ranked": Draw(_ranked_copies, _ranked_rate, lambda plan, _: plan.quotas >> UNIT_BITS),
}
