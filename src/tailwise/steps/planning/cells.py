"""Groups of rows of nearly equal rates, so that `stream` draws exact counts of a plan that has a rate per row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tailwise.catalog import layout
from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.catalog import Part
from tailwise.catalog.columns import PlainColumn
from tailwise.context import Context
from tailwise.execution.base import KERNEL, Fill, WithWorker, Worker
from tailwise.plan.quotas import UNIT_BITS, UNITS, round_to_sum
from tailwise.steps.planning.grouping import OUTSIDE
from tailwise.steps.planning.weighted import write_groups
from tailwise.steps.ranks import write_appearance_ranks

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

RATE_BITS = 12  # of a float32 rate that groups leave out: rates in 0.05 % of each other are one group
LEAST_QUOTA = 32.0  # samples; smaller groups are merged
_KEY_BITS = 32 - RATE_BITS


class Rated(Protocol):
    """Rows with rates."""

    def read(self, part: Part, worker: Worker) -> tuple[npt.NDArray[np.int32], Floats]:
        """Return the group of each row of a part, int32 [n], OUTSIDE for none, and its rate, float64 [n]; 0 for rows never drawn."""


def _cells(groups: npt.NDArray[np.int32], rates: Floats) -> Integers:
    """Return the cell of each row: rows of equal group and about equal rate; OUTSIDE for rows that are never drawn: int64 [n]."""
    bits = rates.astype(np.float32).view(np.int32) >> RATE_BITS
    return np.where((groups >= 0) & (rates > 0), (groups.astype(np.int64) << _KEY_BITS) | bits, OUTSIDE)


def _tally(source: Rated, part: Part, worker: Worker) -> Integers:
    """Count the rows of each cell, and sum their rates in units of 2⁻³⁰: int64 [C, 3], ascending by cell."""
    groups, rates = source.read(part, worker)
    cells = _cells(groups, rates)
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


def _groups(source: Rated, keys: Integers, of_cell: Integers, part: Part, worker: Worker) -> npt.NDArray[np.int32]:
    """Return the group of each row of a part, by the cells, int64 [C], ascending, and the group of each, int64 [C]."""
    cells = _cells(*source.read(part, worker))
    groups = np.full(part.rows, OUTSIDE, np.int32)
    groups[cells >= 0] = of_cell[np.searchsorted(keys, cells[cells >= 0])]
    return groups


def tally(source: Rated, parts: Sequence[Part], context: Context) -> Integers:
    """Return the cells of all rows: number, rows, and sum of rates in units of 2⁻³⁰, int64 [C, 3], ascending."""
    return context.executor.reduce(WithWorker(partial(_tally, source)), parts, _merge, KERNEL)


def write_cells(
    artifact: Artifact,
    source: Rated,
    cells: Integers,
    quotas: Integers,
    most: int,
    bits: int,
    parts: Sequence[Part],
    context: Context,
) -> Integers:
    """Write the table, the groups and the ranks of a plan by cells; return the sizes of its groups, int64 [K].

    Args:
        artifact: the plan.
        source: its rows.
        cells: see `tally`.
        quotas: see `groups_of_cells`, as the next two.
        most: greatest number of copies of a sample.
        bits: of a sample that quotas keep.
        parts: of the snapshot.
        context: runs the tasks and shows progress.
    """
    groups, sizes, shares = groups_of_cells(cells, quotas, most, bits)
    write_groups(artifact, sizes, shares[None])
    column, ranks = (PlainColumn(artifact.folder, each) for each in (layout.GROUP, layout.RANK))
    context.run(Fill(column, partial(_groups, source, cells[:, 0], groups)), parts, "groups of rows", KERNEL)
    write_appearance_ranks(column, ranks, len(sizes), parts, context)
    return sizes


def merged_rates(quotas: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Return the group of each of K rates: int64 [K]. Rates that stand for few samples are merged with the next higher ones.

    Counts of groups are rounded. With groups of one sample, rounding would draw high rates always and low rates never.

    `quotas`: float64 [K], expected samples of each rate, by ascending rate.
    """
    numbers, number, total = np.empty(len(quotas), np.int64), -1, math.inf
    for at, quota in enumerate(quotas.tolist()):
        if max(total, quota) >= LEAST_QUOTA:
            number, total = number + 1, 0.0
        numbers[at] = number
        total += quota
    return numbers


def groups_of_cells(cells: Integers, quotas: Integers, most: int, bits: int) -> tuple[Integers, Integers, Integers]:
    """Return the group of each cell, int64 [C], and the sizes and quotas (in units of 2⁻³⁰ samples) of groups, int64 [K].

    Args:
        cells: see `tally`, int64 [C, 3].
        quotas: of the groups of rows, int64 [G], in units of 2⁻³⁰ samples.
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
