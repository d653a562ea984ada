"""The overview of the report: what the catalog holds, and what each plan does, in numbers and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tailwise.catalog.catalog import Catalog
from tailwise.catalog.drops import DropList
from tailwise.catalog.removals import Removals
from tailwise.plan.explain import BIN_NAMES, explain, first_epoch
from tailwise.plan.plan import MAX_EPOCH, Plan
from tailwise.plan.quotas import UNITS
from tailwise.steps.upkeep.status import left_out

COUNTS = 5_000_000  # of clusters and epochs, that are looked at for an exact number: seconds


@dataclass(frozen=True)
class Fact:
    """One number of the overview: a label, the number as text, and a note."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A small table: a title, the heads of the columns, and rows of text; the first column is a name.

    Columns from `bars` on are percentages, shown with a bar; the first of these is the pool's.
    """

    title: str
    heads: list[str]
    rows: list[list[str]]
    note: str = ""
    bars: int | None = None


def facts_of(catalog: Catalog, sizes: npt.NDArray[np.int64] | None, lists: Sequence[DropList]) -> list[Fact]:
    """Return the numbers of the pool; `sizes`, int64 [K], are those of the clusters."""
    snapshot = catalog.snapshot()
    facts = [Fact("samples", f"{snapshot.rows:,}", f"in {snapshot.shards:,} shards, snapshot {snapshot.number}")]
    if removed := len(Removals.of(catalog, snapshot).rows):
        facts.append(Fact("removed", f"{removed:,}", f"{_share(removed, snapshot.rows)} of the pool"))
    for item in lists:
        dropped = int(item.manifest["summary"]["dropped"])
        facts.append(Fact(f"dropped: {item.name}", f"{dropped:,}", f"{_share(dropped, snapshot.rows)} of the pool"))
    if sizes is not None and (sizes > 0).any():
        full = sizes[sizes > 0]
        facts.append(Fact("clusters", f"{len(full):,}", f"{int(full.min()):,} to {int(full.max()):,} samples each"))
    return facts


def rejected_table(catalog: Catalog) -> Table | None:
    """Return what steps could not use, by reason; None if there is nothing."""
    rows = [[str(item["reason"]), str(item["stage"]), f"{item['rows']:,}"] for item in left_out(catalog)]
    return Table("What could not be used", ["reason", "step", "samples"], rows) if rows else None


def plans_table(plans: Sequence[Plan], samples_per_second: float | None) -> Table:
    """Return a line for each plan; `samples_per_second` is what the user's training reaches."""
    heads = ["plan", "samples in an epoch", "of the pool", "different samples", "epochs until all are shown"]
    rows = []
    for plan in plans:
        first, method = first_epoch(plan), str(plan.config["method"])
        about = "" if plan.sizes_known else "about "
        row = [plan.name if method == plan.name else f"{plan.name} ({method})", f"{about}{first.total:,.0f}"]
        row += [_share(first.total, plan.pool), f"{about}{first.unique:,.0f}", _full_coverage(plan)]
        if samples_per_second:
            hours = first.total / samples_per_second / 3600
            row.append(f"{hours:,.1f}" if hours >= 10 else f"{hours:.2g}")
        rows.append(row)
    note = ""
    if samples_per_second:
        heads.append("GPU-hours an epoch")
        note = f"GPU-hours are for {samples_per_second:,.6g} samples a second."
    return Table("What each plan draws", heads, rows, note)


def _full_coverage(plan: Plan) -> str:
    """Return after how many epochs all samples have been drawn that the plan may draw, and how many of the pool it may not."""
    if not plan.dynamic:
        unique = first_epoch(plan).unique
        return "1" if unique >= plan.pool else "never: one fixed subset"
    if plan.by_rate or not plan.exact or plan.annealed:
        return "not fixed: the draw is random" if not plan.exact else "not fixed: quotas change"
    full = (plan.sizes > 0) & (plan.quotas > 0)
    most = int((-(-plan.sizes[full] * UNITS // plan.quotas[full])).max(initial=0))
    shown = f"at most {most:,}"
    if 0 < most * len(plan.sizes) <= COUNTS and most <= MAX_EPOCH:  # rounding of the counts can end it earlier
        covered = [each.covered for each in explain(plan, most).epochs]
        shown = f"{covered.index(covered[-1]) + 1:,}"
    never = plan.pool - int(plan.sizes[full].sum())
    return shown + (f", but for {never:,} samples" if never else "")


def tail_table(sizes: npt.NDArray[np.int64], quotas: npt.NDArray[np.float64], plans: Sequence[Plan]) -> Table | None:
    """Return the share of each fifth of the clusters, by size, in the pool and in an epoch of each plan.

    Args:
        sizes: int64 [K], members.
        quotas: float64 [P, K], samples in an epoch.
        plans: P plans.
    """
    order = np.argsort(-sizes, kind="stable")
    order = order[sizes[order] > 0]
    if len(order) < len(BIN_NAMES) or not plans:
        return None
    rows = []
    for name, members in zip(BIN_NAMES, np.array_split(order, len(BIN_NAMES)), strict=True):
        inside = sizes[members]
        label = f"{name}: {len(members):,} clusters of {int(inside.min()):,} to {int(inside.max()):,}"
        shares = [_share(inside.sum(), sizes.sum()), *(_share(quota[members].sum(), quota.sum()) for quota in quotas)]
        rows.append([label, *shares])
    note = "Shares of the samples in clusters. Each line is a fifth of the clusters: head has the largest, tail the smallest."
    heads = ["clusters", "pool", *(f"plan {plan.name}" for plan in plans)]
    return Table("Head and tail, before and after", heads, rows, note, bars=1)


def _share(part: float, whole: float) -> str:
    if not whole:
        return "–"
    percent = 100 * float(part) / float(whole)
    return f"{percent:.2g} %" if 0 < percent < 0.1 else f"{percent:.1f} %"
