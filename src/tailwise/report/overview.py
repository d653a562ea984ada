"""The overview of the report: what the catalog holds, and what each plan does, in numbers and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tailwise.catalog.catalog import Catalog
from tailwise.catalog.drops import DropList
from tailwise.catalog.removals import Removals
from tailwise.plan.explain import BIN_NAMES, first_epoch
from tailwise.plan.plan import Plan
from tailwise.plan.quotas import UNITS
from tailwise.steps.upkeep.status import status


@dataclass(frozen=True)
class Fact:
    """One number of the overview: a label, the number as text, and a note."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A small table: a title, the heads of the columns, and rows of text; the first column is a name."""

    title: str
    heads: list[str]
    rows: list[list[str]]
    note: str = ""


def facts_of(catalog: Catalog, sizes: npt.NDArray[np.int64] | None, lists: Sequence[DropList]) -> list[Fact]:
    """Return the numbers of the pool; `sizes`, int64 [K], are those of the clusters."""
    snapshot = catalog.snapshot()
    facts = [Fact("samples", f"{snapshot.rows:,}", f"in {snapshot.shards:,} shards, snapshot {snapshot.number}")]
    if removed := len(Removals.of(catalog, snapshot).rows):
        facts.append(Fact("removed", f"{removed:,}", _share(removed, snapshot.rows)))
    for item in lists:
        dropped = int(item.manifest["summary"]["dropped"])
        facts.append(Fact(f"dropped by {item.name}", f"{dropped:,}", _share(dropped, snapshot.rows)))
    if sizes is not None and (sizes > 0).any():
        full = sizes[sizes > 0]
        facts.append(Fact("clusters", f"{len(full):,}", f"of {int(full.min()):,} to {int(full.max()):,} samples"))
    return facts


def rejected_table(catalog: Catalog) -> Table | None:
    """Return what steps could not use, by reason; None if there is nothing."""
    rows = [[str(item["reason"]), str(item["stage"]), f"{item['rows']:,}"] for item in status(catalog)["left out"]]
    return Table("What could not be used", ["reason", "step", "samples"], rows) if rows else None


def plans_table(plans: Sequence[Plan], samples_per_second: float | None) -> Table:
    """Return a line for each plan; `samples_per_second` is what the user's training reaches."""
    heads = ["plan", "method", "samples in an epoch", "share of pool", "different", "epochs until all are shown"]
    rows = []
    for plan in plans:
        first = first_epoch(plan)
        about = "" if plan.exact else "about "
        row = [
            plan.name,
            str(plan.config["method"]) + ("" if plan.dynamic else ", fixed"),
            f"{about}{first.total:,.0f}",
        ]
        row += [_share(first.total, plan.pool), f"{about}{first.unique:,.0f}", _full_coverage(plan)]
        if samples_per_second:
            row.append(f"{first.total / samples_per_second / 3600:,.4g}")
        rows.append(row)
    if samples_per_second:
        heads.append("GPU-hours an epoch")
    note = f"GPU-hours at {samples_per_second:,.6g} samples a second, as given." if samples_per_second else ""
    return Table("Plans", heads, rows, note)


def _full_coverage(plan: Plan) -> str:
    """Return after how many epochs all samples have been drawn that the plan may draw."""
    if not plan.dynamic:
        return f"never: the same {_share(first_epoch(plan).unique, plan.pool)} in each epoch"
    if plan.by_rate or not plan.exact or plan.annealed:
        return "not fixed: the draw is random" if not plan.exact else "not fixed: quotas change"
    full = (plan.sizes > 0) & (plan.quotas > 0)
    epochs = -(-plan.sizes[full] * UNITS // plan.quotas[full])
    never = int(plan.sizes[(plan.sizes > 0) & (plan.quotas == 0)].sum())
    return f"{int(epochs.max(initial=0)):,}" + (f", but for {never:,} samples" if never else "")


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
    heads = ["clusters", "number", "sizes", "share of the pool", *(f"in {plan.name}" for plan in plans)]
    rows = []
    for name, members in zip(BIN_NAMES, np.array_split(order, len(BIN_NAMES)), strict=True):
        inside = sizes[members]
        shares = [_share(inside.sum(), sizes.sum()), *(_share(quota[members].sum(), quota.sum()) for quota in quotas)]
        rows.append([name, f"{len(members):,}", f"{int(inside.max()):,} … {int(inside.min()):,}", *shares])
    note = "Each line is a fifth of the clusters, by size: head has the largest, tail the smallest."
    return Table("Head and tail, before and after", heads, rows, note)


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.3g} %" if whole else "–"
