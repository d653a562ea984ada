"""Quotas: the number of samples that each cluster gives, for a budget.

All quotas are integers of a unit, so that sums are exact: whole samples for static picks, 2⁻³⁰ samples for dynamic ones.

Rates from scores, with a cap on the copies of a sample, are SCS and HCS (FLYT, NeurIPS 2025, arXiv 2503.08805; M: number of different
scores). As published, SCS draws batches from softmax(s) without replacement, and lowers the score of what was drawn by α, until the budget
is met. These are the rates that this draw has in the limit of small batches.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from tailwise.errors import UserError

UNIT_BITS = 30
UNITS = 1 << UNIT_BITS  # fixed-point units in one sample
MAX_BUDGET = 1 << 33  # the sum of all quotas, in units, fits an int64

Floats: TypeAlias = npt.NDArray[np.float64]
Integers: TypeAlias = npt.NDArray[np.int64]

FAINTEST = -600.0  # exp of it is above 0


def fill_by_scale(weights: Floats, lower: Floats, upper: Floats, budget: float) -> Floats:
    """Return q_j = clip(s · w_j, l_j, u_j) in samples, with s such that Σ q_j = budget (DynamiCS, section 3.2, with bounds).

    Exact, O(K log K). All arrays are float64 [K]: w > 0, l ≥ 0, u ≥ l, u > 0. Raise a UserError if the budget is outside [Σ l_j, Σ u_j].
    """
    _check_budget(budget, float(lower.sum()), float(upper.sum()))
    # As s rises, cluster j leaves its lower bound at s = l_j / w_j and reaches its upper bound at s = u_j / w_j.
    breaks = np.unique(np.concatenate([lower / weights, upper / weights]))
    first, last = 0, len(breaks) - 1  # s is between two breaks: bisect for the upper one
    while first < last:
        middle = (first + last) // 2
        if float(np.clip(breaks[middle] * weights, lower, upper).sum()) < budget:
            first = middle + 1
        else:
            last = middle
    between = 0.5 * (breaks[max(first - 1, 0)] + breaks[first])
    quotas: Floats = np.clip(between * weights, lower, upper)
    free = (quotas > lower) & (quotas < upper)
    if free.any():  # the active bounds are known now, so s can be computed without rounding errors
        scale = (budget - math.fsum(quotas[~free])) / math.fsum(weights[free])
        quotas[free] = np.clip(scale * weights[free], lower[free], upper[free])
    return quotas


def _check_budget(budget: float, least: float, most: float) -> None:
    if budget < least:
        remedy = "raise it, or lower `min_per_cluster` or `class_balance`"
        raise UserError(f"budget {budget:,.0f} is under the clusters' minimum of {least:,.0f}: {remedy}")
    if budget > most:
        remedy = "lower it, or raise `max_repeats`"
        raise UserError(f"budget {budget:,.0f} is above the clusters' maximum of {most:,.0f}: {remedy}")


def fill_by_shift(targets: Floats, lower: Floats, upper: Floats, budget: float) -> Floats:
    """Return q_j = clip(t_j − λ, l_j, u_j) in samples, with λ such that Σ q_j = budget.

    This is the Euclidean projection of t on the box-bounded simplex, the solution of DBP's quadratic program (section 3.2):
    min Σ (q_j − t_j)² s.t. Σ q_j = budget, l_j ≤ q_j ≤ u_j. Exact, O(K log K). All arrays are float64 [K], u ≥ l. Raise a UserError if the
    budget is outside [Σ l_j, Σ u_j].
    """
    most = float(upper.sum())
    _check_budget(budget, float(lower.sum()), most)
    # As λ rises, cluster j leaves its upper bound at λ = t_j − u_j and reaches its lower bound at λ = t_j − l_j.
    breaks = np.concatenate([targets - upper, targets - lower])
    slopes = np.concatenate([np.full(len(targets), -1.0), np.full(len(targets), 1.0)])
    order = np.argsort(breaks, kind="stable")
    breaks, slope = breaks[order], np.cumsum(slopes[order])
    values = most + np.concatenate([[0.0], np.cumsum(slope[:-1] * np.diff(breaks))])  # Σ q_j at each break
    at = int(np.searchsorted(-values, -budget, side="left"))
    middle = breaks[0] if at == 0 else 0.5 * (breaks[at - 1] + breaks[min(at, len(breaks) - 1)])
    free = (targets - middle > lower) & (targets - middle < upper)
    if free.any():  # the active bounds are known now, so λ can be computed without the errors of running sums
        bound = np.where(targets - middle >= upper, upper, lower)
        shift = (math.fsum(targets[free]) + math.fsum(bound[~free]) - budget) / int(free.sum())
    else:
        shift = float(middle)
    filled: Floats = np.clip(targets - shift, lower, upper)
    return filled


def round_to_sum(values: Floats, total: int, lower: Integers, upper: Integers, priority: Integers) -> Integers:
    """Return integers within bounds that sum to `total` exactly, nearest to `values`: largest-remainder rounding.

    All arrays are [K]. `values` sum to about `total`, which is between Σ lower and Σ upper. Among equal remainders, the one with the
    higher priority is raised first, then the one with the lower index.
    """
    floors = np.floor(values)
    quotas = np.clip(floors.astype(np.int64), lower, upper)
    remainders = values - floors
    inside = (values > lower) & (values < upper)
    while missing := total - int(quotas.sum()):
        step = 1 if missing > 0 else -1
        room = (upper - quotas) if missing > 0 else (quotas - lower)
        open_ = np.flatnonzero(inside & (room > 0))  # the fill chose the bound for quotas on their bound
        if not len(open_):
            open_ = np.flatnonzero(room > 0)
        # More than one a cluster: only because of clipping, or of float errors, which are in proportion to the value.
        if abs(missing) > len(open_):
            weights = np.maximum(values[open_], 0.0)
            if weights.sum() < 1:
                weights = room[open_].astype(np.float64)
            share = np.minimum((abs(missing) * (weights / weights.sum())).astype(np.int64), room[open_])
            if share.any():
                quotas[open_] += step * share
                continue
        order = np.lexsort((open_, -priority[open_], -step * remainders[open_]))
        quotas[open_[order[: abs(missing)]]] += step
    return quotas


def samples_of_share(share: float, pool: int, most: int, limit: str, option: str = "`keep`") -> int:
    """Return the number of samples in a share of the pool.

    Args:
        share: share above 0.
        pool: number of samples in the pool (`Survivors.pool`).
        most: greatest possible number.
        limit: reason for `most`, for the error: "53 samples can be drawn".
        option: option that gave the share, for the error.

    Raises:
        UserError: the share is less than one sample, or more than `most`.
    """
    asked = round(share * pool)
    if asked < 1:
        raise UserError(f"{option} {share:g} of the pool of {pool:,} samples is less than one sample: give more")
    if asked > most:
        largest = math.floor(most / pool * 1e6) / 1e6  # rounded down, so that this share is accepted
        bound = f"the largest possible share is {largest:g}, which is {round(largest * pool):,} samples"
        raise UserError(f"{option} {share:g} asks for {asked:,} samples of the pool of {pool:,}, but {limit}: {bound}")
    return asked


def standardised(scores: Floats, members: Integers) -> Floats:
    """Return scores less their mean, in standard deviations: float64 [M]; all 0 if they are equal.

    Args:
        scores: float64 [M].
        members: int64 [M], samples of each score.
    """
    weights = members / members.sum()
    centred = scores - (weights * scores).sum()
    deviation = math.sqrt(float((weights * centred**2).sum()))
    return centred / deviation if deviation > 0 else np.zeros_like(centred)


def soft_cap_rates(logits: Floats, members: Integers, budget: int, alpha: float) -> Floats:
    """Return SCS's rates r = ln(1 + α·τ·e^s) / α, float64 [M], with the one τ such that their sum over all samples is the budget.

    Args:
        logits: s, float64 [M].
        members: int64 [M], samples of each logit.
        budget: number of samples to draw, with repeats.
        alpha: α > 0; a sample's logit falls by it with each copy.
    """
    mean = alpha * budget / int(members.sum())
    # log τα is between these, because x < ln(1 + e^x) < e^x.
    low, high = math.log(mean) - float(logits.max()), mean - float(logits.min())
    while low < (middle := (low + high) / 2) < high:
        if float((members * np.logaddexp(0.0, logits + middle)).sum()) < alpha * budget:
            low = middle
        else:
            high = middle
    rates: Floats = np.logaddexp(0.0, logits + high) / alpha
    return rates


def hard_cap_rates(logits: Floats, members: Integers, budget: int, most: int) -> Floats:
    """Return HCS's rates r = min(L, c·e^s), float64 [M], with the one c such that their sum over all samples is the budget.

    Args:
        logits: s, float64 [M].
        members: int64 [M], samples of each logit.
        budget: number of samples to draw, with repeats; at most L times the number of samples.
        most: L, the greatest rate.
    """
    weights = np.exp(np.maximum(logits - logits.max(), FAINTEST))
    upper: Floats = members * np.float64(most)
    return fill_by_scale(weights * members, np.zeros(len(logits)), upper, budget) / members
