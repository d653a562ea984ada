"""Groups of samples that a plan is made over: the clusters of a clustering, or the pool as one, less what is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.catalog.catalog import Catalog, Part, Snapshot
from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.columns import PartColumn
from tailwise.catalog.drops import Survivors
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.execution.base import KERNEL, Fill, WithWorker, Worker
from tailwise.kernels.centroids import neighbour_distance
from tailwise.kernels.grid import SIMILARITY_UNIT, to_similarity_units
from tailwise.kernels.keyed import MAX_PERMUTED
from tailwise.plan.methods import PICKS, Clusters
from tailwise.plan.quotas import UNITS
from tailwise.requests import ScoreRequest
from tailwise.steps.planning.unused_lists import LeftOut, count_left_out
from tailwise.steps.ranks import write_appearance_ranks, write_value_ranks
from tailwise.steps.scoring.scores import make_score, score_inputs
from tailwise.text import did_you_mean

OUTSIDE = -1  # the label of rows that are never drawn


@dataclass(frozen=True)
class Rows:
    """Address of the rows of a plan, and their groups."""

    catalog: Path  # its folder
    snapshot: int  # its number
    without: tuple[str, ...]  # names of the drop lists
    inputs: tuple[tuple[str, str], ...]  # name and hash of each input: workers do not use what they keep of others
    clustering: str | None = None  # its name; None: all rows are one group
    score: PartColumn | None = None  # of rows; those without it are in no group. None asks for none
    only: tuple[int, ...] | None = None  # groups that are used; None: all

    def open(self, worker: Worker) -> tuple[Survivors, Clustering | None]:
        """Return the rows that drop lists and removals leave, and the clustering."""
        return worker.cached(self, self._open)

    def _open(self) -> tuple[Survivors, Clustering | None]:
        catalog = Catalog.open(self.catalog)
        survivors = Survivors(catalog, self.without, catalog.snapshot(self.snapshot))
        return survivors, None if self.clustering is None else Clustering.open(catalog, self.clustering)

    def groups(self, part: Part, worker: Worker) -> npt.NDArray[np.int32]:
        """Return the group of each row of a part: int32 [n], OUTSIDE for rows in none."""
        survivors, clustering = self.open(worker)
        groups = np.zeros(part.rows, np.int32) if clustering is None else np.array(clustering.labels.read(part))
        groups[~survivors.keeps(part.span)] = OUTSIDE
        if self.only is not None:
            groups[~np.isin(groups, self.only)] = OUTSIDE
        if self.score is not None:
            groups[np.isnan(self.score.read(part))] = OUTSIDE
        return groups

    def count(self, number: int, part: Part, worker: Worker) -> npt.NDArray[np.int64]:
        """Count the members of each of K groups, and sum their similarities in units of SIMILARITY_UNIT: int64 [2, K]."""
        groups, (_, clustering) = self.groups(part, worker), self.open(worker)
        member = groups >= 0
        counts = np.zeros((2, number), np.int64)
        counts[0] = np.bincount(groups[member], minlength=number)
        if clustering is not None and clustering.has_centroids:
            similarity = clustering.similarities.read(part)[member].astype(np.float64)
            np.add.at(counts[1], groups[member], to_similarity_units(similarity))
        return counts


def shares_of_groups(clustering: Clustering, shares: Mapping[str, float]) -> npt.NDArray[np.float64]:
    """Return the share of each group, float64 [K], from shares by value, or by number in a clustering; 0 for groups without one.

    Raises:
        UserError: there is no group of a name.
    """
    names = clustering.values or [str(number) for number in range(clustering.table.num_rows)]
    places = {name: number for number, name in enumerate(names)}
    found = np.zeros(len(names))
    for name, share in shares.items():
        if name not in places:
            known = did_you_mean(name, [each for each in names if each is not None])
            raise UserError(f"`shares`: {clustering.name!r} has no group {name!r}: {known}")
        found[places[name]] = share
    return found


def mixture_figures(
    clustering: Clustering,
    shares: npt.NDArray[np.float64],
    sizes: npt.NDArray[np.int64],
    quotas: npt.NDArray[np.int64],
) -> list[dict[str, Any]]:
    """Return name, samples, asked share and quota in samples of each group that has a share.

    Args:
        clustering: whose groups.
        shares: float64 [K], 0 for groups without one.
        sizes: int64 [K], samples that can be drawn.
        quotas: int64 [K], in units of 2⁻³⁰ samples.
    """
    names = clustering.values or [str(number) for number in range(len(sizes))]
    return [
        {"group": names[at], "samples": int(sizes[at]), "share": float(shares[at]), "quota": int(quotas[at]) / UNITS}
        for at in np.flatnonzero(shares).tolist()
    ]


class Grouping:
    """Rows in groups.

    Attributes:
        snapshot: whose rows.
        parts: of the snapshot.
        inputs: names and hashes of all it is made from.
        sizes: int64 [K], members of each group.
        statistics: of the non-empty groups.
        rows: address of the rows, for tasks.
    """

    def __init__(
        self,
        catalog: Catalog,
        clusters: str | None,
        context: Context,
        *,
        without: Sequence[str] = (),
        score: ScoreRequest | None = None,
        shares: Mapping[str, float] | None = None,
    ) -> None:
        """Opens the groups of a plan, and counts their members.

        Args:
            catalog: with samples.
            clusters: name of the clustering; None takes the newest snapshot as one group.
            context: runs the tasks and shows progress.
            without: names of drop lists.
            score: of rows; those without it are in no group. None asks for none.
            shares: share of each group of a mixture, by its value; rows of other groups are in no group. None: no mixture.

        Raises:
            UserError: there is no such clustering, list or score, lists are of another snapshot, or a group is too large.
        """
        self._catalog, self._context = catalog, context
        self._clustering = None if clusters is None else Clustering.open(catalog, clusters)
        self._lists: list[str] = [*without]
        self.snapshot: Snapshot = catalog.snapshot()
        self.inputs: dict[str, str] = {}
        if self._clustering is not None:
            self.snapshot = self._clustering.snapshot
            self.inputs["clustering"] = self._clustering.id
            self._lists = [*self._clustering.without, *self._lists]
        self.parts: list[Part] = catalog.parts(self.snapshot)
        self._survivors = Survivors(catalog, without, self.snapshot)
        self.inputs |= {"snapshot": self.snapshot.id, **self._survivors.inputs}
        column = None
        if score is not None:
            self.inputs |= score_inputs(catalog, self.snapshot, score)
            column = make_score(catalog, self.snapshot, score, context)
        inputs = tuple(self.inputs.items())
        self._shares = shares_of_groups(self._clustering, shares) if self._clustering and shares else None
        only = None if self._shares is None else tuple(np.flatnonzero(self._shares).tolist())
        self.rows = Rows(catalog.folder, self.snapshot.number, tuple(without), inputs, clusters, column, only)
        self.sizes, self.statistics = (
            self._count_pool() if self._clustering is None else self._count_clusters(self._clustering)
        )
        if (largest := int(self.sizes.max(initial=0))) > MAX_PERMUTED:
            raise UserError(
                f"{largest:,} samples are more than one group can hold ({MAX_PERMUTED:,}): cluster them finer (for every sample alike: "
                "`method` proportional)"
            )
        if self._shares is not None:
            self.statistics = replace(self.statistics, shares=self._shares[self.sizes > 0])
        if not self.sizes.any():
            raise UserError("not one sample is left to plan: see `tailwise excluded` for what dropped them")

    @property
    def pool(self) -> int:
        """Samples that are not removed, in a group or not."""
        return self._survivors.pool

    @property
    def eligible(self) -> int:
        """Samples that are in a group."""
        return int(self.sizes.sum())

    def left_out(self) -> LeftOut:
        """Count the samples that are in no group, by cause."""
        survivors, worker = Survivors(self._catalog, self._lists, self.snapshot), Worker()
        return count_left_out(survivors, self.parts, lambda part: self.rows.groups(part, worker) >= 0)

    def write(self, groups: PartColumn, ranks: PartColumn, pick: str) -> None:
        """Write group, int32, and rank, uint32 or uint64 (see `rank_dtype`), of every row.

        Raises:
            UserError: the pick needs centroids, and the grouping has none.
        """
        values = self._values(pick)
        self._context.run(Fill(groups, self.rows.groups), self.parts, "groups of rows", KERNEL)
        if values is None:
            write_appearance_ranks(groups, ranks, len(self.sizes), self.parts, self._context)
        else:
            write_value_ranks(groups, values, PICKS[pick].sign, ranks, self.sizes, self.parts, self._context)

    def _values(self, pick: str) -> PartColumn | None:
        """Return the values that order the members by a ranked pick: float32; None for a random one."""
        if PICKS[pick].by is None:
            return None
        if PICKS[pick].by == "score" and self.rows.score is not None:
            return self.rows.score
        if self._clustering is None or not self._clustering.has_centroids:
            raise UserError(
                f"`pick` {pick} needs a clustering with centroids: make one with `tailwise cluster`, or use random or highest"
            )
        return self._clustering.similarities

    def mixture(self, quotas: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
        """Return the figures of the groups of a mixture (see `mixture_figures`), from quotas in units of 2⁻³⁰ samples, int64 [K]."""
        assert self._clustering is not None and self._shares is not None
        return mixture_figures(self._clustering, self._shares, self.sizes, quotas)

    def _count(self, groups: int) -> npt.NDArray[np.int64]:
        if not self.parts:
            return np.zeros((2, groups), np.int64)
        return self._context.executor.reduce(WithWorker(partial(self.rows.count, groups)), self.parts, np.add, KERNEL)

    def _count_pool(self) -> tuple[npt.NDArray[np.int64], Clusters]:
        sizes = self._count(1)[0]
        unknown = np.full(1, np.nan)
        return sizes, Clusters(sizes, unknown, unknown)

    def _count_clusters(self, clustering: Clustering) -> tuple[npt.NDArray[np.int64], Clusters]:
        """Return sizes and distances: those of the clustering, or counted again if some of its members are left out."""
        table = clustering.table
        sizes: npt.NDArray[np.int64] = table.column("size").to_numpy()
        d_intra, d_inter = (table.column(name).to_numpy() for name in ("d_intra", "d_inter"))
        before = sizes > 0
        if not self._survivors.all or self.rows.score is not None or self.rows.only is not None:
            sizes, sums = self._count(len(sizes))
            d_intra = np.full(len(sizes), np.nan)
            if clustering.has_centroids:
                with np.errstate(invalid="ignore"):
                    d_intra = 1 - sums * SIMILARITY_UNIT / sizes
        full = sizes > 0
        if not clustering.has_centroids:
            return sizes, Clusters(sizes[full], d_intra[full], d_inter[full])

        def centroids() -> npt.NDArray[np.float32]:
            return np.asarray(clustering.centroids)[full]

        near = d_inter[full] if np.array_equal(full, before) else neighbour_distance(centroids())
        density = table.column("density").to_numpy()[full] if "density" in table.column_names else None
        return sizes, Clusters(sizes[full], d_intra[full], near, centroids, density)
