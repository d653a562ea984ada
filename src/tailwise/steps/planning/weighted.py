"""Plan by weight: weights and quotas (reduce), and the columns that draws read (map, or regroup for ranked picks)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tailwise.catalog import layout
from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.catalog import Catalog, Snapshot
from tailwise.catalog.columns import PlainColumn
from tailwise.catalog.files import write_array, write_table
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.plan.methods import MIXTURE, PICKS, Clusters, Method, find_method, method_options, weigh
from tailwise.plan.plan import MAX_EPOCH, Plan
from tailwise.plan.quotas import MAX_BUDGET, UNIT_BITS, fill_by_scale, fill_by_shift, round_to_sum, samples_of_share
from tailwise.requests import PlanRequest, ScoreRequest, refuse_given
from tailwise.steps.planning.grouping import Grouping
from tailwise.steps.scoring.scores import score_config
from tailwise.text import did_you_mean

MAX_REPEATS = 255
ABOVE_ONE = ("refill", "truncate")
MAX_SCHEDULE = 1 << 28  # quotas of an annealed plan, 8 bytes each
_AMOUNTS = ("keep", "budget", "per_cluster")


def make_weighted_plan(
    catalog: Catalog,
    name: str,
    request: PlanRequest,
    context: Context | None = None,
    shares: Mapping[str, float] | None = None,
) -> Plan:
    """Make a plan by a method that weighs clusters; see `make_plan`. `shares`: of groups, of a mixture."""
    context = context or Context()
    method = MIXTURE if shares else find_method(request.method)
    options = {} if shares else method_options(request.method, _given_options(request))
    pick = request.pick or method.pick
    dynamic = _dynamic(request, method, pick)
    score = _score_of_pick(request, pick)
    draw = draw_of(request, pick)
    final = _final_options(request, options, dynamic)
    _check_bounds(request, method)
    clusters = (request.clustering or "main") if method.grouping == "clusters" else None
    grouping = Grouping(catalog, clusters, context, without=request.without, score=score, shares=shares)
    most = max_repeats_of(request)
    budget = budget_of(request, grouping, most, per_cluster=method.per_cluster)
    config: dict[str, Any] = {
        "method": request.method,
        "options": options,
        "clustering": clusters,
        "snapshot": grouping.snapshot.number,
        "asked": asked_amounts(request),
        "max_repeats": most,
        "min_per_cluster": method.min_per_cluster if request.min_per_cluster is None else request.min_per_cluster,
        "class_balance": request.class_balance or 0.0,
        "pick": pick,
        "score": score_config(score) if score is not None else None,
        "without": list(request.without),
        "dynamic": dynamic,
        "draw": draw,
        "seed": request.seed,
    }
    if truncates(request):
        config["above_one"] = request.above_one
    if shares:
        config["shares"] = dict(shares)
    if final:
        config |= {"final_options": final, "anneal_epochs": request.anneal_epochs}
    derived: dict[str, Any] = {"budget": budget}
    quotas = _schedule(grouping, method, {**config, **derived})
    if method.registered:
        derived["quotas"] = blake2b(quotas.tobytes(), digest_size=16).hexdigest()
    with Artifact(catalog.plan_folder(name), "plan", config, grouping.inputs, derived) as artifact:
        if not artifact.done:
            write_groups(artifact, grouping.sizes, quotas)
            groups, ranks = (PlainColumn(artifact.folder, name) for name in (layout.GROUP, layout.RANK))
            grouping.write(groups, ranks, pick)
            write_shard_offsets(catalog, artifact, grouping.snapshot)
            figures = {
                "pool": grouping.pool,
                "eligible": grouping.eligible,
                "clusters": int((grouping.sizes > 0).sum()),
            }
            artifact.finish(figures | ({"mixture": grouping.mixture(quotas[0])} if shares else {}))
    return Plan(catalog, name)


def write_shard_offsets(catalog: Catalog, artifact: Artifact, snapshot: Snapshot) -> None:
    """Writes the first row of each shard."""
    rows = catalog.shards(snapshot).column("rows").to_numpy()
    write_array(artifact.path(layout.SHARD_OFFSETS), np.concatenate([[0], np.cumsum(rows)]).astype(np.int64))


def _dynamic(request: PlanRequest, method: Method, pick: str) -> bool:
    if pick not in PICKS:
        raise UserError(f"unknown pick {pick!r}: {did_you_mean(pick, PICKS)}")
    if method.grouping == "pool" and PICKS[pick].by == "similarity":
        raise UserError(f"`pick` {pick} needs clusters, and method {request.method!r} has none")
    if request.dynamic is None:
        return method.dynamic and PICKS[pick].by is None
    if request.dynamic and PICKS[pick].by is not None:
        raise UserError(
            f"`dynamic` with `pick` {pick}: a ranked pick is the same every epoch; use `static` or `pick` random"
        )
    return request.dynamic


def draw_of(request: PlanRequest, pick: str) -> str:
    """Return the draw of a plan; raise a UserError if it is unknown, or does not go with the pick."""
    if request.draw not in {None, "stream", "bernoulli"}:
        raise UserError(f"unknown draw {request.draw!r}: {did_you_mean(request.draw, ('stream', 'bernoulli'))}")
    if PICKS[pick].by is None:
        return request.draw or "stream"
    if request.draw is not None:
        raise UserError(f"`draw` {request.draw} with `pick` {pick}: a ranked pick isn't random; use `pick` random")
    if request.max_repeats not in {None, 1}:
        raise UserError(f"`max_repeats` {request.max_repeats} with `pick` {pick}: a ranked pick takes each sample once")
    return "ranked"


def score_of(request: PlanRequest) -> ScoreRequest:
    """Return the score that a plan goes by, clip-score by default."""
    score = request.score if isinstance(request.score, ScoreRequest) else ScoreRequest(request.score or "clip-score")
    file = {} if request.score_file is None else {"file": str(request.score_file)}
    return ScoreRequest(score.name, {**score.options, **file})


def _score_of_pick(request: PlanRequest, pick: str) -> ScoreRequest | None:
    if PICKS[pick].by == "score":
        return score_of(request)
    if request.score is not None:
        name = score_of(request).name
        raise UserError(f"`score` {name} does nothing with `pick` {pick}: use `pick` highest or lowest")
    refuse_given(request, {"score_file"}, f"with `pick` {pick}: use `pick` highest or lowest")
    return None


def asked_amounts(request: PlanRequest) -> dict[str, float]:
    """Return the budget as the user gave it."""
    return {name: value for name in _AMOUNTS if (value := getattr(request, name)) is not None}


def _given_options(request: PlanRequest) -> dict[str, float | None]:
    """Return the options of the weight: those with fields of their own, and those of registered methods."""
    return {name: getattr(request, name) for name in ("alpha", "temperature", "neighbours", "threshold")} | dict(
        request.options
    )


def _final_options(request: PlanRequest, options: Mapping[str, float], dynamic: bool) -> dict[str, float]:
    """The options that are annealed, with their last values."""
    given = dict(request.final_options) | ({} if request.alpha_end is None else {"alpha": request.alpha_end})
    if not given:
        if request.anneal_epochs is not None:
            raise UserError(f"`anneal_epochs` {request.anneal_epochs} does nothing without `alpha_end`")
        return {}
    if not dynamic:
        raise UserError("a static plan can't be annealed: its every epoch is the first; use `dynamic`")
    if request.anneal_epochs is None:
        raise UserError(f"`alpha_end` needs `anneal_epochs`: a number between 1 and {MAX_EPOCH:,}")
    if not 1 <= request.anneal_epochs <= MAX_EPOCH:
        raise UserError(f"`anneal_epochs` {request.anneal_epochs}: give a number between 1 and {MAX_EPOCH:,}")
    try:
        checked = method_options(request.method, {**options, **given})
    except UserError as error:
        raise UserError(f"at the end of annealing (`alpha_end`): {error}") from error
    return {name: checked[name] for name in given}


def truncates(request: PlanRequest) -> bool:
    """Return True if `above_one` is "truncate"; raise a UserError if it is unknown."""
    if request.above_one not in ABOVE_ONE:
        raise UserError(f"unknown `above_one` {request.above_one!r}: {did_you_mean(request.above_one, ABOVE_ONE)}")
    return request.above_one == "truncate"


def max_repeats_of(request: PlanRequest, default: int = 1) -> int:
    """Return `max_repeats`, or the default where it is not given; raise a UserError if it is out of bounds."""
    most = default if request.max_repeats is None else request.max_repeats
    if not 1 <= most <= MAX_REPEATS:
        raise UserError(f"`max_repeats` {most}: must lie between 1 and {MAX_REPEATS}")
    return most


def _check_bounds(request: PlanRequest, method: Method) -> None:
    max_repeats_of(request)
    if truncates(request) and (method.fill == "shift" or request.per_cluster is not None):
        why = (
            "`per_cluster` is a bound itself" if request.per_cluster is not None else "its paper solves for the budget"
        )
        raise UserError(f"`above_one` truncate does nothing with method {request.method!r}: {why}; use refill")
    if method.grouping == "pool":
        for option, value in (
            ("`min_per_cluster`", request.min_per_cluster),
            ("`class_balance`", request.class_balance),
            ("`clustering`", request.clustering),
            ("`above_one`", request.above_one if truncates(request) else None),
        ):
            if value is not None:
                raise UserError(f"{option} does nothing with method {request.method!r}: it has no clusters")
    if request.min_per_cluster is not None and not 0 <= request.min_per_cluster < MAX_BUDGET:
        raise UserError(f"`min_per_cluster` {request.min_per_cluster}: must lie between 0 and {MAX_BUDGET - 1:,}")
    if request.class_balance is not None and not 0 <= request.class_balance <= 1:
        raise UserError(
            f"`class_balance` {request.class_balance}: must lie between 0 and 1 (the same from every cluster)"
        )


def budget_of(request: PlanRequest, grouping: Grouping, repeats: int, *, per_cluster: bool = False) -> int:
    """Return the budget of a plan in samples.

    `repeats`: greatest number of copies of a sample in an epoch. `per_cluster`: True if the budget may be given as a maximum per cluster.

    Raises:
        UserError: no budget is given, several are, or it is out of bounds.
    """
    eligible = grouping.eligible
    most = min(repeats * eligible, MAX_BUDGET - 1)
    given = [request.keep, request.budget, request.per_cluster]
    if given.count(None) != len(given) - 1:
        choice = "either `keep` SHARE (0.277, say) or `budget` SAMPLES"
        raise UserError(f"give {choice}" + ", or `per_cluster` SAMPLES" * per_cluster)
    if request.per_cluster is not None:
        if not per_cluster:
            raise UserError(f"`per_cluster` does nothing with method {request.method!r}: use cap or flat")
        if request.per_cluster < 1:
            raise UserError(f"`per_cluster` {request.per_cluster}: must be at least 1")
        budget = int(np.minimum(grouping.sizes * repeats, request.per_cluster).sum())
    elif request.keep is not None:
        if not 0 < request.keep <= repeats:
            percent = f"; {request.keep:g} % is {request.keep / 100:g}" if 1 < request.keep <= 100 else ""
            raise UserError(f"`keep` {request.keep}: must be above 0 and at most {repeats} (`max_repeats`){percent}")
        times = f", up to {repeats} times an epoch" * (repeats > 1)
        left_out = f" ({grouping.left_out()})" if request.keep * grouping.pool > most else ""
        return samples_of_share(request.keep, grouping.pool, most, f"{eligible:,} can be drawn{times}{left_out}")
    else:
        budget = request.budget or 0
    if not 1 <= budget <= most:
        raise UserError(
            f"a budget of {budget:,} samples: must lie between 1 and {most:,} "
            f"({eligible:,} samples can be drawn, up to {repeats} times an epoch): see `keep`, `budget`, `max_repeats`"
        )
    return budget


def _schedule(grouping: Grouping, method: Method, config: Mapping[str, Any]) -> npt.NDArray[np.int64]:
    """Quotas of all groups in units of 2⁻³⁰ samples, int64 [E, K]: of epoch 0, …, E − 1 and all after it; E = 1 without annealing."""
    epochs = config.get("anneal_epochs", 0) + 1
    if epochs * len(grouping.sizes) > MAX_SCHEDULE:
        raise UserError(
            f"`anneal_epochs` {epochs - 1:,} with {len(grouping.sizes):,} clusters: must be under {MAX_SCHEDULE // len(grouping.sizes):,}"
        )
    table = np.zeros((epochs, len(grouping.sizes)), np.int64)
    full = grouping.sizes > 0
    for epoch in range(epochs):
        share = epoch / (epochs - 1) if epochs > 1 else 0.0
        options = {
            name: (1 - share) * first + share * config.get("final_options", {}).get(name, first)
            for name, first in config["options"].items()
        }
        table[epoch, full] = quotas_of(grouping.statistics, method, options, config)
    return table


def quotas_of(
    clusters: Clusters, method: Method, options: Mapping[str, float], config: Mapping[str, Any]
) -> npt.NDArray[np.int64]:
    """Quotas of the non-empty clusters in units of 2⁻³⁰ samples; whole samples where each is picked once and for all.

    `clusters`: the non-empty ones. `config`: of the plan: budget, max_repeats, min_per_cluster, class_balance, dynamic, draw; above_one
    where it is "truncate".

    Returns:
        int64 [K], summing to the budget, or to a smaller whole number of samples if quotas are truncated.

    Raises:
        UserError: weights or bounds can't be met.
    """
    sizes, budget = clusters.size, int(config["budget"])
    upper = np.minimum(sizes * int(config["max_repeats"]), budget)  # keeps units within int64
    least = max(int(config["min_per_cluster"]), int(config["class_balance"] * budget / len(sizes)))
    lower = np.minimum(least, upper)
    weights = weigh(method, clusters, options)
    bounds = lower.astype(np.float64), upper.astype(np.float64)
    if config.get("above_one") == "truncate":  # as DynamiCS's code: rates for the whole budget, then one copy at most
        filled = np.minimum(fill_by_scale(weights, bounds[0], np.full(len(sizes), float(budget)), budget), bounds[1])
        budget = round(math.fsum(filled))
    elif method.fill == "shift":
        filled = fill_by_shift(weights / weights.sum() * budget, *bounds, budget)
    else:
        filled = fill_by_scale(weights, *bounds, budget)
    bits = 0 if not config["dynamic"] and config["draw"] != "bernoulli" else UNIT_BITS
    rounded = round_to_sum(filled * (1 << bits), budget << bits, lower << bits, upper << bits, sizes)
    return rounded << (UNIT_BITS - bits)


def write_groups(artifact: Artifact, sizes: npt.NDArray[np.int64], quotas: npt.NDArray[np.int64]) -> None:
    """Write the table of groups: sizes, int64 [K], and quotas in units of 2⁻³⁰ samples, int64 [E, K], of epoch 0 and annealed ones."""
    table = pa.table(
        {
            "cluster": pa.array(np.arange(len(sizes)), pa.int32()),
            "size": pa.array(sizes, pa.int64()),
            "quota": pa.array(quotas[0] / (1 << UNIT_BITS), pa.float64()),
            "quota_units": pa.array(quotas[0], pa.int64()),  # exact: quota · 2³⁰
        }
    )
    write_table(artifact.path(layout.GROUP_TABLE), table)
    if len(quotas) > 1:
        write_array(artifact.path(layout.QUOTAS), quotas)
