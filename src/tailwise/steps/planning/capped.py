"""Plans by score with a cap on copies: SCS and HCS. Samples of about equal rates are a group, so that `stream` gives exact counts."""

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
from tailwise.catalog.columns import PlainColumn
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.execution.base import KERNEL, Fill, WithWorker, Worker
from tailwise.plan.methods import OPTIONS
from tailwise.plan.plan import Plan
from tailwise.plan.quotas import UNIT_BITS, hard_cap_rates, round_to_sum, soft_cap_rates, standardised
from tailwise.requests import PlanRequest
from tailwise.steps.planning.cells import RATE_BITS, merged_rates
from tailwise.steps.planning.grouping import OUTSIDE, Grouping, Rows
from tailwise.steps.planning.weighted import (
    MAX_REPEATS,
    asked_amounts,
    budget_of,
    draw_of,
    max_repeats_of,
    score_of,
    write_groups,
    write_shard_offsets,
)
from tailwise.steps.ranks import write_appearance_ranks
from tailwise.steps.scoring.scores import score_config

LEVELS = 1 << 20  # steps between the least and the greatest score
ALPHA, TEMPERATURE = 0.15, 1.0
MAX_ALPHA = 100.0


@dataclass(frozen=True)
class _Levels:
    """The score of each row in whole steps from the least to the greatest score."""

    rows: Rows
    least: float = 0.0
    greatest: float = 0.0

    def members(self, part: Part, worker: Worker) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
        """Return which rows of a part can be drawn, bool [n], and their scores, float64 [m]."""
        inside = self.rows.groups(part, worker) >= 0
        assert self.rows.score is not None
        return inside, np.asarray(self.rows.score.read(part))[inside].astype(np.float64)

    def of(self, scores: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """Return the step of each score: int64 [m], below LEVELS."""
        width = self.greatest - self.least
        return np.rint((scores - self.least) * ((LEVELS - 1) / width if width else 0.0)).astype(np.int64)

    def scores(self, levels: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Return the scores of steps: float64 [m]."""
        scores: npt.NDArray[np.float64] = self.least + levels * np.float64((self.greatest - self.least) / (LEVELS - 1))
        return scores

    def bounds(self, part: Part, worker: Worker) -> npt.NDArray[np.float64]:
        """Return the least score of a part's rows that can be drawn, and minus the greatest one: float64 [2]."""
        _, scores = self.members(part, worker)
        return np.array([scores.min(initial=np.inf), -scores.max(initial=-np.inf)])

    def count(self, part: Part, worker: Worker) -> npt.NDArray[np.int64]:
        """Count the rows of a part by step: int64 [LEVELS]."""
        return np.bincount(self.of(self.members(part, worker)[1]), minlength=LEVELS)

    def groups(self, of_level: npt.NDArray[np.int32], part: Part, worker: Worker) -> npt.NDArray[np.int32]:
        """Return the group of each row of a part, by the groups of the steps, int32 [LEVELS]."""
        inside, scores = self.members(part, worker)
        groups = np.full(part.rows, OUTSIDE, np.int32)
        groups[inside] = of_level[self.of(scores)]
        return groups


def make_capped_plan(catalog: Catalog, name: str, request: PlanRequest, context: Context | None = None) -> Plan:
    """Make a plan by SCS or HCS: copies in proportion to e^s of a score, with a soft or a hard cap (see `tailwise.plan.quotas`).

    The score is standardised and divided by `temperature`, s = z(score) / T; with `logits`, it is only divided. Scores are taken in 2²⁰
    steps between the least and the greatest. Samples without the score are never drawn.

    Raises:
        UserError: there is no such score, it is infinite, or the request is out of bounds.
    """
    context = context or Context()
    if request.score is None:
        raise UserError(f"method {request.method!r} needs `score`, the name of a score")
    soft = request.method == "scs"
    most = MAX_REPEATS if soft else max_repeats_of(request)
    options = _options(request, soft=soft)
    score = score_of(request)
    draw = draw_of(request, "random")
    grouping = Grouping(catalog, None, context, without=request.without, score=score)
    config: dict[str, Any] = {
        "method": request.method,
        "options": options,
        "logits": request.logits,
        "snapshot": grouping.snapshot.number,
        "asked": asked_amounts(request),
        "max_repeats": most,
        "score": score_config(score),
        "without": list(request.without),
        "dynamic": request.dynamic is not False,
        "draw": draw,
        "seed": request.seed,
        "rate_groups": True,
    }
    derived = {"budget": budget_of(request, grouping, most)}
    with Artifact(catalog.plan_folder(name), "plan", config, grouping.inputs, derived) as artifact:
        if not artifact.done:
            levels, members = _count(grouping, score.name, context)
            chosen = np.flatnonzero(members)
            rates = _rates(levels.scores(chosen), members[chosen], {**config, **derived})
            keys, groups = np.unique(rates.astype(np.float32).view(np.int32) >> RATE_BITS, return_inverse=True)
            groups = merged_rates(np.bincount(groups, members[chosen] * rates, len(keys)).astype(np.float64))[groups]
            of_level = np.full(LEVELS, OUTSIDE, np.int32)
            of_level[chosen] = groups
            sizes = np.zeros(int(groups.max()) + 1, np.int64)
            np.add.at(sizes, groups, members[chosen])
            drawn = np.bincount(groups, members[chosen] * rates, len(sizes)).astype(np.float64)
            write_groups(artifact, sizes, quotas_of_sums(drawn, sizes, {**config, **derived})[None])
            column, ranks = (PlainColumn(artifact.folder, each) for each in (layout.GROUP, layout.RANK))
            context.run(Fill(column, partial(levels.groups, of_level)), grouping.parts, "groups of rows", KERNEL)
            write_appearance_ranks(column, ranks, len(sizes), grouping.parts, context)
            write_shard_offsets(catalog, artifact, grouping.snapshot)
            artifact.finish({"pool": grouping.pool, "eligible": grouping.eligible, "clusters": len(sizes)})
    return Plan(catalog, name)


def _options(request: PlanRequest, *, soft: bool) -> dict[str, float]:
    least, most, _ = OPTIONS["temperature"]
    temperature = TEMPERATURE if request.temperature is None else request.temperature
    if not least <= temperature <= most:
        raise UserError(f"`temperature` {temperature}: must be a number between {least:g} and {most:g}")
    if not soft:
        return {"temperature": temperature}
    alpha = ALPHA if request.alpha is None else request.alpha
    if not 0 < alpha <= MAX_ALPHA:
        raise UserError(f"`alpha` {alpha}: must be above 0 and at most {MAX_ALPHA:g} with method {request.method!r}")
    return {"alpha": alpha, "temperature": temperature}


def _count(grouping: Grouping, score: str, context: Context) -> tuple[_Levels, npt.NDArray[np.int64]]:
    """Return the steps of the scores, and the number of samples of each step: int64 [LEVELS]."""
    reduce, parts = context.executor.reduce, grouping.parts
    least, below = reduce(WithWorker(_Levels(grouping.rows).bounds), parts, np.minimum, KERNEL).tolist()
    if not (math.isfinite(least) and math.isfinite(below)):
        raise UserError(f"the score {score!r} is infinite for some samples: leave them out with `tailwise filter`")
    levels = _Levels(grouping.rows, least, -below)
    return levels, reduce(WithWorker(levels.count), parts, np.add, KERNEL)


def _rates(
    scores: npt.NDArray[np.float64], members: npt.NDArray[np.int64], config: dict[str, Any]
) -> npt.NDArray[np.float64]:
    """Return the rate of each of M scores: float64 [M]."""
    options, budget = config["options"], config["budget"]
    logits = (scores if config["logits"] else standardised(scores, members)) / options["temperature"]
    if config["method"] == "hcs":
        return hard_cap_rates(logits, members, budget, config["max_repeats"])
    rates = soft_cap_rates(logits, members, budget, options["alpha"])
    if rates.max() > MAX_REPEATS:
        raise UserError(
            f"the highest score has {rates.max():,.0f} copies in an epoch, and at most {MAX_REPEATS} are possible: "
            "raise `alpha` or `temperature`, or use `method` hcs"
        )
    return rates


def quotas_of_sums(
    drawn: npt.NDArray[np.float64], sizes: npt.NDArray[np.int64], config: dict[str, Any]
) -> npt.NDArray[np.int64]:
    """Return the quotas of groups in units of 2⁻³⁰ samples, int64 [K], that sum to the budget exactly.

    Args:
        drawn: float64 [K], sum of the rates of each group; they sum to about the budget.
        sizes: int64 [K], members of each group.
        config: of the plan: budget, max_repeats, dynamic, draw.
    """
    bits = 0 if not config["dynamic"] and config["draw"] != "bernoulli" else UNIT_BITS
    budget = int(config["budget"])
    upper = np.minimum(sizes * int(config["max_repeats"]), budget) << bits
    rounded = round_to_sum(drawn * float(1 << bits), budget << bits, np.zeros_like(upper), upper, sizes)
    return rounded << (UNIT_BITS - bits)
