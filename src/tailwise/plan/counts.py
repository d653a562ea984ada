"""Exact counts per epoch (METHODS: stream, step 1): every epoch gives each cluster floor or ceil of its quota, and sums to the budget."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tailwise.plan.quotas import UNIT_BITS, UNITS


@dataclass(frozen=True)
class StreamPosition:
    """Where each cluster's stream stands before an epoch.

    Attributes:
        epoch: the epoch about to be drawn.
        taken: copies given in all earlier epochs, int64 [K].
        deficit: quotas less copies so far, int64 [K], in units of 2⁻³⁰ samples; sums to 0.
    """

    epoch: int
    taken: npt.NDArray[np.int64]
    deficit: npt.NDArray[np.int64]

    @classmethod
    def start(cls, clusters: int) -> StreamPosition:
        """Before epoch 0."""
        return cls(0, np.zeros(clusters, np.int64), np.zeros(clusters, np.int64))


def next_counts(
    position: StreamPosition, quotas: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], StreamPosition]:
    """The counts of one epoch, and the position after it.

    Each cluster gives the floor of its quota; the clusters with the largest accumulated deficit, ties by index, give one more, as
    many as the budget lacks. All in integers, so that no float error ever decides. Quotas may change from epoch to epoch.

    Args:
        position: before the epoch.
        quotas: int64 [K], in units of 2⁻³⁰ samples; their sum is the budget, a whole number of samples.

    Returns:
        counts: int64 [K], summing to the budget.
        The position after the epoch.
    """
    counts = quotas >> UNIT_BITS
    deficit = position.deficit + (quotas & (UNITS - 1))
    extra, fraction = divmod(int(quotas.sum()) - (int(counts.sum()) << UNIT_BITS), UNITS)
    if fraction:
        raise ValueError(f"the quotas sum to {int(quotas.sum()) / UNITS} samples, not to a whole number")
    # Where the quota is whole, one more would be above it, and perhaps above what the cluster may give.
    claim = np.where(quotas & (UNITS - 1), deficit, np.iinfo(np.int64).min)
    chosen = np.argsort(~claim, kind="stable")[:extra]
    counts[chosen] += 1
    deficit[chosen] -= UNITS
    return counts, StreamPosition(position.epoch + 1, position.taken + counts, deficit)
