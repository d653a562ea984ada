"""Mixtures: a given share of an epoch from each group, inside of which every sample is alike, or another plan decides."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.clusterings import Clustering
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.execution.base import Worker
from tailwise.plan.plan import Plan
from tailwise.plan.quotas import UNIT_BITS, UNITS, fill_by_scale, round_to_sum
from tailwise.requests import PlanRequest, numbers_of, refuse_given
from tailwise.steps.grouping.write import SOURCE
from tailwise.steps.planning.apart import Apart, Rates
from tailwise.steps.planning.cells import tally, write_cells
from tailwise.steps.planning.grouping import mixture_figures, shares_of_groups
from tailwise.steps.planning.weighted import (
    draw_of,
    make_weighted_plan,
    max_repeats_of,
    write_shard_offsets,
)
from tailwise.storage.delimited import parse_json, read_text
from tailwise.text import command_line

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
_OF_DECIDES = {"keep", "budget", "without", "pick", "score", "score_file"}


def make_mixture(catalog: Catalog, name: str, request: PlanRequest, context: Context | None = None) -> Plan:
    """Make a plan that takes a given share of each epoch from each group of a grouping (METHODS: mixtures).

    A group gives q_g = min(R · n_g, s · share_g) samples, with the one s that meets the budget: what a group cannot give is dealt
    to the others in proportion to their shares. Samples of groups without a share are never drawn. With `of`, the rates of that plan are
    rescaled inside each group; its budget is kept.

    Raises:
        UserError: shares are not numbers above 0 or name no group, there is no such grouping or plan, or the groups can't give the budget.
    """
    context = context or Context()
    max_repeats_of(request)
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
            shares = parse_json(read_text(given), unique=True)
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
    greatest = max(shares.values())  # divided by first, as the sum of huge numbers is infinite
    total = math.fsum(share / greatest for share in shares.values())
    return {str(name): share / greatest / total for name, share in sorted(shares.items())}


@dataclass(frozen=True, eq=False)
class _Scaled:
    """The rates of a plan, scaled in each group."""

    rates: Rates
    scales: Floats  # float64 [G]
    most: int

    def read(self, part: Part, worker: Worker) -> tuple[npt.NDArray[np.int32], Floats]:
        """Return group and rate of each row of a part: see `Rated`."""
        groups, rates = self.rates.read(part, worker)
        return groups, np.where(groups >= 0, np.minimum(rates * self.scales[groups], self.most), 0.0)


def _make_mixture_of(
    catalog: Catalog, name: str, request: PlanRequest, shares: Mapping[str, float], context: Context
) -> Plan:
    made = Apart(catalog, request, context, drawn=True)
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
            cells = tally(scaled, made.parts, context)
            sizes = write_cells(artifact, scaled, cells, quotas, made.most, bits, made.parts, context)
            write_shard_offsets(catalog, artifact, made.of.snapshot)
            figures = {"eligible": int(sizes.sum()), "clusters": len(sizes)}
            mixed = mixture_figures(made.clustering, share[:-1], made.sizes[:-1], quotas[:-1])
            artifact.finish({**made.figures, **figures, "mixture": mixed})
    return Plan(catalog, name)


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
