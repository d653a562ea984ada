"""Groups of samples that a plan is made over: the clusters of a clustering, or the pool as one, less what is left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from tailwise.catalog import layout
from tailwise.catalog.catalog import Catalog, Part, Snapshot
from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.drops import Survivors
from tailwise.errors import UserError
from tailwise.kernels.centroids import neighbour_distance
from tailwise.kernels.grid import SIMILARITY_UNIT, to_similarity_units
from tailwise.plan.methods import PICKS
from tailwise.plan.stream import MAX_CLUSTER
from tailwise.plan.weights import Clusters
from tailwise.requests import ScoreRequest
from tailwise.steps.planning.candidates import LeftOut, count_left_out
from tailwise.steps.scoring.scores import score_inputs, score_parts

OUTSIDE = -1  # the label of rows that are never drawn


class Grouping:
    """Rows in groups.

    Attributes:
        snapshot: whose rows.
        parts: of the snapshot.
        inputs: names and hashes of all it is made from.
        sizes: int64 [K], members of each group.
        statistics: of the non-empty groups.
    """

    def __init__(
        self,
        catalog: Catalog,
        clusters: str | None,
        *,
        without: Sequence[str] = (),
        score: ScoreRequest | None = None,
    ) -> None:
        """Opens the groups of a plan, and counts their members.

        Args:
            catalog: with samples.
            clusters: name of the clustering; None takes the newest snapshot as one group.
            without: names of drop lists.
            score: of rows; those without it are in no group. None asks for none.

        Raises:
            UserError: there is no such clustering, list or score, lists are of another snapshot, or a group is too large.
        """
        self._catalog, self._score = catalog, score
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
        if score is not None:
            self.inputs |= score_inputs(catalog, self.snapshot, score)
        self.sizes, self.statistics = (
            self._count_pool() if self._clustering is None else self._count_clusters(self._clustering)
        )
        if (largest := int(self.sizes.max(initial=0))) > MAX_CLUSTER:
            raise UserError(
                f"{largest:,} samples are more than one group can hold ({MAX_CLUSTER:,}): cluster them finer (for every sample alike: "
                "`method` proportional)"
            )
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
        survivors = Survivors(self._catalog, self._lists, self.snapshot)
        labels = self.labels()
        return count_left_out(survivors, self.parts, lambda _: next(labels) >= 0)

    def labels(self) -> Iterator[npt.NDArray[np.int32]]:
        """The group of each row, part by part: int32 [n], OUTSIDE for rows in none."""
        scores = score_parts(self._catalog, self.snapshot, self._score) if self._score is not None else None
        for part in self.parts:
            one = np.zeros(part.rows, np.int32)
            label = one if self._clustering is None else np.array(self._clustering.labels.read(part))
            label[~self._survivors.keeps(part.span)] = OUTSIDE
            if scores is not None:
                label[np.isnan(next(scores))] = OUTSIDE
            yield label

    def order(self, pick: str) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the values that order the members by a ranked pick, part by part: float32 [n], lower ones first.

        Raises:
            UserError: the grouping has no centroids.
        """
        if PICKS[pick].by == "score" and self._score is not None:
            values = score_parts(self._catalog, self.snapshot, self._score)
        elif self._clustering is None or not self._clustering.has_centroids:
            raise UserError(
                f"`pick` {pick} needs a clustering with centroids: make one with `tailwise cluster`, or use random or highest"
            )
        else:
            values = self._clustering.parts(layout.SIMILARITY)
        sign = np.float32(PICKS[pick].sign)
        return (sign * part for part in values)

    def _count_pool(self) -> tuple[npt.NDArray[np.int64], Clusters]:
        sizes = np.array([sum(int((part >= 0).sum()) for part in self.labels())], np.int64)
        unknown = np.full(1, np.nan)
        return sizes, Clusters(sizes, unknown, unknown)

    def _count_clusters(self, clustering: Clustering) -> tuple[npt.NDArray[np.int64], Clusters]:
        """Return sizes and distances: those of the clustering, or counted again if some of its members are left out."""
        table = clustering.table
        sizes: npt.NDArray[np.int64] = table.column("size").to_numpy()
        d_intra, d_inter = (table.column(name).to_numpy() for name in ("d_intra", "d_inter"))
        before = sizes > 0
        if not self._survivors.all or self._score is not None:
            sizes, d_intra = self._recount(clustering, len(sizes))
        full = sizes > 0
        if not clustering.has_centroids:
            return sizes, Clusters(sizes[full], d_intra[full], d_inter[full])

        def centroids() -> npt.NDArray[np.float32]:
            return np.asarray(clustering.centroids)[full]

        near = d_inter[full] if np.array_equal(full, before) else neighbour_distance(centroids())
        density = table.column("density").to_numpy()[full] if "density" in table.column_names else None
        return sizes, Clusters(sizes[full], d_intra[full], near, centroids, density)

    def _recount(self, clustering: Clustering, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Size and d_intra of what is left of each cluster; NaN where there are no similarities."""
        sizes, sums = np.zeros(count, np.int64), np.zeros(count, np.int64)
        known = clustering.has_centroids
        for part, label in zip(self.parts, self.labels(), strict=True):
            member = label >= 0
            sizes += np.bincount(label[member], minlength=count)
            if known:
                similarity = clustering.similarities.read(part)[member].astype(np.float64)
                np.add.at(sums, label[member], to_similarity_units(similarity))
        with np.errstate(invalid="ignore"):
            d_intra = 1 - sums * SIMILARITY_UNIT / sizes if known else np.full(count, np.nan)
        return sizes, d_intra
