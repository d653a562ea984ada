"""Rough cost of a step, from the number of samples and the measured speed of matrix products on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tailwise.catalog.catalog import Catalog
from tailwise.catalog.embeddings import column_dimension
from tailwise.shards.members import MemberChoice
from tailwise.shards.webdataset import read_shard
from tailwise.sources import find

if TYPE_CHECKING:
    from tailwise.pipeline.run import Job

PROBE = 768  # rows and columns of the matrices that are multiplied to measure
DIMENSION, CLUSTERS = 768, 1000  # where they are not known
SHARE = 0.4  # of that speed that the steps reach


@dataclass(frozen=True)
class Pool:
    """Size of a pool and speed of the machine."""

    samples: int  # N
    about: str  # how that is known, in words, if it is an estimate
    dimension: int  # d of the embeddings
    clusters: Mapping[str, int]  # K of each clustering that is asked for
    flops: float  # floating-point operations per second

    @classmethod
    def of(cls, catalog: Catalog | None, sources: Sequence[str], jobs: Sequence[Job]) -> Pool:
        """Return the pool of a catalog; before there is one, that of its sources, by the first tar."""
        clusters = {str(job.makes): job.asked["k"] or 0 for job in jobs if job.step.command == "cluster"}
        samples, about, dimension = 0, "an unknown number, for now ", None
        if catalog is not None:
            samples, about, dimension = catalog.snapshot().rows, "", column_dimension(catalog, "image")
        elif tars := find(sources).tars:
            path, size = next(iter(tars.items()))
            asked = next((job.asked for job in jobs if job.step.command == "import"), {})
            choice = MemberChoice.given(asked.get("image"), asked.get("caption"))
            samples = round(read_shard(path, choice).samples.num_rows * sum(tars.values()) / max(size, 1))
            about = f"{len(tars):,} shards, about "
        return cls(samples, about, dimension or DIMENSION, clusters, matrix_speed())


def matrix_speed() -> float:
    """Floating-point operations per second of float32 matrix products here, by a measurement of some milliseconds."""
    import torch  # noqa: PLC0415  (seconds, which a recipe that is refused does without)

    a = torch.ones(PROBE, PROBE)
    torch.mm(a, a)
    rounds, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.05:
        torch.mm(a, a)
        rounds += 1
    return rounds * 2 * PROBE**3 / (time.perf_counter() - start)


def duration(seconds: float) -> str:
    """Return a time in the unit that fits: 3 h."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{max(seconds, 1):.0f} s"


def _cluster_seconds(pool: Pool, asked: Mapping[str, Any]) -> float:
    centroids, points, rounds = (float(asked[name] or CLUSTERS) for name in ("k", "points_per_centroid", "iterations"))
    fitted = min(pool.samples, centroids * points)
    return 2 * pool.dimension * centroids * (fitted * rounds + pool.samples) / (SHARE * pool.flops)


def _dedup_seconds(pool: Pool, asked: Mapping[str, Any]) -> float:
    if asked["exact"] or asked["against"]:
        return pool.samples / 1_000  # images that are decoded
    centroids = float(pool.clusters.get(asked["clustering"]) or CLUSTERS)
    return pool.dimension * pool.samples**2 / centroids / (SHARE * pool.flops)


# By samples per second, measured on 2 cores of an AMD EPYC; good to a factor of two or three, and too slow where there are more.
SECONDS: Mapping[str, Callable[[Pool, Mapping[str, Any]], float]] = {
    "import": lambda pool, _: pool.samples / 35_000,
    "cluster": _cluster_seconds,
    "dedup": _dedup_seconds,
    "score": lambda pool, asked: pool.samples / (10_000 if asked["head"] else 1_000_000),
    "filter": lambda pool, _: pool.samples / 1_000_000,
    "group": lambda pool, asked: pool.samples / (200_000 if asked["entries"] else 1_000_000),
    "plan": lambda pool, asked: pool.samples / (200_000 if asked["entries"] else 4_000_000),
    "draw": lambda pool, _: pool.samples / 150_000,
    "export": lambda pool, asked: pool.samples / (10_000 if asked["to"] == "shards" else 150_000),
    "excluded": lambda pool, _: pool.samples / 150_000,
}
