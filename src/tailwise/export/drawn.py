"""The drawn samples of an epoch, part by part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tailwise.catalog.catalog import Part
from tailwise.catalog.removals import Removals, removing_or_publishing
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.plan.plan import Plan


class RemovedMeanwhileError(UserError):
    """Samples were removed during their export."""

    def __init__(self) -> None:
        """Make the message, with the remedy."""
        super().__init__("samples were removed from the catalog while they were being exported: run this command again")


@dataclass(frozen=True)
class DrawnPart:
    """The drawn samples of one part."""

    samples: pa.Table  # the requested columns of the samples with at least one copy, in row order
    rows: npt.NDArray[np.int64]  # their rows, int64 [n]
    copies: npt.NDArray[np.uint8]  # uint8 [n], ≥ 1


def drawn_parts(plan: Plan, epoch: int, columns: Sequence[str], context: Context) -> Iterator[DrawnPart]:
    """Yield the drawn samples of an epoch without removed ones, part by part.

    The plan keeps the slots of the epoch, for a draw of the next one. `columns` are those of the samples.
    """
    removals = Removals.of(plan.catalog, plan.snapshot, context.progress)
    # A catalog may be read-only, or another process may draw: draws are then slower, but the same.
    with suppress(OSError, UserError):
        plan.keep_slots(plan.drawn_epoch(epoch))
    for part in tracked_parts(plan, context):
        copies = plan.draw(epoch, part.span) * removals.keeps(part.span)
        chosen = np.flatnonzero(copies)
        samples = plan.catalog.samples(part, columns).take(pa.array(chosen))
        yield DrawnPart(samples, part.first_row + chosen, copies[chosen])


@contextmanager
def nothing_removed_since(plan: Plan, before: str | None) -> Iterator[None]:
    """Prevent removals during a publication, or raise a RemovedMeanwhileError; `before` is `Removals.id` at the start of the export."""
    with removing_or_publishing(plan.catalog):
        if Removals.of(plan.catalog, plan.snapshot).id != before:
            raise RemovedMeanwhileError
        yield


def tracked_parts(plan: Plan, context: Context) -> Iterable[Part]:
    """Return the parts of the plan's snapshot, with progress."""
    parts = plan.catalog.parts(plan.snapshot)
    return context.progress(parts, "drawing", len(parts))
