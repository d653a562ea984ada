"""The samples that an epoch holds, part by part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tailwise.catalog.catalog import Part
from tailwise.catalog.removals import Removals, removing_or_publishing
from tailwise.errors import UserError
from tailwise.plan.plan import Plan
from tailwise.progress import Track


class RemovedMeanwhileError(UserError):
    """Samples were removed while they were being exported."""

    def __init__(self) -> None:
        """Say what to do."""
        super().__init__("samples were removed from the catalog while they were being exported: run this command again")


@dataclass(frozen=True)
class DrawnPart:
    """The drawn samples of one part.

    Attributes:
        samples: the asked columns of the samples with at least one copy, in row order.
        rows: their rows, int64 [n].
        copies: uint8 [n], ≥ 1.
    """

    samples: pa.Table
    rows: npt.NDArray[np.int64]
    copies: npt.NDArray[np.uint8]


def drawn_parts(plan: Plan, epoch: int, columns: Sequence[str], track: Track) -> Iterator[DrawnPart]:
    """The samples of an epoch less the removed ones, part by part. Leaves the slots of the epoch behind, for a draw of the next one.

    Args:
        plan: which plan.
        epoch: 0, 1, …
        columns: of the samples.
        track: shows progress.
    """
    removals = Removals.of(plan.catalog, plan.snapshot, track)
    with suppress(
        OSError, UserError
    ):  # a catalog that can only be read, or another draw at the same time: slower, and the same
        plan.keep_slots(plan.drawn_epoch(epoch))
    for part in tracked_parts(plan, track):
        copies = plan.draw(epoch, part.span) * removals.keeps(part.span)
        chosen = np.flatnonzero(copies)
        samples = plan.catalog.samples(part, columns).take(pa.array(chosen))
        yield DrawnPart(samples, part.first_row + chosen, copies[chosen])


@contextmanager
def nothing_removed_since(plan: Plan, before: str | None) -> Iterator[None]:
    """Keep others from removing samples, for as long as it takes to publish.

    Args:
        plan: whose samples.
        before: `Removals.id` when the export began.

    Raises:
        RemovedMeanwhileError: samples of the plan's snapshot were removed since.
    """
    with removing_or_publishing(plan.catalog):
        if Removals.of(plan.catalog, plan.snapshot).id != before:
            raise RemovedMeanwhileError
        yield


def tracked_parts(plan: Plan, track: Track) -> Iterable[Part]:
    """The parts of the plan's snapshot, with progress."""
    parts = plan.catalog.parts(plan.snapshot)
    return track(parts, "drawing", len(parts))
