"""The drawn samples of an epoch, part by part, in tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tailwise.catalog.catalog import Part
from tailwise.catalog.removals import Removals, removing_or_publishing
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.execution.base import KERNEL, Task, Worker
from tailwise.plan.plan import Plan

Item = TypeVar("Item")
Result = TypeVar("Result")
_REMOVED = "samples were removed from the catalog while they were being exported: run this command again"


class RemovedMeanwhileError(UserError):
    """Samples were removed during their export."""

    def __init__(self, message: str = _REMOVED) -> None:
        """Take the message: the error of a task is made again in the driver."""
        super().__init__(message)


@dataclass(frozen=True)
class DrawnPart:
    """The drawn samples of one part."""

    samples: pa.Table  # the requested columns of the samples with at least one copy, in row order
    rows: npt.NDArray[np.int64]  # their rows, int64 [n]
    copies: npt.NDArray[np.uint8]  # uint8 [n], ≥ 1


@dataclass(frozen=True)
class DrawnEpoch:
    """An epoch of a plan, without removed samples."""

    plan: Plan
    number: int
    removals: Removals

    def part(self, part: Part, columns: Sequence[str]) -> DrawnPart:
        """Return the drawn samples of a part. `columns` are those of the samples."""
        copies = self.plan.draw(self.number, part.span) * self.removals.keeps(part.span)
        chosen = np.flatnonzero(copies)
        samples = self.plan.catalog.samples(part, columns).take(pa.array(chosen))
        return DrawnPart(samples, part.first_row + chosen, copies[chosen])

    def rates(self, rows: slice) -> npt.NDArray[np.float64]:
        """Return the expected copies of rows, float64 [n]; 0 for removed ones."""
        return self.plan.rate(rows, self.number) * self.removals.keeps(rows)


@dataclass(frozen=True, eq=False)
class _OfEpoch(Task[Item, Result]):
    """Apply a function to an epoch and an item."""

    plan: Plan
    epoch: int
    removed: str | None  # `Removals.id` when the export began
    function: Callable[[DrawnEpoch, Item], Result]  # of a module, or a `partial` of one

    def run(self, item: Item, worker: Worker) -> Result:
        opened = worker.cached((self.plan.folder, self.plan.id, self.epoch, self.removed), self._open)
        return self.function(opened, item)

    def _open(self) -> DrawnEpoch:
        removals = Removals.of(self.plan.catalog, self.plan.snapshot)
        if removals.id != self.removed:
            raise RemovedMeanwhileError
        return DrawnEpoch(self.plan, self.epoch, removals)


def map_epoch(
    plan: Plan, epoch: int, function: Callable[[DrawnEpoch, Item], Result], items: Sequence[Item], context: Context
) -> Iterator[Result]:
    """Yield `function` of an epoch and of each item, in order. Workers open the plan; `function` is pickled.

    Raises:
        RemovedMeanwhileError: samples were removed meanwhile.
    """
    removed = Removals.of(plan.catalog, plan.snapshot, context.progress).id
    return context.map(_OfEpoch(plan, epoch, removed, function), items, "drawing", KERNEL)


def map_drawn(
    plan: Plan, epoch: int, function: Callable[[DrawnEpoch, Part], Result], context: Context
) -> Iterator[Result]:
    """Yield `function` of an epoch and of each part, in order. The plan keeps the slots of the epoch, for a draw of the next one."""
    # A catalog may be read-only, or another process may draw: draws are then slower, but the same.
    with suppress(OSError, UserError):
        plan.keep_slots(plan.drawn_epoch(epoch), context.executor)
    return map_epoch(plan, epoch, function, plan.catalog.parts(plan.snapshot), context)


@contextmanager
def nothing_removed_since(plan: Plan, before: str | None) -> Iterator[None]:
    """Prevent removals during a publication, or raise a RemovedMeanwhileError; `before` is `Removals.id` at the start of the export."""
    with removing_or_publishing(plan.catalog):
        if Removals.of(plan.catalog, plan.snapshot).id != before:
            raise RemovedMeanwhileError
        yield
