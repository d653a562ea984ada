"""A plan taken apart: another plan's rates averaged over each group (between), or rescaled in each group (within)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.catalog import layout
from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.columns import PlainColumn
from tailwise.catalog.kinds import WITHOUT
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.execution.base import KERNEL, Fill, WithWorker, Worker
from tailwise.plan.plan import Plan
from tailwise.plan.quotas import UNIT_BITS, UNITS, round_to_sum
from tailwise.requests import PlanRequest
from tailwise.steps.planning.grouping import OUTSIDE
from tailwise.steps.planning.weighted import draw_of, max_repeats_of, write_groups, write_shard_offsets
from tailwise.steps.ranks import write_appearance_ranks
from tailwise.steps.upkeep.excluded import lists_of

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Rates:
    """Rates of a plan's candidates, and their groups. Candidates of no group are in a last group of their own."""

    of: Plan
    clustering: str  # its name
    groups: int  # G, with that of no group
    drawn: bool = False  # True to leave out candidates of rate 0, and to take the copies of a static plan for its rates

    def read(self, part: Part, worker: Worker) -> tuple[npt.NDArray[np.int32], Floats]:
        """Return the group, int32 [n], OUTSIDE for rows that are no candidates, and the rate, float64 [n], of each row of a part."""
        plan = worker.cached((self.of.folder, self.of.id), lambda: self.of)
        clustering = worker.cached(self, lambda: Clustering.open(plan.catalog, self.clustering))
        labels = clustering.labels.read(part)
        groups = np.where(labels < 0, self.groups - 1, labels)
        inside, rates = plan.candidates(part.span), plan.rate(part.span)
        if self.drawn:
            rates = rates if plan.dynamic else plan.draw(0, part.span).astype(np.float64)
            inside &= rates > 0
        return np.where(inside, groups, OUTSIDE).astype(np.int32), rates

    def of_groups(self, part: Part, worker: Worker) -> npt.NDArray[np.int32]:
        """Return the group of each row of a part, as `read` does."""
        return self.read(part, worker)[0]

    def sums(self, scales: Floats, most: int, part: Part, worker: Worker) -> Integers:
        """Return members of each group, members above `most`, and the sum of the other rates in units of 2⁻³⁰: int64 [3, G].

        A member is above `most` if its rate times the scale of its group, float64 [G], is.
        """
        groups, rates = self.read(part, worker)
        groups, rates = groups[groups >= 0], rates[groups >= 0]
        above = rates * scales[groups] > most
        sums = np.zeros((3, self.groups), np.int64)
        sums[0] = np.bincount(groups, minlength=self.groups)
        sums[1] = np.bincount(groups[above], minlength=self.groups)
        np.add.at(sums[2], groups[~above], np.rint(rates[~above] * UNITS).astype(np.int64))
        return sums

    def scaled(self, scales: Floats, most: int, part: Part, worker: Worker) -> npt.NDArray[np.float32]:
        """Return the rate of each row of a part, scaled in its group, at most `most`."""
        groups, rates = self.read(part, worker)
        return np.where(groups >= 0, np.minimum(rates * scales[groups], most), 0.0).astype(np.float32)


def refuse_annealed(plan: Plan) -> None:
    """Raise a UserError if the rates of a plan change from epoch to epoch."""
    if plan.annealed:
        raise UserError(f"plan {plan.name!r} changes its rates from epoch to epoch: give one without annealing")


def most_copies(plan: Plan) -> int:
    """Return the bound on copies of a sample: that of the plan, or the least whole number above all its rates."""
    if not plan.by_rate:
        return int(plan.config["max_repeats"])
    return max(1, math.ceil(max(float(plan.rates[span].max(initial=0)) for span in plan.spans())))


class Apart:
    """The request of a plan that is made from another one."""

    def __init__(self, catalog: Catalog, request: PlanRequest, context: Context, *, drawn: bool = False) -> None:
        """Open plan and grouping, and sum the rates of each group; a UserError says what does not fit. `drawn`: see Rates."""
        if request.of is None:
            raise UserError(f"method {request.method!r} needs `of`, the name of a plan whose rates it starts from")
        self.of, self._context = Plan(catalog, request.of), context
        self.clustering = Clustering.open(catalog, request.clustering or "main")
        refuse_annealed(self.of)
        if self.clustering.snapshot.id != self.of.snapshot.id:
            numbers = f"{self.of.snapshot.number}, and {self.clustering.name!r} for {self.clustering.snapshot.number}"
            raise UserError(f"plan {request.of!r} was made for snapshot {numbers}: make both for one snapshot")
        self.parts = catalog.parts(self.of.snapshot)
        self.rates = Rates(self.of, self.clustering.name, self.clustering.table.num_rows + 1, drawn)
        self.most = max_repeats_of(request, most_copies(self.of))
        self.scales = np.zeros(self.rates.groups)
        self.sizes, _, self.units = self.sums()
        users = (self.of, *filter(None, [Clustering.find(catalog, self.of.clustering)]))
        self.inputs = {
            **{name: value for user in users for name, value in user.inputs.items() if name.startswith(WITHOUT)},
            "snapshot": self.of.snapshot.id,
            "plan": self.of.id,
            "clustering": self.clustering.id,
        }
        self.config: dict[str, Any] = {
            "method": request.method,
            "of": self.of.name,
            "clustering": self.clustering.name,
            "snapshot": self.of.snapshot.number,
            "max_repeats": self.most,
            "without": lists_of(self.of),
            "dynamic": self.of.dynamic if request.dynamic is None else request.dynamic,
            "seed": request.seed,
        }
        self.figures = {"pool": self.of.pool, "eligible": int(self.sizes.sum())}

    def sums(self) -> Integers:
        """Return `Rates.sums` of all parts at the present scales: int64 [3, G]."""
        sums = partial(self.rates.sums, self.scales, self.most)
        return self._context.executor.reduce(WithWorker(sums), self.parts, np.add, KERNEL)

    def rescale(self, target: Floats) -> None:
        """Find the scale of each group that gives it a sum of rates, where no rate is above the bound.

        `target`: the sums in units of 2⁻³⁰ samples, float64 [G].
        """
        capped, units = np.zeros_like(self.sizes), self.units
        while True:
            left = target - capped * float(self.most * UNITS)
            wanted = np.divide(left, units, out=np.zeros(len(left)), where=units > 0)
            self.scales = np.maximum(self.scales, wanted)  # it never falls, so that this ends
            _, found, units = self.sums()
            if np.array_equal(found, capped):
                break
            capped = found
        if len(short := np.flatnonzero((units == 0) & (left > 1e-6 * target))):
            at = int(short[0])
            where = f"group {at}" if at < self.rates.groups - 1 else "no group"
            raise UserError(
                f"{self.sizes[at]:,} samples of plan {self.of.name!r} are in {where} of {self.clustering.name!r}, and too few of them "
                f"have a rate above 0 for the mean rate {target[at] / UNITS / self.sizes[at]:.3g}: "
                "use a plan of `pick` random, or `method` between"
            )


def make_between_plan(catalog: Catalog, name: str, request: PlanRequest, context: Context | None = None) -> Plan:
    """Make a plan by groups: the members of a group get its mean rate under the plan `of`.

    Candidates and budget are those of that plan. Its candidates of no group are one more group.

    Raises:
        UserError: there is no such plan or grouping, they are for two snapshots, or the plan is annealed.
    """
    context = context or Context()
    made = Apart(catalog, request, context)
    config = {**made.config, "draw": draw_of(request, "random")}
    bits = 0 if not config["dynamic"] and config["draw"] != "bernoulli" else UNIT_BITS
    budget = round(int(made.units.sum()) / UNITS)
    upper = np.minimum(made.sizes * made.most, budget) << bits
    values = made.units / float(1 << (UNIT_BITS - bits))
    quotas = round_to_sum(values, budget << bits, np.zeros_like(upper), upper, made.sizes) << (UNIT_BITS - bits)
    with Artifact(catalog.plan_folder(name), "plan", config, made.inputs, {"budget": budget}) as artifact:
        if not artifact.done:
            write_groups(artifact, made.sizes, quotas[None])
            groups, ranks = (PlainColumn(artifact.folder, column) for column in (layout.GROUP, layout.RANK))
            context.run(Fill(groups, made.rates.of_groups), made.parts, "groups of rows", KERNEL)
            write_appearance_ranks(groups, ranks, made.rates.groups, made.parts, context)
            write_shard_offsets(catalog, artifact, made.of.snapshot)
            artifact.finish({**made.figures, "clusters": int((made.sizes > 0).sum())})
    return Plan(catalog, name)


def make_within_plan(catalog: Catalog, name: str, request: PlanRequest, context: Context | None = None) -> Plan:
    """Make a plan by rate: the rates of the plan `of`, rescaled so that each group has the mean rate of all candidates.

    Rates that would exceed the plan's `max_repeats` R are R, and the other members of the group get what is above (refill). Candidates
    and budget are those of that plan.

    Raises:
        UserError: as `make_between_plan`; or a group has too few samples of a rate above 0, as with a ranked pick.
    """
    context = context or Context()
    made = Apart(catalog, request, context)
    with Artifact(catalog.plan_folder(name), "plan", {**made.config, "draw": "bernoulli"}, made.inputs) as artifact:
        if not artifact.done:
            made.rescale(made.sizes * (float(made.units.sum()) / max(int(made.sizes.sum()), 1)))
            column = PlainColumn(artifact.folder, layout.RATE)
            scaled = partial(made.rates.scaled, made.scales, made.most)
            context.run(Fill(column, scaled), made.parts, "rates of rows", KERNEL)
            write_shard_offsets(catalog, artifact, made.of.snapshot)
            artifact.finish({**made.figures, "expected": int(made.units.sum()) / UNITS})
    return Plan(catalog, name)
