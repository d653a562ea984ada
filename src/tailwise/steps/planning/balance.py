"""MetaCLIP's text balancing (arXiv 2309.16671): a rate per row, from the entries that stand in its caption (reduce, then map)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tailwise.catalog import layout
from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.catalog import Catalog, Part, Snapshot
from tailwise.catalog.columns import PlainColumn
from tailwise.catalog.concepts import Concepts
from tailwise.catalog.drops import Survivors
from tailwise.catalog.files import write_table
from tailwise.catalog.kinds import LISTED
from tailwise.catalog.matches import Matches
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.execution.base import KERNEL, Fill, Worker
from tailwise.kernels.matching import keep_rates
from tailwise.plan.plan import Plan
from tailwise.plan.quotas import UNITS, samples_of_share
from tailwise.requests import PlanRequest, refuse_given
from tailwise.steps.grouping.match import MatchedPool, match_entries
from tailwise.steps.planning.grouping import Rows
from tailwise.steps.planning.weighted import write_shard_offsets


def make_balanced_plan(catalog: Catalog, name: str, request: PlanRequest, context: Context | None = None) -> Plan:
    """Make a plan that thins frequent entries: each of a caption's entries is drawn with probability min(1, t / its count).

    A sample is kept if at least one of its entries is drawn: with probability 1 − Π (1 − p). Samples without an entry never are.
    An entry's count is the number of captions that it stands in, among those that drop lists and removals leave.

    `request`: `entries` that captions hold, or `concepts` that samples have; `per_entry` is t, 20,000 for 400M samples in the paper; from
    `keep` or `budget`, the expected number of samples, t follows.

    Raises:
        UserError: the list can't be read, no caption holds an entry, or the request is out of bounds.
    """
    context = context or Context()
    if (request.entries is None) == (request.concepts is None):
        raise UserError(
            "method 'text-balance' needs `entries`, a list of entries, or `concepts`, the name of lists of concepts"
        )
    if request.concepts is not None:
        refuse_given(request, {"ignore_case", "plurals"}, "with `concepts`")
    per_entry, keep, budget, without = request.per_entry, request.keep, request.budget, request.without
    snapshot = catalog.snapshot()
    survivors = Survivors(catalog, without, snapshot)
    _check(per_entry, keep, budget, survivors.pool)
    config = {
        "method": "text-balance",
        "per_entry": per_entry,
        "keep": keep,
        "budget": budget,
        **({"ignore_case": request.ignore_case} if request.entries is not None else {}),
        "without": list(without),
        "snapshot": snapshot.number,
        "dynamic": request.dynamic is True,
        "draw": "bernoulli",
        "seed": request.seed,
    } | ({"plurals": True} if request.plurals else {})
    found = _lists(catalog, request, snapshot, context)
    made_of = {LISTED + found.name: found.id} if isinstance(found, Concepts) else found.inputs
    inputs = {"snapshot": snapshot.id, **made_of, **survivors.inputs}
    derived = {"budget": max(1, round(keep * survivors.pool))} if keep is not None else None
    with Artifact(catalog.plan_folder(name), "plan", config, inputs, derived) as artifact:
        if not artifact.done:
            pool = MatchedPool(catalog, snapshot, survivors, found)
            counts, matched = pool.count()
            limit = float(per_entry) if per_entry is not None else _find_limit(pool, counts, matched, keep, budget)
            rows = Rows(catalog.folder, snapshot.number, tuple(without), tuple(inputs.items()))
            column = PlainColumn(artifact.folder, layout.RATE)
            read = Matches(found.folder, "", {}) if isinstance(found, Matches) else found  # without the spellings
            rate = Fill(column, partial(_rates, rows, read, _probability(counts, limit)))
            figures = _write_rates(rate, catalog.parts(snapshot), context)
            _write_entries(artifact, found.entries, counts, limit)
            write_shard_offsets(catalog, artifact, snapshot)
            artifact.finish(
                {
                    **figures,
                    "pool": survivors.pool,
                    "per_entry": limit,
                    "matched": matched,
                    "entries": len(counts),
                    "entries_without_match": int((counts == 0).sum()),
                    "entries_thinned": int((counts > limit).sum()),
                }
            )
    return Plan(catalog, name)


def _lists(catalog: Catalog, request: PlanRequest, snapshot: Snapshot, context: Context) -> Matches | Concepts:
    """Return the entries of each caption, or the concepts of each sample."""
    if request.entries is None:
        concepts = Concepts(catalog, str(request.concepts))
        concepts.check_covers(snapshot)
        return concepts
    return match_entries(
        catalog,
        request.entries,
        ignore_case=request.ignore_case,
        plurals=request.plurals,
        snapshot=snapshot,
        context=context,
    )


def _check(per_entry: int | None, keep: float | None, budget: int | None, pool: int) -> None:
    if [per_entry, keep, budget].count(None) != 2:
        raise UserError(
            "give one of `per_entry` SAMPLES (MetaCLIP: 20000 for 400M samples), `keep` SHARE and `budget` SAMPLES"
        )
    if per_entry is not None and per_entry < 1:
        raise UserError(f"`per_entry` {per_entry}: must be at least 1")
    if keep is not None and not 0 < keep <= 1:
        raise UserError(f"`keep` {keep}: must be above 0 and at most 1")
    if budget is not None and not 1 <= budget <= pool:
        raise UserError(f"`budget` {budget:,}: must lie between 1 and the {pool:,} samples of the pool")


def _expected(pool: MatchedPool, probability: npt.NDArray[np.float64]) -> int:
    """The expected number of samples in units of 2⁻³⁰, so that its sum is exact."""
    sums = (np.rint(keep_rates(*found, probability) * UNITS).astype(np.int64).sum() for _, found in pool.parts())
    return sum(map(int, sums))


def _probability(counts: npt.NDArray[np.int64], limit: float) -> npt.NDArray[np.float64]:
    """Of each entry: min(1, limit / count)."""
    return np.minimum(1.0, limit / np.maximum(counts, 1))


def _find_limit(
    pool: MatchedPool, counts: npt.NDArray[np.int64], matched: int, keep: float | None, budget: int | None
) -> float:
    """The t with which the expected number is the budget, to within half a sample."""
    if keep is not None:
        limit = f"{matched:,} have a caption that holds an entry, and are not dropped"
        wanted = samples_of_share(keep, pool.survivors.pool, matched, limit)
    else:
        wanted = budget or 0
    if not 1 <= wanted <= matched:
        raise UserError(
            f"a budget of {wanted:,} samples: must lie between 1 and the {matched:,} whose captions hold an entry; "
            "see `keep` and `budget`"
        )
    most = float(counts.max())
    if wanted == matched:
        return most
    return solve_increasing(
        lambda limit: (_expected(pool, _probability(counts, limit)) / UNITS) - wanted, most, matched - wanted, -wanted
    )


def solve_increasing(excess: Callable[[float], float], high: float, above: float, below: float) -> float:
    """Where an increasing function on [0, high] is within ½ of 0, by the Illinois method: false position that never sticks to one end.

    Args:
        excess: the function; costly.
        high: the right end.
        above: its value there, above 0.
        below: its value at 0, below 0.
    """
    low, last = 0.0, 0.0
    while True:
        middle = high - above * (high - low) / (above - below)
        if not low < middle < high:
            return high
        value = excess(middle)
        if abs(value) <= 0.5:
            return middle
        again = value * last > 0  # the same end moved twice: the other's value counts half
        if value < 0:
            low, below, above = middle, value, above / 2 if again else above
        else:
            high, above, below = middle, value, below / 2 if again else below
        last = value


def _rates(
    rows: Rows, lists: Matches | Concepts, probability: npt.NDArray[np.float64], part: Part, worker: Worker
) -> npt.NDArray[np.float32]:
    """Return the rate of each row of a part, by the probability of each entry, float64 [entries]."""
    found = lists.part(part, rows.open(worker)[0].keeps(part.span))
    return keep_rates(*found, probability).astype(np.float32)


def _write_rates(rate: Fill, parts: Sequence[Part], context: Context) -> dict[str, Any]:
    """Write the rates; return how many rows can be drawn, and how many samples are expected."""
    context.run(rate, parts, "rates of rows", KERNEL)
    eligible, expected = 0, 0.0
    for rates in map(rate.column.read, parts):
        eligible += int(np.count_nonzero(rates))
        expected += float(rates.sum(dtype=np.float64))
    return {"eligible": eligible, "expected": expected}


def _write_entries(artifact: Artifact, entries: list[str], counts: npt.NDArray[np.int64], limit: float) -> None:
    """The distribution over the list: entry, count, and the probability that it is drawn for one of its captions."""
    columns = {
        "entry": pa.array(entries, pa.string()),
        "count": pa.array(counts, pa.int64()),
        "probability": pa.array(_probability(counts, limit), pa.float64()),
    }
    write_table(artifact.path(layout.ENTRY_TABLE), pa.table(columns))
