"""Exact counts per epoch (METHODS: stream, step 1): each cluster gives floor or ceil of its quota, and counts sum to the budget."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tailwise.plan.quotas import UNIT_BITS, UNITS


@dataclass(frozen=True)
class StreamPosition:
    """Position of each cluster's stream before an epoch."""

    epoch: int  # the next epoch
    taken: npt.NDArray[np.int64]  # copies given in all earlier epochs, int64 [K]
    deficit: npt.NDArray[np.int64]  # quotas minus copies so far, int64 [K], in units of 2⁻³⁰ samples; sums to 0

    @classmethod
    def start(cls, clusters: int) -> StreamPosition:
        """Return the position before epoch 0."""
        return cls(0, np.zeros(clusters, np.int64), np.zeros(clusters, np.int64))


def next_counts(
    position: StreamPosition, quotas: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], StreamPosition]:
    """Return the counts of one epoch, int64 [K], and the position after it.

    Each cluster gives the floor of its quota. The clusters with the largest accumulated deficit, ties by index, give one more, until counts
    sum to the budget. All is in integers, so that rounding never decides. Quotas may change from epoch to epoch.

    Args:
        position: position before the epoch.
        quotas: int64 [K], in units of 2⁻³⁰ samples; their sum is the budget, a whole number of samples.
    """
    counts = quotas >> UNIT_BITS
    deficit = position.deficit + (quotas & (UNITS - 1))
    extra, fraction = divmod(int(quotas.sum()) - (int(counts.sum()) << UNIT_BITS), UNITS)
    if fraction:
        raise ValueError(f"the quotas sum to {int(quotas.sum()) / UNITS} samples, not to a whole number")
    # A cluster with a whole quota never gives one more: that would exceed its quota, and perhaps its maximum.
    claim = np.where(quotas & (UNITS - 1), deficit, np.iinfo(np.int64).min)
    chosen = np.argsort(~claim, kind="stable")[:extra]
    counts[chosen] += 1
    deficit[chosen] -= UNITS
    return counts, StreamPosition(position.epoch + 1, position.taken + counts, deficit)
