"""Weights: how much a cluster counts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Clusters:
    """What a weight may look at: the non-empty clusters of a pool.

    Attributes:
        size: n_j, int64 [K], ≥ 1.
        d_intra: mean cosine distance of members to their centroid, float64 [K].
        d_inter: mean cosine distance to the nearest other centroids, float64 [K].
    """

    size: npt.NDArray[np.int64]
    d_intra: npt.NDArray[np.float64]
    d_inter: npt.NDArray[np.float64]


def power(clusters: Clusters, *, alpha: float) -> npt.NDArray[np.float64]:
    """n_j^α (DynamiCS, section 3.2): α = 0 is flat, α = 1 proportional."""
    weights: npt.NDArray[np.float64] = clusters.size.astype(np.float64) ** alpha
    return weights


def flat(clusters: Clusters) -> npt.NDArray[np.float64]:
    """The same for every cluster."""
    return power(clusters, alpha=0.0)


def proportional(clusters: Clusters) -> npt.NDArray[np.float64]:
    """The cluster's size."""
    return power(clusters, alpha=1.0)


def complexity(clusters: Clusters, *, temperature: float) -> npt.NDArray[np.float64]:
    """softmax(d_intra · d_inter / τ) (DBP, section 3.2)."""
    logits = clusters.d_intra * clusters.d_inter / temperature
    weights: npt.NDArray[np.float64] = np.exp(logits - logits.max())
    weights /= weights.sum()
    return weights
