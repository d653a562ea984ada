"""What a step will cost, roughly: from the number of samples, and this machine's speed at matrix products, measured on the spot."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tailwise.requests import ClusterRequest

# Samples per second, measured on 2 cores of an AMD EPYC; good to a factor of two or three, and too slow where there are more.
IMPORTED = 35_000
FILTERED = 1_000_000
MATCHED = 200_000
PLANNED = 4_000_000
WRITTEN = 150_000
RESHARDED = 10_000
PROBE = 768  # rows and columns of the matrices that are multiplied to measure
SHARE = 0.4  # of that speed that the steps reach


@dataclass(frozen=True)
class Pool:
    """What costs depend on.

    Attributes:
        samples: N.
        dimension: d of the embeddings.
        flops: floating-point operations per second.
    """

    samples: int
    dimension: int
    flops: float


def matrix_speed() -> float:
    """Floating-point operations per second of float32 matrix products here, by a measurement of some milliseconds."""
    a = torch.ones(PROBE, PROBE)
    torch.mm(a, a)
    rounds, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.05:
        torch.mm(a, a)
        rounds += 1
    return rounds * 2 * PROBE**3 / (time.perf_counter() - start)


def _cluster_seconds(pool: Pool, options: Mapping[str, Any]) -> float:
    centroids = float(options.get("k") or 1000)
    points = float(options.get("points-per-centroid") or ClusterRequest.points_per_centroid)
    rounds = float(options.get("iterations") or ClusterRequest.iterations)
    fitted = min(pool.samples, centroids * points)
    return 2 * pool.dimension * centroids * (fitted * rounds + pool.samples) / (SHARE * pool.flops)


def _dedup_seconds(pool: Pool, options: Mapping[str, Any]) -> float:
    centroids = float(options.get("k") or 1000)
    return pool.dimension * pool.samples**2 / centroids / (SHARE * pool.flops)


def _at(samples_per_second: float) -> Callable[[Pool, Mapping[str, Any]], float]:
    return lambda pool, _: pool.samples / samples_per_second


SECONDS: Mapping[str, Callable[[Pool, Mapping[str, Any]], float]] = {
    "import": _at(IMPORTED),
    "cluster": _cluster_seconds,
    "dedup": _dedup_seconds,
    "filter": _at(FILTERED),
    "group": lambda pool, options: pool.samples / (MATCHED if "entries" in options else FILTERED),
    "plan": lambda pool, options: pool.samples / (MATCHED if "entries" in options else PLANNED),
    "draw": _at(WRITTEN),
    "export": lambda pool, options: pool.samples / (RESHARDED if options.get("to") == "shards" else WRITTEN),
    "excluded": _at(WRITTEN),
}
