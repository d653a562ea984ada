"""Rates from scores, with a cap on the copies of a sample: SCS and HCS (FLYT, NeurIPS 2025, arXiv 2503.08805).

As published, SCS draws batches from softmax(s) without replacement, and lowers the score of what was drawn by α, until the budget is met.
These are the rates that this draw has in the limit of small batches.

M: number of different scores.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from tailwise.plan.quotas import fill_by_scale

Floats: TypeAlias = npt.NDArray[np.float64]
Integers: TypeAlias = npt.NDArray[np.int64]

FAINTEST = -600.0  # exp of it is above 0


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
