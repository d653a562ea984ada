"""Differences between rows, paired by seed: t-intervals, and what so many seeds can detect."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import optimize, stats

LEVEL = 0.95
POWER = 0.8


@dataclass(frozen=True)
class Spread:
    """A figure over seeds.

    Attributes:
        n: seeds.
        mean: over them.
        sd: of one seed (n − 1 in the denominator); None for a single one.
    """

    n: int
    mean: float
    sd: float | None


@dataclass(frozen=True)
class Difference:
    """A row's figure less the baseline's, paired by seed.

    Attributes:
        n: seeds that both have.
        mean: of the differences.
        sd: of one difference; None for a single seed.
        low: of the 95 % t-interval of the mean; None likewise.
        high: likewise.
        p: of the two-sided paired t-test; None likewise.
        detectable: the least true difference that this test would find with 80 % power, were `sd` the true spread; None likewise.
    """

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None
    p: float | None
    detectable: float | None

    @property
    def significant(self) -> bool | None:
        """Whether the interval leaves out 0; None for a single seed."""
        return None if self.low is None or self.high is None else self.low > 0 or self.high < 0


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation of at least one value."""
    return Spread(len(values), float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)


def paired(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """The difference of two rows, seed by seed; at least one seed."""
    differences = np.subtract(values, baseline)
    found = spread(differences.tolist())
    if found.sd is None:
        return Difference(found.n, found.mean, None, None, None, None, None)
    error = found.sd / math.sqrt(found.n)
    half = float(stats.t.ppf((1 + LEVEL) / 2, found.n - 1)) * error
    t = abs(found.mean) / error if error > 0 else math.inf if found.mean else 0.0
    p = float(2 * stats.t.sf(t, found.n - 1))
    return Difference(
        found.n, found.mean, found.sd, found.mean - half, found.mean + half, p, detectable(found.sd, found.n)
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment of p-values, for as many tests at once (Holm 1979)."""
    order = np.argsort(p_values)
    adjusted = np.empty(len(p_values))
    running = 0.0
    for place, at in enumerate(order.tolist()):
        running = max(running, min(1.0, (len(p_values) - place) * p_values[at]))
        adjusted[at] = running
    return [float(value) for value in adjusted]


@cache
def _detectable_in_errors(n: int, level: float, power: float) -> float:
    """`detectable` in standard errors of the mean difference."""
    critical = stats.t.ppf((1 + level) / 2, n - 1)

    def missing(shift: float) -> float:
        return float(power - stats.nct.sf(critical, n - 1, shift))  # with the right sign

    high = 1.0
    while missing(high) > 0:
        high *= 2
    return float(optimize.brentq(missing, 0.0, high))


def detectable(sd: float, n: int, level: float = LEVEL, power: float = POWER) -> float:
    """The least true difference that a paired t-test over n ≥ 2 seeds finds with a given power.

    Args:
        sd: standard deviation of the difference of one seed.
        n: seeds.
        level: of the interval.
        power: chance of finding it.
    """
    return _detectable_in_errors(n, level, power) * sd / math.sqrt(n)
