"""Differences between rows, paired by seed: t-intervals, p-values, and the least difference that the test detects."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

LEVEL = 0.95
POWER = 0.8


@dataclass(frozen=True)
class Spread:
    """Mean and spread of a figure over seeds."""

    n: int  # number of seeds
    mean: float  # mean over the seeds
    sd: float | None  # standard deviation of one seed (n − 1 in the denominator); None for a single seed


@dataclass(frozen=True)
class Difference:
    """A row's figure minus the baseline's, paired by seed. For a single seed, all but `n` and `mean` are None."""

    n: int  # number of seeds that both rows have
    mean: float  # mean difference
    sd: float | None = None  # standard deviation of one difference
    low: float | None = None  # lower end of the 95 % t-interval of the mean
    high: float | None = None  # upper end of that interval
    p: float | None = None  # p-value of the two-sided paired t-test
    # least true difference that this test finds with 80 % power, if `sd` is the true spread
    detectable: float | None = None

    @property
    def significant(self) -> bool | None:
        """True if the interval excludes 0; None for a single seed."""
        return None if self.low is None or self.high is None else self.low > 0 or self.high < 0


def spread(values: Sequence[float]) -> Spread:
    """Return mean and standard deviation of at least one value."""
    return Spread(len(values), float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)


def paired(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Return the paired difference of two rows with values of the same seeds (at least one)."""
    differences = np.subtract(values, baseline)
    found = spread(differences.tolist())
    if found.sd is None:
        return Difference(found.n, found.mean)
    error = found.sd / math.sqrt(found.n)
    half = float(stats.t.ppf((1 + LEVEL) / 2, found.n - 1)) * error
    t = abs(found.mean) / error if error > 0 else math.inf if found.mean else 0.0
    p, least = float(2 * stats.t.sf(t, found.n - 1)), detectable(found.sd, found.n)
    return Difference(found.n, found.mean, found.sd, found.mean - half, found.mean + half, p, least)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for the number of tests (Holm 1979)."""
    order = np.argsort(p_values)
    scaled = np.arange(len(p_values), 0, -1) * np.take(p_values, order)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.maximum.accumulate(np.minimum(scaled, 1))
    return [float(value) for value in adjusted]


@cache
def _detectable_in_errors(n: int) -> float:
    """Return `detectable` in standard errors of the mean difference."""
    critical = stats.t.ppf((1 + LEVEL) / 2, n - 1)

    def missing(shift: float) -> float:
        return float(POWER - stats.nct.sf(critical, n - 1, shift))  # differences of the right sign only

    high = 1.0
    while missing(high) > 0:
        high *= 2
    return float(optimize.brentq(missing, 0.0, high))


def detectable(sd: float, n: int) -> float:
    """Return the least true difference that a paired t-test over n ≥ 2 seeds finds with 80 % power; `sd` is that of one seed."""
    return _detectable_in_errors(n) * sd / math.sqrt(n)


def rank_correlation(
    groups: npt.NDArray[np.int32], x: npt.NDArray[np.floating], y: npt.NDArray[np.floating]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return Spearman's correlation of x and y in each group of two members or more, and its members: float64 and int64 [G].

    All arrays are [n]. Equal values share the mean of their ranks. A group in which all x or all y are equal has 0.
    """
    members = np.bincount(groups)
    a, b = _centred_ranks(groups, x), _centred_ranks(groups, y)
    products, first, second = (np.bincount(groups, values) for values in (a * b, a * a, b * b))
    scale = np.sqrt(first * second)
    found = np.divide(products, scale, out=np.zeros(len(members)), where=scale > 0)
    return found[members > 1], members[members > 1]


def _centred_ranks(groups: npt.NDArray[np.int32], values: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Return the ranks of values in their group, less the mean of all ranks: float64 [n]."""
    order = np.lexsort((values, groups))
    new_group = np.diff(groups[order], prepend=-1) != 0
    new_value = new_group | (np.diff(values[order], prepend=np.nan) != 0)
    first, after = (np.append(np.flatnonzero(each), len(order)) for each in (new_value, new_group))
    ranks = np.repeat((first[:-1] + first[1:] - 1) / 2, np.diff(first))
    ranks -= np.repeat((after[:-1] + after[1:] - 1) / 2, np.diff(after))
    centred = np.empty(len(order))
    centred[order] = ranks
    return centred
