"""Cluster: spherical k-means (reduce), merging, assignment (map), density (reduce), ranks and the table of clusters (reduce)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from tailwise.catalog import layout
from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.catalog import Catalog, Snapshot
from tailwise.catalog.clusterings import ClusterFiles, Clustering, clustering_artifact
from tailwise.catalog.drops import Survivors
from tailwise.catalog.embeddings import MODALITIES, column_names, embedding_inputs
from tailwise.catalog.files import create_array, map_array, read_array, write_array
from tailwise.devices import find_device
from tailwise.errors import DamagedError, UserError
from tailwise.kernels.assign import MISSING, TILE_CENTROIDS, TILE_ROWS, Assigner
from tailwise.kernels.centroids import merge_centroids, neighbour_distance
from tailwise.kernels.density import NeighbourCounter, radius_that_holds, similarity_steps
from tailwise.kernels.grid import SIMILARITY_UNIT, row_chunks, to_similarity_units
from tailwise.kernels.keyed import stream_key
from tailwise.kernels.kmeans import chosen_rows, kmeans, seeding_rows
from tailwise.kernels.lloyd import CARRY_BYTES
from tailwise.kernels.ranks import appearance_ranks
from tailwise.kernels.screening import faster_precision
from tailwise.kernels.seeding import OVERSAMPLING, TooFewDistinctRowsError
from tailwise.progress import Track, silent
from tailwise.requests import ClusterRequest, at_least, bytes_of, refuse_idle
from tailwise.text import did_you_mean

COLLAPSED_SHARE = 0.5
RADIUS_SHARE = 0.95  # of the samples lie within the radius that "auto" finds of their own centroid
CHUNK_ROWS = 65_536
RUNTIME_BYTES = 400 << 20  # Python, torch and compiled loops


def cluster(catalog: Catalog | str | Path, request: ClusterRequest, track: Track = silent) -> Clustering:
    """Cluster the newest snapshot by an embedding column, or assign it to the centroids of an older clustering.

    Args:
        catalog: or its path; with embeddings for all of its samples, less rejected ones.
        request: what is asked for.
        track: shows progress.

    Raises:
        UserError: embeddings are missing, K is out of bounds, memory doesn't suffice, or the clustering is collapsed.
    """
    catalog = Catalog.open(catalog)
    if (request.k is None) == (request.extends is None):
        raise UserError("give either `k` K or `extends` CLUSTERING")
    if request.extends is not None:
        used = {"extends", "name", "without", "max_memory", "device", "force"}
        refuse_idle(request, used, "with `extends`: the centroids are there already")
        return _extend(catalog, request.extends, request, track)
    snapshot, k, column = catalog.snapshot(), request.k or 0, request.column
    if column not in (known := {*MODALITIES, *column_names(catalog)}):
        raise UserError(f"unknown column {column!r}: {did_you_mean(column, sorted(known))}")
    device, memory = str(find_device(request.device)), bytes_of("max_memory", request.max_memory)
    blocks = catalog.embedding_parts(column, snapshot)
    _check(request, k, snapshot)
    fitted = min(request.points_per_centroid * k, sum(map(len, blocks)))
    carry = _memory_to_carry(fitted, k, blocks[0].shape[1], memory)
    config = {
        "k": k,
        "merge": request.merge,
        "density": request.density,
        "column": column,
        "seed": request.seed,
        "iterations": request.iterations,
        "points_per_centroid": request.points_per_centroid,
        "without": list(request.without),
        "snapshot": snapshot.number,
    }
    survivors = Survivors(catalog, request.without, snapshot)
    inputs = {**embedding_inputs(catalog, column, snapshot), **survivors.inputs}
    with clustering_artifact(catalog, request.name, config, inputs) as artifact:
        if not artifact.done:
            stage = _ClusterStage(catalog, artifact, snapshot, blocks, survivors, device, request.force, track)
            stage.fit(k, request.merge, request.seed, request.iterations, request.points_per_centroid, carry)
            stage.assign()
            stage.describe(k, request.density)
    return Clustering.open(catalog, request.name)


def _extend(catalog: Catalog, base: str, request: ClusterRequest, track: Track) -> Clustering:
    """Assign the newest snapshot to the centroids of a clustering that was made for an earlier one. Nothing is fitted anew.

    Rows that the earlier clustering assigned keep their cluster, and, unless the lists of the two differ, their rank within it.
    Its density, if it has one, is counted anew, over all rows and within the same radius.
    """
    snapshot, name = catalog.snapshot(), request.name
    device = str(find_device(request.device))
    old = Clustering.open(catalog, base)
    if old.column is None or not old.has_centroids:
        raise UserError(
            f"clustering {base!r} has no centroids to assign new samples to: make it anew for this snapshot"
        )
    column = old.column
    blocks = catalog.embedding_parts(column, snapshot)
    survivors = Survivors(catalog, request.without, snapshot)
    config = {"extends": base, "column": column, "without": list(request.without), "snapshot": snapshot.number}
    inputs = {**embedding_inputs(catalog, column, snapshot), **survivors.inputs}
    with clustering_artifact(catalog, name, config, {**inputs, "base": old.id}) as artifact:
        if not artifact.done:
            stage = _ClusterStage(catalog, artifact, snapshot, blocks, survivors, device, request.force, track)
            stage.files.write_centroids(old.centroids, old.fit)
            stage.assign(None if old.embeddings_changed else old)
            stage.describe(len(old.centroids), old.summary.get("radius"))
    return Clustering.open(catalog, name)


def _step(progress: Iterator[int]) -> None:
    next(progress, None)


def _check(request: ClusterRequest, k: int, snapshot: Snapshot) -> None:
    if not 1 <= k <= snapshot.rows:
        raise UserError(f"`k` {k:,}: must lie between 1 and the {snapshot.rows:,} samples")
    if request.merge is not None and not 0 < request.merge <= 1:
        raise UserError(f"`merge` {request.merge}: must be a cosine in (0, 1]; DynamiCS uses 0.7")
    if isinstance(request.density, float | int) and not 0 < request.density <= 1:
        raise UserError(f"`density` {request.density}: must be auto, or a cosine in (0, 1]")
    at_least(request, iterations=1, points_per_centroid=1)


def _memory_to_carry(rows: int, clusters: int, dimension: int, max_memory_bytes: int) -> int:
    """What k-means may carry from one iteration to the next beside all that it needs.

    Raises:
        UserError: there isn't enough memory without that.
    """
    # float32: four generations of centroids, twice as many while seeding; float64: sums, and what is made of them; int8: codes.
    centroids = OVERSAMPLING * clusters * dimension * 72
    seeding = seeding_rows(rows, clusters) * (dimension * (2 + 1 + 1) + 220)  # float16, and codes twice
    tiles = torch.get_num_threads() * 4 * TILE_ROWS * (TILE_CENTROIDS + 3 * dimension)
    chunks = CHUNK_ROWS * dimension * (2 + 4)
    left = max_memory_bytes - centroids - seeding - tiles - chunks - RUNTIME_BYTES
    if left < 0:
        raise UserError(
            f"{clusters:,} clusters of {dimension} dimensions need about {(max_memory_bytes - left) / 1e9:.3g} GB, `max_memory` allows "
            f"{max_memory_bytes / 1e9:.3g} GB: raise it, or ask for fewer clusters"
        )
    return min(left, CARRY_BYTES)


class _ClusterStage:
    """The work on one clustering, step by step; each step's files are skipped if they are there."""

    def __init__(
        self,
        catalog: Catalog,
        artifact: Artifact,
        snapshot: Snapshot,
        blocks: list[npt.NDArray[np.float16]],
        survivors: Survivors,
        device: str,
        force: bool,
        track: Track,
    ) -> None:
        self.artifact, self.files = artifact, ClusterFiles(artifact.folder)
        self.snapshot, self.blocks, self.survivors = snapshot, blocks, survivors
        self.device, self.force, self.track = device, force, track
        self.parts = catalog.parts(snapshot)

    def fit(self, clusters: int, merge: float | None, seed: int, iterations: int, points: int, carry: int) -> None:
        """Writes the centroids and the course of their fit."""
        if self.files.has_centroids:
            return
        training = self._training_rows(points * clusters, seed)
        made_by = f"{faster_precision()} products" if self.device == "cpu" else self.device
        progress = iter(self.track(range(iterations), f"k-means, {made_by}", iterations))
        try:
            result = kmeans(
                training,
                clusters,
                iterations=iterations,
                seed=seed,
                device=self.device,
                carry_bytes=carry,
                on_iteration=lambda *_: _step(progress),
            )
        except TooFewDistinctRowsError as error:
            if not self.force or not error.distinct:
                raise UserError(
                    f"only {error.distinct:,} distinct rows for {clusters:,} clusters, among the "
                    f"{sum(map(len, training)):,} that k-means is fitted on: ask for fewer (`k`), check the embeddings, "
                    "raise `points_per_centroid`, or take that many with `force`"
                ) from error
            result = kmeans(
                training, error.distinct, iterations=iterations, seed=seed, device=self.device, carry_bytes=carry
            )
        finally:
            for _ in progress:  # ends the bar
                pass
            shutil.rmtree(self.artifact.path(layout.TRAINING), ignore_errors=True)
        centroids = result.centroids
        if merge is not None:
            centroids = centroids[merge_centroids(centroids, merge)]
        self.files.write_centroids(centroids, {"mean_cosine": result.objective, "fitted": len(result.centroids)})

    def _training_rows(self, wanted: int, seed: int) -> list[npt.NDArray[Any]]:
        """The blocks themselves, or a copy on disk of about `wanted` rows drawn by hash."""
        if self.snapshot.rows <= wanted and self.survivors.all:
            return list(self.blocks)
        present = sum(int(self.survivors.keeps(part.span).sum()) for part in self.parts)
        share = min(wanted / max(present, 1), 1.0)
        folder = self.artifact.path(layout.TRAINING)
        key = stream_key(seed, "training rows")
        for number, (part, block) in enumerate(zip(self.parts, self.blocks, strict=True)):
            kept = self.survivors.keeps(part.span)
            chosen = [
                chosen_rows(part.first_row + start, len(chunk), share, key) & kept[start : start + len(chunk)]
                for start, chunk in row_chunks([block], CHUNK_ROWS)
            ]
            shape = (sum(int(mask.sum()) for mask in chosen), block.shape[1])
            target = create_array(folder / f"{number}.npy", shape, np.float16)
            first = 0
            for mask, (_, chunk) in zip(chosen, row_chunks([block], CHUNK_ROWS), strict=True):
                rows = chunk[mask]
                target[first : first + len(rows)] = rows
                first += len(rows)
        return [read_array(folder / f"{number}.npy") for number in range(len(self.blocks))]

    def assign(self, base: Clustering | None = None) -> None:
        """Writes label and similarity of every row, part by part; those that `base` has are taken from there."""
        assigner = Assigner(self.files.centroids, device=self.device)
        base_parts = 0 if base is None else base.snapshot.parts
        for part, block in self.track(list(zip(self.parts, self.blocks, strict=True)), "assigning", len(self.parts)):
            if self.files.similarities.path(part).exists():
                continue
            kept = self.survivors.keeps(part.span)
            labels = np.full(part.rows, MISSING, np.int32)
            similarity = np.zeros(part.rows, np.float32)
            if base is not None and part.number < base_parts:
                known = kept & (base.labels.read(part) >= 0)
                labels[known] = base.labels.read(part)[known]
                similarity[known] = base.similarities.read(part)[known]
            for start, chunk in row_chunks([block], CHUNK_ROWS):
                wanted = start + np.flatnonzero(
                    kept[start : start + len(chunk)] & (labels[start : start + len(chunk)] < 0)
                )
                if len(wanted):
                    labels[wanted], similarity[wanted] = assigner(chunk[wanted - start])
            self.files.labels.write(part, labels)
            self.files.similarities.write(part, similarity)

    def describe(self, asked: int, density: float | str | None) -> None:
        """Writes ranks and the table of clusters, and finishes the artifact unless it is collapsed."""
        centroids = self.files.centroids
        seen = np.zeros(len(centroids), np.int64)
        similarity_sums = np.zeros(len(centroids), np.int64)
        for part in self.parts:
            labels = np.asarray(self.files.labels.read(part))
            if labels.max(initial=MISSING) >= len(centroids):  # written by an interrupted run, and not hashed yet
                raise DamagedError(
                    f"{self.files.labels.path(part)} is damaged: delete {self.artifact.folder}, then repeat this command"
                )
            self.files.ranks.write(part, appearance_ranks(labels, seen))
            member = labels >= 0
            units = to_similarity_units(self.files.similarities.read(part)[member].astype(np.float64))
            np.add.at(similarity_sums, labels[member], units)
        self._refuse_collapse(seen, asked)
        table = _cluster_table(centroids, seen, similarity_sums)
        radius = self._find_radius() if isinstance(density, str) else density
        if radius is not None:
            table = table.append_column("density", pa.array(self._count_density(radius), pa.int64()))
        self.files.write_table(table)
        clustered = int(seen.sum())
        dropped = sum(int((~self.survivors.keeps(part.span)).sum()) for part in self.parts)
        fit = self.files.fit
        shutil.rmtree(self.artifact.path(layout.DENSITY), ignore_errors=True)
        self.artifact.finish(
            {
                "clusters": int((seen > 0).sum()),
                "empty": int((seen == 0).sum()),
                "fitted": fit["fitted"],
                "samples": clustered,
                "dropped": dropped,
                "without_embedding": self.snapshot.rows - clustered - dropped,
                "radius": radius,
                "iterations": len(fit["mean_cosine"]),
                "mean_cosine": float(similarity_sums.sum() * SIMILARITY_UNIT / max(clustered, 1)),
            }
        )

    def _find_radius(self) -> float:
        """The cosine to their own centroid that RADIUS_SHARE of the samples reach."""
        histogram = np.zeros(1, np.int64)
        for part in self.parts:
            member = self.files.labels.read(part) >= 0
            histogram = histogram + similarity_steps(self.files.similarities.read(part)[member])
        return radius_that_holds(histogram, RADIUS_SHARE)

    def _count_density(self, radius: float) -> npt.NDArray[np.int64]:
        """Samples within the radius of each centroid, int64 [K]; each part's counts are kept until all are there."""
        centroids = self.files.centroids
        counter = NeighbourCounter(centroids, radius, device=self.device)
        total = np.zeros(len(centroids), np.int64)
        for part, block in self.track(list(zip(self.parts, self.blocks, strict=True)), "density", len(self.parts)):
            path = self.artifact.path(layout.DENSITY) / f"{part.name}{layout.ARRAY}"
            if not path.exists():
                member = self.files.labels.read(part) >= 0
                counts = np.zeros(len(centroids), np.int64)
                for start, chunk in row_chunks([block], CHUNK_ROWS):
                    counts += counter(chunk[member[start : start + len(chunk)]])
                write_array(path, counts)
            total += map_array(path)
        return total

    def _refuse_collapse(self, sizes: npt.NDArray[np.int64], asked: int) -> None:
        largest, total = int(sizes.max(initial=0)), int(sizes.sum())
        if total == 0:
            raise UserError("not one sample has an embedding: import or embed them first")
        if largest > max(COLLAPSED_SHARE, 2 / asked) * total and not self.force:
            raise UserError(
                f"the clustering is collapsed: one of {asked:,} clusters holds {largest:,} of {total:,} samples "
                f"({largest / total:.0%}, at most {COLLAPSED_SHARE:.0%} is taken for sound); check the embeddings, "
                "raise `merge`, or accept it with `force`"
            )


def _cluster_table(
    centroids: npt.NDArray[np.float32], sizes: npt.NDArray[np.int64], similarity_sums: npt.NDArray[np.int64]
) -> pa.Table:
    """cluster, size, d_intra, d_inter; the distances of empty clusters are null, and nobody's neighbours."""
    full = sizes > 0
    d_intra = np.full(len(sizes), np.nan)
    d_inter = np.full(len(sizes), np.nan)
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
