"""Candidates: which samples of the pool take part, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tailwise.catalog.catalog import Part
from tailwise.catalog.drops import Survivors

Inside = Callable[[Part], npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class LeftOut:
    """Samples that take no part, by the first cause."""

    removed: int  # by `tailwise remove`
    dropped: int  # by the drop lists that are used
    ungrouped: int  # by nothing of both: samples of no group, or without the score that the plan goes by

    def __str__(self) -> str:
        """Return the causes in words, for samples of the pool; removed samples are not part of it."""
        causes = {"dropped by lists": self.dropped, "in no group": self.ungrouped}
        return ", ".join(f"{count:,} {cause}" for cause, count in causes.items() if count)


def count_left_out(survivors: Survivors, parts: Iterable[Part], inside: Inside) -> LeftOut:
    """Count the samples that take no part, by cause.

    Args:
        survivors: of all drop lists that are used.
        parts: of the snapshot.
        inside: part → which of its rows take part, bool [n].
    """
    removed = dropped = ungrouped = 0
    for part in parts:
        outside = ~inside(part)
        known, kept = survivors.removals.keeps(part.span), survivors.keeps(part.span)
        removed += int((outside & ~known).sum())
        dropped += int((outside & known & ~kept).sum())
        ungrouped += int((outside & kept).sum())
    return LeftOut(removed, dropped, ungrouped)
