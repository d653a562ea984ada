"""Quotas: how many samples each cluster gives, for a budget.

All quotas are integers of a unit, so that sums are exact: whole samples for static picks, 2⁻³⁰ samples for dynamic ones.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from tailwise.errors import UserError

UNIT_BITS = 30
UNITS = 1 << UNIT_BITS  # fixed-point units in one sample
MAX_BUDGET = 1 << 33  # so that the sum of all quotas, in units, fits an int64


def fill_by_scale(
    weights: npt.NDArray[np.float64],
    lower: npt.NDArray[np.float64],
    upper: npt.NDArray[np.float64],
    budget: float,
) -> npt.NDArray[np.float64]:
    """q_j = clip(s · w_j, l_j, u_j) with the one s that meets Σ q_j = budget (DynamiCS, section 3.2, with bounds).

    Exact, O(K log K).

    Args:
        weights: w, [K], > 0.
        lower: l, [K], ≥ 0.
        upper: u, [K], > 0, ≥ l.
        budget: between Σ l_j and Σ u_j.

    Returns:
        float64 [K], in samples.

    Raises:
        UserError: the budget is outside [Σ l_j, Σ u_j].
    """
    _check_budget(budget, float(lower.sum()), float(upper.sum()))
    # As s rises, cluster j leaves its lower bound at s = l_j / w_j and reaches its upper bound at s = u_j / w_j.
    breaks = np.unique(np.concatenate([lower / weights, upper / weights]))
    first, last = 0, len(breaks) - 1  # the break that s comes at, or before
    while first < last:
        middle = (first + last) // 2
        if float(np.clip(breaks[middle] * weights, lower, upper).sum()) < budget:
            first = middle + 1
        else:
            last = middle
    between = 0.5 * (breaks[max(first - 1, 0)] + breaks[first])
    quotas: npt.NDArray[np.float64] = np.clip(between * weights, lower, upper)
    free = (quotas > lower) & (quotas < upper)
    if free.any():  # the active bounds are known: s again, without rounding
        scale = (budget - math.fsum(quotas[~free])) / math.fsum(weights[free])
        quotas[free] = np.clip(scale * weights[free], lower[free], upper[free])
    return quotas


def _check_budget(budget: float, least: float, most: float) -> None:
    if budget < least:
        raise UserError(
            f"budget {budget:,.0f} is under the clusters' minimum of {least:,.0f}: raise it, or lower `min_per_cluster` or "
            "`class_balance`"
        )
    if budget > most:
        raise UserError(
            f"budget {budget:,.0f} is above what the clusters can give ({most:,.0f}): lower it, or raise `max_repeats`"
        )


def fill_by_shift(
    targets: npt.NDArray[np.float64],
    lower: npt.NDArray[np.float64],
    upper: npt.NDArray[np.float64],
    budget: float,
) -> npt.NDArray[np.float64]:
    """q_j = clip(t_j − λ, l_j, u_j) with the one λ that meets Σ q_j = budget.

    It is the Euclidean projection of t on the box-bounded simplex, i.e. the solution of DBP's quadratic program (section 3.2):
    min Σ (q_j − t_j)² s.t. Σ q_j = budget, l_j ≤ q_j ≤ u_j. Exact, O(K log K).

    Args:
        targets: t, [K].
        lower: l, [K].
        upper: u, [K], ≥ l.
        budget: between Σ l_j and Σ u_j.

    Returns:
        float64 [K], in samples.

    Raises:
        UserError: the budget is outside [Σ l_j, Σ u_j].
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
    if free.any():  # the active bounds are known: λ again, without the rounding of the running sums
        bound = np.where(targets - middle >= upper, upper, lower)
        shift = (math.fsum(targets[free]) + math.fsum(bound[~free]) - budget) / int(free.sum())
    else:
        shift = float(middle)
    filled: npt.NDArray[np.float64] = np.clip(targets - shift, lower, upper)
    return filled


def round_to_sum(
    values: npt.NDArray[np.float64],
    total: int,
    lower: npt.NDArray[np.int64],
    upper: npt.NDArray[np.int64],
    priority: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Largest-remainder rounding: integers within bounds that sum to `total` exactly, nearest to `values`.

    Args:
        values: [K], about `total` in sum.
        total: between Σ lower and Σ upper.
        lower: int64 [K].
        upper: int64 [K].
        priority: int64 [K]; among equal remainders, the higher one is raised first, then the lower index.

    Returns:
        int64 [K].
    """
    floors = np.floor(values)
    quotas = np.clip(floors.astype(np.int64), lower, upper)
    remainders = values - floors
    inside = (values > lower) & (values < upper)
    while missing := total - int(quotas.sum()):
        step = 1 if missing > 0 else -1
        room = (upper - quotas) if missing > 0 else (quotas - lower)
        open_ = np.flatnonzero(inside & (room > 0))  # a quota on its bound was meant to be there
        if not len(open_):
            open_ = np.flatnonzero(room > 0)
        if abs(missing) > len(
            open_
        ):  # only through float error, which is in proportion to the value, or through clipping
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
