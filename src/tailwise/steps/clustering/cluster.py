"""Cluster: spherical k-means, merging, assignment, density, and the table of clusters."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from tailwise.catalog import layout
from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.catalog import Catalog, Part, Snapshot
from tailwise.catalog.clusterings import ClusterFiles, Clustering, clustering_artifact
from tailwise.catalog.drops import Survivors
from tailwise.catalog.embeddings import check_column, column_dimension, embedding_inputs
from tailwise.catalog.files import read_array
from tailwise.context import Context
from tailwise.devices import find_device
from tailwise.errors import UserError
from tailwise.execution.base import KERNEL, Apply
from tailwise.kernels.assign import TILE_CENTROIDS, TILE_ROWS
from tailwise.kernels.centroids import merge_centroids, neighbour_distance
from tailwise.kernels.density import radius_that_holds
from tailwise.kernels.grid import SIMILARITY_UNIT
from tailwise.kernels.kmeans import seeding_rows
from tailwise.kernels.lloyd import CARRY_BYTES
from tailwise.kernels.seeding import OVERSAMPLING, TooFewDistinctRowsError
from tailwise.requests import ClusterRequest, at_least, bytes_of
from tailwise.steps.clustering.tasks import (
    CHUNK_ROWS,
    Assign,
    Count,
    CountNeighbours,
    DrawRows,
    Rows,
    TrainingRows,
    fit,
    similarity_histogram,
)
from tailwise.steps.ranks import Rank
from tailwise.storage.local import in_part, remove_folder

COLLAPSED_SHARE = 0.5
RADIUS_SHARE = 0.95  # of the samples lie within the radius that "auto" finds of their own centroid
RUNTIME_BYTES = 400 << 20  # Python, torch and compiled loops
# Fields of a request that decide a fit.
_FITTED = ("k", "merge", "density", "seed", "iterations", "points_per_centroid")


def cluster(catalog: Catalog | str | Path, request: ClusterRequest, context: Context | None = None) -> Clustering:
    """Cluster the newest snapshot by an embedding column, or assign it to the centroids of an older clustering (`extends`).

    An extension fits nothing. Rows that the older clustering assigned keep their cluster, and, unless the lists of the two differ, their
    rank within it. Its density, if it has one, is counted again, over all rows and within the same radius.

    Args:
        catalog: or its path; with embeddings for all of its samples, less rejected ones.
        request: what is asked for.
        context: runs the tasks and shows progress; by default, on this machine, without progress.

    Raises:
        UserError: embeddings are missing, K is out of bounds, memory doesn't suffice, or the clustering is collapsed.
    """
    catalog, context = Catalog.open(catalog), context or Context()
    snapshot, base = catalog.snapshot(), _open_base(catalog, request.extends)
    if base is None and in_part():
        raise UserError("`part`: k-means is fitted by one process: run it without `part`, or give `extends`")
    column = request.column if base is None else str(base.column)
    check_column(catalog, column)
    device = str(find_device(request.device))
    catalog.require_embeddings(column, snapshot)
    carry = _memory_to_carry(catalog, snapshot, request) if base is None else 0
    asked = {name: getattr(request, name) for name in (_FITTED if base is None else ("extends",))}
    config = {**asked, "column": column, "without": list(request.without), "snapshot": snapshot.number}
    survivors = Survivors(catalog, request.without, snapshot)
    inputs = {
        **embedding_inputs(catalog, column, snapshot),
        **survivors.inputs,
        **({} if base is None else {"base": base.id}),
    }
    with clustering_artifact(catalog, request.name, config, inputs) as artifact:
        if not artifact.done:
            rows = Rows(catalog.folder, column, snapshot.number, tuple(request.without))
            work = _Work(context, artifact, rows, catalog.parts(snapshot), device, request)
            try:
                if base is None:
                    work.fit(survivors, carry)
                else:
                    work.files.write_centroids(base.centroids, base.fit)
                work.assign(None if base is None or base.embeddings_changed else base.name)
                work.describe(request.density if base is None else base.summary.get("radius"))
            finally:
                context.executor.forget()
    return Clustering.open(catalog, request.name)


def _open_base(catalog: Catalog, name: str | None) -> Clustering | None:
    if name is None:
        return None
    base = Clustering.open(catalog, name)
    if base.column is None or not base.has_centroids:
        raise UserError(f"clustering {name!r} has no centroids to assign new samples to: rebuild it for this snapshot")
    return base


def _memory_to_carry(catalog: Catalog, snapshot: Snapshot, request: ClusterRequest) -> int:
    """Return the bytes that k-means may carry from one iteration to the next, beside those that it needs.

    Raises:
        UserError: something asked for is out of bounds, or there isn't enough memory without that.
    """
    clusters, memory = request.k or 0, bytes_of("max_memory", request.max_memory)
    if not 1 <= clusters <= snapshot.rows:
        raise UserError(f"`k` {clusters:,}: must lie between 1 and the {snapshot.rows:,} samples")
    if request.merge is not None and not 0 < request.merge <= 1:
        raise UserError(f"`merge` {request.merge}: must be a cosine in (0, 1]; DynamiCS uses 0.7")
    if isinstance(request.density, float | int) and not 0 < request.density <= 1:
        raise UserError(f"`density` {request.density}: must be auto, or a cosine in (0, 1]")
    at_least(request, iterations=1, points_per_centroid=1)
    rows = min(request.points_per_centroid * clusters, snapshot.rows)
    dimension = column_dimension(catalog, request.column) or 0
    # Twice as many while seeding: sums in 8 bytes twice; float32: generations of centroids; int8: codes. Measured: 38.
    centroids = OVERSAMPLING * clusters * dimension * 48
    seeding = seeding_rows(rows, clusters) * (dimension * (2 + 1 + 1) + 220)  # float16, and codes twice
    tiles = torch.get_num_threads() * 4 * TILE_ROWS * (TILE_CENTROIDS + 3 * dimension)
    chunks = CHUNK_ROWS * dimension * (2 + 4)
    left = memory - centroids - seeding - tiles - chunks - RUNTIME_BYTES
    if left < 0:
        raise UserError(
            f"{clusters:,} clusters of {dimension} dimensions need about {(memory - left) / 1e9:.3g} GB, `max_memory` allows "
            f"{memory / 1e9:.3g} GB: raise it, or ask for fewer clusters"
        )
    return min(left, CARRY_BYTES)


class _Work:
    """The work on one clustering. Each step leaves files; a rerun skips those that exist."""

    def __init__(
        self, context: Context, artifact: Artifact, rows: Rows, parts: list[Part], device: str, request: ClusterRequest
    ) -> None:
        self.context, self.artifact, self.files = context, artifact, ClusterFiles(artifact.folder)
        self.rows, self.parts, self.device, self.request = rows, parts, device, request

    def fit(self, survivors: Survivors, carry: int) -> None:
        """Write the centroids and the course of their fit."""
        if self.files.has_centroids:
            return
        k, merge = self.request.k or 0, self.request.merge
        training, rows = self._training_rows(survivors)
        try:
            result = fit(self.context, training, rows, k, self.request, self.device, carry)
        except TooFewDistinctRowsError as error:
            if not self.request.force or not error.distinct:
                raise UserError(
                    f"only {error.distinct:,} distinct rows for {k:,} clusters, among the {rows:,} that k-means is fitted on: ask for "
                    "fewer (`k`), check the embeddings, raise `points_per_centroid`, or take that many with `force`"
                ) from error
            result = fit(self.context, training, rows, error.distinct, self.request, self.device, carry)
        finally:
            self.context.executor.forget()  # what iterations carry
            remove_folder(self.artifact.path(layout.TRAINING))
        centroids = result.centroids if merge is None else result.centroids[merge_centroids(result.centroids, merge)]
        self.files.write_centroids(centroids, {"mean_cosine": result.objective, "fitted": len(result.centroids)})

    def _training_rows(self, survivors: Survivors) -> tuple[TrainingRows, int]:
        """Return the rows of the column, or a copy of about `points_per_centroid` · `k` of them; and their number."""
        rows, wanted = survivors.snapshot.rows, self.request.points_per_centroid * (self.request.k or 0)
        if rows <= wanted and survivors.all:
            catalog = Catalog.open(self.rows.catalog)
            return TrainingRows(tuple(catalog.embedding_path(self.rows.column, part) for part in self.parts)), rows
        present = sum(int(survivors.keeps(part.span).sum()) for part in self.parts)
        draw = DrawRows(self.rows, self.artifact.folder, min(wanted / max(present, 1), 1.0), self.request.seed)
        self.context.run(draw, self.parts, "drawing rows", KERNEL)
        paths = tuple(draw.path(part) for part in self.parts)
        return TrainingRows(paths), sum(len(read_array(path)) for path in paths)

    def assign(self, base: str | None) -> None:
        """Write label and similarity of every row; those that `base` assigned keep theirs."""
        task = Assign(self.rows, self.artifact.folder, self.device, base)
        self.context.run(task, self.parts, "assigning", KERNEL)

    def describe(self, density: float | str | None) -> None:
        """Write ranks and the table of clusters; finish the artifact unless the clustering is collapsed."""
        centroids = self.files.centroids
        seen, similarity_sums = np.zeros(len(centroids), np.int64), np.zeros(len(centroids), np.int64)
        dropped = 0

        def parts() -> Iterator[tuple[Part, npt.NDArray[np.int64]]]:
            nonlocal dropped
            count = Count(self.rows, self.artifact.folder)
            for part, found in zip(self.parts, self.context.map(count, self.parts, "counting", KERNEL), strict=True):
                yield part, seen.copy()
                seen[:] += found.sizes
                similarity_sums[:] += found.similarities
                dropped += found.dropped

        for _ in self.context.executor.map(Rank(self.files.labels, self.files.ranks), parts(), KERNEL):
            pass
        self._refuse_collapse(seen)
        table = _cluster_table(centroids, seen, similarity_sums)
        if isinstance(density, str):
            count = Apply(partial(similarity_histogram, self.files))
            density = radius_that_holds(self.context.executor.reduce(count, self.parts, np.add, KERNEL), RADIUS_SHARE)
        if density is not None:
            table = table.append_column("density", pa.array(self._count_density(density), pa.int64()))
        self.files.write_table(table)
        clustered = int(seen.sum())
        fit = self.files.fit
        remove_folder(self.artifact.path(layout.DENSITY))
        self.artifact.finish(
            {
                "clusters": int((seen > 0).sum()),
                "empty": int((seen == 0).sum()),
                "fitted": fit["fitted"],
                "samples": clustered,
                "dropped": dropped,
                "without_embedding": sum(part.rows for part in self.parts) - clustered - dropped,
                "radius": density,
                "iterations": len(fit["mean_cosine"]),
                "mean_cosine": float(similarity_sums.sum() * SIMILARITY_UNIT / max(clustered, 1)),
            }
        )

    def _count_density(self, radius: float) -> npt.NDArray[np.int64]:
        """Return the number of samples within the radius of each centroid, int64 [K]."""
        task = CountNeighbours(self.rows, self.artifact.folder, radius, self.device)
        self.context.run(task, self.parts, "density", KERNEL)
        return sum((task.read(part) for part in self.parts), np.zeros(len(self.files.centroids), np.int64))

    def _refuse_collapse(self, sizes: npt.NDArray[np.int64]) -> None:
        largest, total, asked = int(sizes.max(initial=0)), int(sizes.sum()), self.request.k or len(sizes)
        if total == 0:
            raise UserError("not one sample has an embedding: import or embed them first")
        if largest > max(COLLAPSED_SHARE, 2 / asked) * total and not self.request.force:
            raise UserError(
                f"the clustering is collapsed: one of {asked:,} clusters holds {largest:,} of {total:,} samples "
                f"({largest / total:.0%}, at most {COLLAPSED_SHARE:.0%} is taken for sound); check the embeddings, "
                "raise `merge`, or accept it with `force`"
            )


def _cluster_table(
    centroids: npt.NDArray[np.float32], sizes: npt.NDArray[np.int64], similarity_sums: npt.NDArray[np.int64]
) -> pa.Table:
    """Return cluster, size, d_intra, d_inter. Empty clusters have null distances, and are no neighbours of others."""
    full = sizes > 0
    d_intra, d_inter = np.full((2, len(sizes)), np.nan)
    d_intra[full] = 1 - similarity_sums[full] * SIMILARITY_UNIT / sizes[full]
    d_inter[full] = neighbour_distance(np.asarray(centroids)[full])
    return pa.table(
        {
            "cluster": pa.array(np.arange(len(sizes)), pa.int32()),
            "size": pa.array(sizes, pa.int64()),
            "d_intra": pa.array(d_intra, pa.float64(), mask=~full),
            "d_inter": pa.array(d_inter, pa.float64(), mask=~full),
        }
    )
