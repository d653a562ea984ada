"""Differences between rows, paired by seed: t-intervals, and what so many seeds can detect. Small numbers of seeds; plain NumPy.

For whole degrees of freedom, Student's distribution has a closed form (Abramowitz and Stegun, 26.7.3 and 26.7.4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

LEVEL = 0.95
POWER = 0.8
QUADRATURE = 4096


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
    half = student_quantile((1 + LEVEL) / 2, found.n - 1) * error
    t = abs(found.mean) / error if error > 0 else math.inf if found.mean else 0.0
    p = 2 * (1 - student_cdf(t, found.n - 1))
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


def student_cdf(t: float, df: int) -> float:
    """P(T ≤ t) for Student's t with a whole number of degrees of freedom."""
    if t < 0:
        return 1 - student_cdf(-t, df)
    angle = math.atan2(t, math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = 1.0, 0.0
    if df % 2:
        term = cosine
        for k in range(1, df - 1, 2):
            total += term
            term *= cosine**2 * (k + 1) / (k + 2)
        within = (angle + sine * total) * 2 / math.pi
    else:
        for k in range(0, df, 2):
            total += term
            term *= cosine**2 * (k + 1) / (k + 2)
        within = sine * total
    return 0.5 + within / 2


def student_quantile(p: float, df: int) -> float:
    """The t with P(T ≤ t) = p, for 0.5 ≤ p < 1."""
    return _solve(lambda t: student_cdf(t, df), p)


def detectable(sd: float, n: int, level: float = LEVEL, power: float = POWER) -> float:
    """The least true difference that a paired t-test over n ≥ 2 seeds finds with a given power.

    Args:
        sd: standard deviation of the difference of one seed.
        n: seeds.
        level: of the interval.
        power: chance of finding it.
    """
    return _detectable_in_errors(n, level, power) * sd / math.sqrt(n)


@cache
def _detectable_in_errors(n: int, level: float, power: float) -> float:
    """The same in standard errors of the mean difference."""
    df = n - 1
    critical = student_quantile((1 + level) / 2, df)
    # T = (Z + δ) / √(V / df), V chi-squared: the chance of |T| > critical is averaged over equally likely values of √(V / df).
    ratios = np.sqrt(_chi_squared(df) / df)

    def found(shift: float) -> float:
        return float(np.mean(_normal_cdf(shift - critical * ratios) + _normal_cdf(-shift - critical * ratios)))

    return _solve(found, power)


def _chi_squared(df: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Quantiles of chi-squared at the middles of QUADRATURE equal parts of probability, by its density's running sum."""
    highest = df + 12 * math.sqrt(2 * df) + 40
    roots = np.linspace(0, math.sqrt(highest), 1 << 17)  # of V: the density of the root is smooth, also for one degree
    density = np.exp((df - 1) * np.log(np.maximum(roots, 1e-300)) - roots**2 / 2)
    if df == 1:
        density[0] = 1.0
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    middles = (np.arange(QUADRATURE) + 0.5) / QUADRATURE
    quantiles: np.ndarray[tuple[int], np.dtype[np.float64]] = np.interp(middles, mass / mass[-1], roots) ** 2
    return quantiles


def _normal_cdf(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in values.tolist()])


def _solve(rising: Callable[[float], float], target: float) -> float:
    """The argument ≥ 0 at which a rising function reaches a target."""
    low, high = 0.0, 1.0
    while rising(high) < target:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < target else (low, middle)
    return high
