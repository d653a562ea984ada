"""Weights of clusters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tailwise.errors import UserError
from tailwise.kernels.centroids import NEIGHBOURS, neighbour_distance


@dataclass(frozen=True)
class Clusters:
    """The non-empty clusters of a pool, as a weight function gets them.

    Attributes:
        size: n_j, int64 [K], ≥ 1.
        d_intra: mean cosine distance of members to their centroid, float64 [K]; NaN in groupings without centroids.
        d_inter: mean cosine distance to the 20 nearest other centroids, float64 [K]; NaN in groupings without centroids.
        centroids: returns the centroids, float32 [K, d], unit norm; None in groupings without centroids.
        density: samples within one radius of each centroid, int64 [K]; None where `tailwise cluster` did not count them.
        shares: asked share of an epoch, float64 [K]; None without a mixture.
    """

    size: npt.NDArray[np.int64]
    d_intra: npt.NDArray[np.float64]
    d_inter: npt.NDArray[np.float64]
    centroids: Callable[[], npt.NDArray[np.float32]] | None = None
    density: npt.NDArray[np.int64] | None = None
    shares: npt.NDArray[np.float64] | None = None

    def distance_to_nearest(self, neighbours: int) -> npt.NDArray[np.float64]:
        """Return d_inter for another number of neighbours: float64 [K]."""
        if neighbours == NEIGHBOURS or self.centroids is None:
            return self.d_inter
        return neighbour_distance(self.centroids(), neighbours)


def power(clusters: Clusters, *, alpha: float) -> npt.NDArray[np.float64]:
    """Return n_j^α (DynamiCS, section 3.2): α = 0 is flat, α = 1 proportional."""
    weights: npt.NDArray[np.float64] = clusters.size.astype(np.float64) ** alpha
    return weights


def soft_cap(clusters: Clusters, *, threshold: float, alpha: float) -> npt.NDArray[np.float64]:
    """Return n_j up to the threshold t, and t · (n_j / t)^α above; t is the mean size if `threshold` is 0."""
    size = clusters.size.astype(np.float64)
    limit = threshold or float(size.mean())
    weights: npt.NDArray[np.float64] = np.where(size > limit, limit * (size / limit) ** alpha, size)
    return weights


def by_density(clusters: Clusters, *, alpha: float) -> npt.NDArray[np.float64]:
    """Return n_j · ρ_j^(α − 1), where ρ is the density.

    A member's rate is in proportion to ρ^(α − 1); in DynamiCS it is n^(α − 1). K-means makes sizes nearly equal, but not densities. Raise a
    UserError if the clusters have no density.
    """
    if clusters.density is None:
        raise UserError("this grouping has no density: make a clustering with `density` auto, or use `method` dynamics")
    density = np.maximum(clusters.density, 1).astype(np.float64)
    weights: npt.NDArray[np.float64] = clusters.size * density ** (alpha - 1)
    return weights


def by_shares(clusters: Clusters) -> npt.NDArray[np.float64]:
    """Return the asked shares of a mixture."""
    assert clusters.shares is not None
    return clusters.shares


def flat(clusters: Clusters) -> npt.NDArray[np.float64]:
    """Return the same weight for every cluster."""
    return power(clusters, alpha=0.0)


def proportional(clusters: Clusters) -> npt.NDArray[np.float64]:
    """Return the clusters' sizes."""
    return power(clusters, alpha=1.0)


def complexity(clusters: Clusters, *, temperature: float, neighbours: float = NEIGHBOURS) -> npt.NDArray[np.float64]:
    """Return softmax(d_intra · d_inter / τ) (DBP, section 3.2). Raise a UserError if the clusters have no distances."""
    if np.isnan(clusters.d_intra).any():
        remedy = "use a clustering of `tailwise cluster`, or another method"
        raise UserError(f"this grouping has no centroids, and so no distances: {remedy}")
    logits = clusters.d_intra * clusters.distance_to_nearest(int(neighbours)) / temperature
    weights: npt.NDArray[np.float64] = np.exp(logits - logits.max())
    weights /= weights.sum()
    return weights
