"""Soft and hard caps, against the published loop and by their definitions."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.plan.quotas import hard_cap_rates, soft_cap_rates, standardised


def published_loop(logits, budget, alpha, batch, generator):
    """SCS as its paper states it: batches without replacement from softmax(s); each copy lowers the logit of its sample by α."""
    logits, copies = logits.copy(), np.zeros(len(logits), np.int64)
    for _ in range(budget // batch):
        gumbel = logits - np.log(-np.log(generator.random(len(logits))))  # the top ones: a draw without replacement
        drawn = np.argpartition(-gumbel, batch)[:batch]
        copies[drawn] += 1
        logits[drawn] -= alpha
    return copies


def test_rates_are_those_of_the_published_loop():
    """Means over ten bins of ranks within 2 %: 8,000 samples, three draws a sample, batches of 1 % of the pool, 60 repetitions."""
    generator = np.random.default_rng(1)
    logits = np.sort(generator.normal(size=8000))
    budget, alpha = 24_000, 0.15
    rates = soft_cap_rates(logits, np.ones(len(logits), np.int64), budget, alpha)
    assert rates.sum() == pytest.approx(budget)
    copies = np.mean([published_loop(logits, budget, alpha, 80, generator) for _ in range(60)], axis=0)
    means = copies.reshape(10, -1).mean(axis=1)
    np.testing.assert_allclose(rates.reshape(10, -1).mean(axis=1), means, rtol=0.02)
    assert means[-1] / means[0] > 15  # the cap is soft: not a uniform draw


scores = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=30)


@settings(max_examples=150, deadline=None)
@given(scores, st.integers(1, 500), st.floats(0.01, 10), st.data())
def test_soft_caps_meet_the_budget_and_their_own_equation(logits, budget, alpha, data):
    logits = np.array(logits, np.float64)
    members = np.array(data.draw(st.lists(st.integers(1, 50), min_size=len(logits), max_size=len(logits))))
    rates = soft_cap_rates(logits, members, budget, alpha)
    assert math.fsum(rates * members) == pytest.approx(budget, rel=1e-9)
    grown = alpha * rates  # e^(α·r) − 1 = α·τ·e^s, with one τ for all
    taus = grown + np.log(-np.expm1(-grown)) - logits
    np.testing.assert_allclose(taus, taus[0], atol=1e-6)
    order = np.argsort(logits, kind="stable")
    assert (np.diff(rates[order]) >= 0).all()


@settings(max_examples=150, deadline=None)
@given(scores, st.integers(1, 20), st.floats(0.001, 1), st.data())
def test_hard_caps_meet_the_budget_and_are_proportional_below_the_cap(logits, most, share, data):
    logits = np.array(logits, np.float64)
    members = np.array(data.draw(st.lists(st.integers(1, 50), min_size=len(logits), max_size=len(logits))))
    budget = max(1, int(share * most * members.sum()))
    rates = hard_cap_rates(logits, members, budget, most)
    assert math.fsum(rates * members) == pytest.approx(budget, rel=1e-9)
    assert (rates <= most * (1 + 1e-12)).all()
    free = rates < most * (1 - 1e-9)
    scale = rates / np.exp(logits)
    if free.any():
        np.testing.assert_allclose(scale[free], scale[free].max(), rtol=1e-6)
        assert (scale[~free] <= scale[free].max() * (1 + 1e-6)).all()  # a capped rate would be above the cap


def test_standardised_scores_have_mean_0_and_deviation_1():
    found = standardised(np.array([1.0, 5.0, 9.0]), np.array([3, 1, 2]))
    values = np.repeat(found, [3, 1, 2])
    assert values.mean() == pytest.approx(0, abs=1e-12) and values.std() == pytest.approx(1)
    assert not standardised(np.array([4.0]), np.array([7])).any()
