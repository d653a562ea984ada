"""Unused drop lists: those that exist, and whose samples can be drawn all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tailwise.catalog.artifacts import find_manifest
from tailwise.catalog.catalog import Catalog, Part, Snapshot
from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.drops import DropList, Survivors
from tailwise.catalog.kinds import DROP_LIST, WITHOUT
from tailwise.catalog.removals import Removals
from tailwise.errors import UserError
from tailwise.plan.plan import Plan
from tailwise.steps.upkeep.excluded import ever_drawn, lists_of

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

    `survivors`: of all drop lists that are used. `inside`: part → which of its rows take part, bool [n].
    """
    removed = dropped = ungrouped = 0
    for part in parts:
        outside = ~inside(part)
        known, kept = survivors.removals.keeps(part.span), survivors.keeps(part.span)
        removed += int((outside & ~known).sum())
        dropped += int((outside & known & ~kept).sum())
        ungrouped += int((outside & kept).sum())
    return LeftOut(removed, dropped, ungrouped)


@dataclass(frozen=True)
class UnusedList:
    """A drop list that exists and is not used."""

    name: str  # of the list
    samples: int  # that it drops, of the snapshot in question
    drawable: int  # those of them that can still be drawn
    snapshot: int  # number of the snapshot that it was made for
    usable: bool  # whether this is the snapshot in question

    def note(self, where: str = "can still be drawn") -> str:
        """Return one line that says what is ignored (`where`: what happens to the samples), and how to use the list."""
        use = (
            f"leave them out with `without` {self.name}, in `tailwise cluster` or `tailwise plan`"
            if self.usable
            else f"the list is for snapshot {self.snapshot}: make one for the newest snapshot (dedup: `extends` {self.name})"
        )
        return f"note: drop list {self.name!r} is not used: {self.drawable:,} of its {self.samples:,} samples {where}; {use}"


def unused_lists(
    catalog: Catalog, snapshot: Snapshot, inputs: Iterable[Mapping[str, str]], inside: Inside
) -> list[UnusedList]:
    """Return the finished drop lists that are not used although they drop samples that take part.

    `inputs`: of the artifacts that may use lists, name → hash. `inside`: part → which of its rows take part, bool [n].
    """
    used = {name.removeprefix(WITHOUT) for names in inputs for name in names if name.startswith(WITHOUT)}
    lists = [DropList(catalog, name) for name in DROP_LIST.finished(catalog.folder) if name not in used]
    if not lists:
        return []
    totals, counts = np.zeros(len(lists), np.int64), np.zeros(len(lists), np.int64)
    for part in catalog.parts(snapshot):
        taking_part = inside(part)
        for at, item in enumerate(lists):
            mask = np.asarray(item.mask[part.span])  # shorter where the list is of an older snapshot
            totals[at] += int(mask.sum())
            counts[at] += int((mask & taking_part[: len(mask)]).sum())
    return [
        UnusedList(item.name, total, count, item.snapshot.number, item.snapshot.number == snapshot.number)
        for item, total, count in zip(lists, totals.tolist(), counts.tolist(), strict=True)
        if count
    ]


def left_out_of_plan(plan: Plan) -> LeftOut:
    """Count the samples of the pool that a plan cannot draw, by cause."""
    names = lists_of(plan)
    for name in names:
        find_manifest(plan.catalog.drops_folder(name))  # a damaged list is an error, a deleted one is not
    try:
        survivors = Survivors(plan.catalog, names, plan.snapshot)
    except UserError:  # a list was deleted since: its samples count as in no group
        survivors = Survivors(plan.catalog, (), plan.snapshot)
    return count_left_out(survivors, plan.catalog.parts(plan.snapshot), lambda part: plan.candidates(part.span))


def unused_by_plan(plan: Plan) -> list[UnusedList]:
    """Return the drop lists that a plan does not use although it can still draw samples of them.

    Lists that its clustering was made without count as used.
    """
    inputs = [plan.inputs]
    if (clustering := Clustering.find(plan.catalog, plan.clustering)) is not None:
        inputs.append(clustering.inputs)
    removals = Removals.of(plan.catalog, plan.snapshot)
    return unused_lists(
        plan.catalog, plan.snapshot, inputs, lambda part: ever_drawn(plan, part.span) & removals.keeps(part.span)
    )


def unused_by_clustering(catalog: Catalog, name: str) -> list[UnusedList]:
    """Return the drop lists that a clustering or grouping does not use although samples of them are in its groups.

    Lists that were made inside this clustering cannot be used by it, and are not among them.
    """
    clustering = Clustering.open(catalog, name)
    found = unused_lists(
        catalog, clustering.snapshot, [clustering.inputs], lambda part: np.asarray(clustering.labels.read(part) >= 0)
    )
    return [item for item in found if DropList(catalog, item.name).clustering != name]
