"""Mean and standard deviation of float32 values, exactly: whole numbers are added up for each exponent, so that no order plays a role."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt

_LEAST, _EXPONENTS, _BITS = -149, 280, 24  # a float32 is a whole number below 2²⁴ in magnitude, times 2^(exponent − 24)


def exact_sums(values: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Return sums that `mean_and_deviation` takes, of finite values [n], n < 2²⁹: int64 [5, E]. Those of several arrays are added."""
    fractions, exponents = np.frexp(values.astype(np.float64))
    whole = fractions * 2.0**_BITS
    high, low = np.divmod(np.abs(whole), 2.0**12)
    terms = (np.ones(len(values)), whole, high * high, high * low, low * low)
    return np.array([np.bincount(exponents - _LEAST, term, _EXPONENTS) for term in terms]).astype(np.int64)


def mean_and_deviation(sums: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Return the mean and the standard deviation (that of the population) of all values in sums, of at least one."""
    count, total, squares = 0, Fraction(0), Fraction(0)
    for at, (ones, whole, high, both, low) in enumerate(sums.T.tolist()):
        unit = Fraction(2) ** (at + _LEAST - _BITS)
        count += ones
        total += whole * unit
        squares += ((high << 24) + (both << 13) + low) * unit**2
    mean = total / count
    return float(mean), math.sqrt(squares / count - mean**2)
