"""Mixtures: a given share of an epoch from each group, inside of which every sample is alike, or another plan decides."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.catalog import layout
from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.columns import PartColumn, PlainColumn
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.execution.base import KERNEL, Task, Worker
from tailwise.plan.plan import Plan
from tailwise.plan.quotas import UNIT_BITS, UNITS, fill_by_scale, round_to_sum
from tailwise.requests import PlanRequest, numbers_of, refuse_given
from tailwise.steps.grouping.sources import SOURCE
from tailwise.steps.planning.apart import Apart, Rates
from tailwise.steps.planning.capped import RATE_BITS, merged_rates
from tailwise.steps.planning.grouping import OUTSIDE, mixture_figures, shares_of_groups
from tailwise.steps.planning.weighted import (
    check_max_repeats,
    draw_of,
    make_weighted_plan,
    write_groups,
    write_shard_offsets,
)
from tailwise.steps.ranks import write_appearance_ranks
from tailwise.text import command_line

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
_OF_DECIDES = {"keep", "budget", "without", "pick", "score", "score_file"}
_KEY_BITS = 32 - RATE_BITS


def make_mixture(catalog: Catalog, name: str, request: PlanRequest, context: Context | None = None) -> Plan:
    """Make a plan that takes a given share of each epoch from each group of a grouping (METHODS: mixtures).

    A group gives q_g = min(R · n_g, s · share_g) samples, with the one s that meets the budget: what a group cannot give is dealt
    to the others in proportion to their shares. Samples of groups without a share are never drawn. With `of`, the rates of that plan are
    rescaled inside each group; its budget is kept.

    Raises:
        UserError: shares are not numbers above 0 or name no group, there is no such grouping or plan, or the groups can't give the budget.
    """
    context = context or Context()
    check_max_repeats(request)
    shares = read_shares(request.shares)
    clustering = request.clustering or SOURCE
    Clustering.open(catalog, clustering, f"make it with {command_line('group', catalog.folder, by=clustering)}")
    request = replace(request, clustering=clustering)
    if request.of is None:
        return make_weighted_plan(catalog, name, request, context, shares)
    refuse_given(request, _OF_DECIDES, f"with `of`: plan {request.of!r} decides it")
    return _make_mixture_of(catalog, name, request, shares, context)


def read_shares(given: str | Mapping[str, float] | None) -> dict[str, float]:
    """Return the share of each named group; they sum to 1.

    Args:
        given: a mapping, a text such as laion=0.6,cc12m=0.4, or the path of a .json file of {name: share}; only their ratios count.

    Raises:
        UserError: there are none, the file can't be read, or a share is no finite number above 0.
    """
    if not given:
        raise UserError("method 'mixture' needs `shares`, such as laion=0.6,cc12m=0.4, or a .json file of them")
    shares: Any = given
    if isinstance(given, str) and given.endswith(".json"):
        try:
            shares = json.loads(Path(given).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"`shares` {given} can't be read as JSON: {error}") from error
    elif isinstance(given, str):
        shares = numbers_of("shares", given.split(","))
    sound = isinstance(shares, Mapping) and all(
        isinstance(share, int | float) and not isinstance(share, bool) and 0 < share < math.inf
        for share in shares.values()
    )
    if not sound or not shares:
        raise UserError(f"`shares` {given}: give names of groups and numbers above 0, such as laion=0.6,cc12m=0.4")
    total = math.fsum(shares.values())
    return {str(name): share / total for name, share in sorted(shares.items())}


@dataclass(frozen=True, eq=False)
class _Scaled:
    """The rates of a plan, scaled in each group; rows of equal group and about equal rate are a cell."""

    rates: Rates
    scales: Floats  # float64 [G]
    most: int

    def read(self, part: Part, worker: Worker) -> tuple[Integers, Floats]:
        """Return the cell of each row of a part, OUTSIDE for rows that are never drawn, and its rate: int64 and float64 [n]."""
        groups, rates = self.rates.read(part, worker)
        scaled = np.where(groups >= 0, np.minimum(rates * self.scales[groups], self.most), 0.0)
        bits = scaled.astype(np.float32).view(np.int32) >> RATE_BITS
        return np.where(scaled > 0, (groups.astype(np.int64) << _KEY_BITS) | bits, OUTSIDE), scaled


@dataclass(frozen=True, eq=False)
class _Tally(Task[Part, Integers]):
    """Count the rows of each cell, and sum their rates in units of 2⁻³⁰: int64 [C, 3], ascending by cell."""

    scaled: _Scaled

    def run(self, item: Part, worker: Worker) -> Integers:
        cells, rates = self.scaled.read(item, worker)
        inside = cells >= 0
        units = np.rint(rates[inside] * UNITS).astype(np.int64)
        return _merged(np.stack([cells[inside], np.ones(len(units), np.int64), units], axis=1))


def _merged(rows: Integers) -> Integers:
    keys, places = np.unique(rows[:, 0], return_inverse=True)
    merged = np.zeros((len(keys), 3), np.int64)
    np.add.at(merged, places, rows)
    merged[:, 0] = keys
    return merged


def _merge(first: Integers, second: Integers) -> Integers:
    return _merged(np.concatenate([first, second]))


@dataclass(frozen=True, eq=False)
class _WriteGroups(Task[Part, None]):
    """Write the group of each row."""

    scaled: _Scaled
    keys: Integers  # int64 [C], the cells, ascending
    groups: Integers  # int64 [C], group of each cell
    column: PartColumn

    def files(self, item: Part) -> Sequence[Path]:
        return (self.column.path(item),)

    def run(self, item: Part, worker: Worker) -> None:
        cells, _ = self.scaled.read(item, worker)
        groups = np.full(item.rows, OUTSIDE, np.int32)
        groups[cells >= 0] = self.groups[np.searchsorted(self.keys, cells[cells >= 0])]
        self.column.write(item, groups)


def _make_mixture_of(
    catalog: Catalog, name: str, request: PlanRequest, shares: Mapping[str, float], context: Context
) -> Plan:
    made = Apart(catalog, request, context, positive=True)
    draw = draw_of(request, "random")
    config = {**made.config, "shares": dict(shares), "draw": draw, "rate_groups": True}
    share = np.append(shares_of_groups(made.clustering, shares), 0.0)
    bits = 0 if not config["dynamic"] and draw != "bernoulli" else UNIT_BITS
    budget = round(int(made.units.sum()) / UNITS)
    quotas = _quotas(made, share, budget, bits)
    with Artifact(catalog.plan_folder(name), "plan", config, made.inputs, {"budget": budget}) as artifact:
        if not artifact.done:
            made.rescale(quotas.astype(np.float64))
            scaled = _Scaled(made.rates, made.scales, made.most)
            cells = context.executor.reduce(_Tally(scaled), made.parts, _merge, KERNEL)
            groups, sizes, shown = _groups_of_cells(cells, quotas, made.most, bits)
            write_groups(artifact, sizes, shown[None])
            column, ranks = (PlainColumn(artifact.folder, each) for each in (layout.GROUP, layout.RANK))
            context.run(_WriteGroups(scaled, cells[:, 0], groups, column), made.parts, "groups of rows", KERNEL)
            write_appearance_ranks(column, ranks, len(sizes), made.parts, context)
            write_shard_offsets(catalog, artifact, made.of.snapshot)
            figures = {"eligible": int(sizes.sum()), "clusters": len(sizes)}
            mixed = mixture_figures(made.clustering, share[:-1], made.sizes[:-1], quotas[:-1])
            artifact.finish({**made.figures, **figures, "mixture": mixed})
    return Plan(catalog, name)


def _groups_of_cells(cells: Integers, quotas: Integers, most: int, bits: int) -> tuple[Integers, Integers, Integers]:
    """Return the group of each cell, int64 [C], and the sizes and quotas (in units of 2⁻³⁰ samples) of groups, int64 [K].

    Args:
        cells: of `_Tally`, int64 [C, 3].
        quotas: of the groups of the mixture, int64 [G], in units of 2⁻³⁰ samples.
        most: greatest number of copies of a sample.
        bits: of a sample that quotas keep: 0 for whole samples, UNIT_BITS for all.
    """
    owner = cells[:, 0] >> _KEY_BITS
    numbers, sizes, shares = np.empty(len(cells), np.int64), [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    first = 0
    for group in np.unique(owner).tolist():
        mine = owner == group
        inner = merged_rates(cells[mine, 2] / UNITS)
        count = int(inner.max()) + 1
        size, units = np.zeros((2, count), np.int64)
        np.add.at(size, inner, cells[mine, 1])
        np.add.at(units, inner, cells[mine, 2])
        whole, unit = int(quotas[group]) >> (UNIT_BITS - bits), float(1 << (UNIT_BITS - bits))
        upper = np.minimum(size * most << bits, whole)
        shares.append(round_to_sum(units / unit, whole, np.zeros_like(upper), upper, size) << (UNIT_BITS - bits))
        sizes.append(size)
        numbers[mine] = first + inner
        first += count
    return numbers, np.concatenate(sizes), np.concatenate(shares)


def _quotas(made: Apart, share: Floats, budget: int, bits: int) -> Integers:
    """Return the quota of each group in units of 2⁻³⁰ samples: int64 [G]."""
    named = (share > 0) & (made.sizes > 0)
    upper = np.minimum(made.sizes[named] * made.most, budget)
    if int((made.sizes[named] * made.most).sum()) < budget:
        raise UserError(
            f"the groups of `shares` can give {int(upper.sum()):,} samples of the {budget:,} of plan {made.of.name!r}, up to "
            f"{made.most} times an epoch: raise `max_repeats`, or use a plan of a smaller budget"
        )
    quotas = np.zeros(len(share), np.int64)
    filled = fill_by_scale(share[named], np.zeros(len(upper)), upper.astype(np.float64), budget)
    rounded = round_to_sum(
        filled * float(1 << bits), budget << bits, np.zeros_like(upper), upper << bits, made.sizes[named]
    )
    quotas[named] = rounded << (UNIT_BITS - bits)
    return quotas
