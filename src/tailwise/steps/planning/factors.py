"""open_clip's upsampling factors as a mixture: each factor multiplies how often the samples of a source are drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from braceexpand import braceexpand

from tailwise.catalog.catalog import true_path
from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.kinds import PLAN
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.plan.plan import Plan
from tailwise.plan.quotas import UNITS
from tailwise.requests import GroupRequest, PlanRequest
from tailwise.steps.grouping.group import group
from tailwise.steps.grouping.write import SOURCE, sources_of
from tailwise.steps.planning.apart import most_copies, refuse_annealed
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.planning.weighted import MAX_REPEATS
from tailwise.text import command_line


@dataclass(frozen=True)
class FactorMixture:
    """The mixture that open_clip's factors stand for."""

    of: Plan  # the plan that the factors change
    name: str  # name of the mixture's plan
    request: PlanRequest  # of the mixture's plan
    factors: Mapping[str, float]  # factor of each source

    @property
    def finished(self) -> bool:
        """True if the plan is there."""
        return self.name in PLAN.finished(self.of.catalog.folder)

    @property
    def command(self) -> str:
        """The command that makes the plan; `tailwise group CATALOG --by source` comes before."""
        shares: Any = self.request.shares
        options = {"method": "mixture", "of": self.of.name, "max-repeats": self.request.max_repeats}
        options |= {"clustering": self.request.clustering} if self.request.clustering != SOURCE else {}
        given = ",".join(f"{name}={share:g}" for name, share in shares.items())
        return command_line("plan", self.of.catalog.folder, self.name, **options, shares=given)

    def make(self, context: Context | None = None) -> Plan:
        """Make the grouping by source and the plan, or open the finished ones."""
        group(self.of.catalog, GroupRequest(SOURCE, name=self.request.clustering), context)
        return make_plan(self.of.catalog, self.name, self.request, context)


def mixture_of_factors(plan: Plan, train_data: str | None, factors: str) -> FactorMixture:
    """Return the mixture of a plan that open_clip's arguments stand for.

    open_clip draws a shard with a probability in proportion to the factor of its source. So, for shards of equal length, the share of a
    source is in proportion to its factor times its samples; here, times the samples that the plan takes of it.

    Args:
        plan: what is trained on without factors.
        train_data: open_clip's `--train-data`, which names the sources: "laion/{0..9}.tar::cc12m/{0..4}.tar".
        factors: open_clip's `--train-data-upsampling-factors`: "1::2".

    Raises:
        UserError: factors are no numbers above 0, or not as many as sources; shards are not those of the catalog.
    """
    given = f"--train-data-upsampling-factors {factors}"
    try:
        numbers = [float(text) for text in factors.split("::")]
    except ValueError:
        numbers = [0.0]
    if not all(0 < number < math.inf for number in numbers):
        raise UserError(f"{given}: give numbers above 0 with :: between them, such as 1::2")
    if train_data is None:
        raise UserError(f"{given}: give --train-data too, which says which source each factor belongs to")
    refuse_annealed(plan)
    sources, budgets, samples = _sources(plan)
    order = [_source_of(piece, sources) for piece in train_data.split("::")]
    if len(order) != len(numbers) or len({*order}) < len(order):
        raise UserError(
            f"{given}: --train-data has the sources {', '.join(order)}: give one factor for each, each source once"
        )
    weights = {name: number * budgets.get(name, 0) for name, number in zip(order, numbers, strict=True)}
    total = math.fsum(weights.values())
    if not all(weights.values()):
        raise UserError(
            f"{given}: plan {plan.name!r} takes no sample of {', '.join(n for n, w in weights.items() if not w)}"
        )
    shares = {name: float(f"{weight / total:g}") for name, weight in weights.items()}
    budget = sum(budgets.values()) / UNITS
    copies = {name: math.ceil(share * budget / samples[name] - 1e-4) for name, share in shares.items()}
    most = max(copies, key=copies.__getitem__)
    if copies[most] > MAX_REPEATS:
        raise UserError(
            f"{given}: each sample of {most} would be drawn {copies[most]:,} times an epoch, and at most {MAX_REPEATS} are possible: "
            "lower its factor"
        )
    request = PlanRequest(
        "mixture",
        of=plan.name,
        clustering=_grouping(plan),
        shares=shares,
        max_repeats=max(most_copies(plan), copies[most]),
        seed=int(plan.config["seed"]),
    )
    name = f"{plan.name}-mixture-{'-'.join(f'{number:g}'.replace('+', '') for number in numbers)}"
    return FactorMixture(plan, name, request, dict(zip(order, numbers, strict=True)))


def _grouping(plan: Plan) -> str:
    """Return the name of the grouping by source of a plan's snapshot, made or not: that of another snapshot keeps its name."""
    found = Clustering.find(plan.catalog, SOURCE)
    return SOURCE if found is None or found.snapshot.id == plan.snapshot.id else f"{SOURCE}-{plan.snapshot.number}"


def _sources(plan: Plan) -> tuple[dict[str, str], dict[str, int], dict[str, int]]:
    """Return the source of each path; and of each source the plan's samples in units of 2⁻³⁰, and the rows that it may draw."""
    paths = plan.catalog.shards(plan.snapshot).column("path").to_pylist()
    names = sources_of(paths)
    units, rows = np.zeros(len(paths), np.int64), np.zeros(len(paths), np.int64)
    for span in plan.spans():
        rates, shards = plan.rate(span), plan.shards_of(np.arange(span.start, span.stop))
        np.add.at(units, shards, np.rint(rates * UNITS).astype(np.int64))
        rows += np.bincount(shards[rates > 0], minlength=len(paths))
    budgets: dict[str, int] = {}
    samples: dict[str, int] = {}
    for name, unit, row in zip(names, units.tolist(), rows.tolist(), strict=True):
        budgets[name], samples[name] = budgets.get(name, 0) + unit, samples.get(name, 0) + row
    return dict(zip(map(true_path, paths), names, strict=True)), budgets, samples


def _source_of(piece: str, sources: Mapping[str, str]) -> str:
    """Return the source of a piece of --train-data."""
    try:
        found = {sources.get(true_path(path)) for path in braceexpand(piece)}
    except ValueError as error:  # braces that do not match
        raise UserError(f"--train-data {piece}: {error}") from error
    if len(found) != 1 or None in found:
        known = ", ".join(sorted({*sources.values()}))
        raise UserError(
            f"--train-data {piece}: its shards are not those of one source of the catalog ({known}): "
            "make the plan yourself with `tailwise plan --method mixture`"
        )
    return str(found.pop())
