"""Intervals, p-values and power against SciPy."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tailwise.compare.statistics import detectable, holm, paired, spread


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=8).filter(
        lambda pairs: np.std([a - b for a, b in pairs]) > 1e-6
    )
)
@settings(max_examples=50, deadline=None)
def test_a_paired_difference_is_scipys_paired_t_test(pairs):
    values, baseline = zip(*pairs, strict=True)
    mine = paired(values, baseline)
    theirs = stats.ttest_rel(values, baseline)
    interval = theirs.confidence_interval(0.95)
    assert (mine.low, mine.high) == pytest.approx((interval.low, interval.high), rel=1e-6, abs=1e-9)
    assert mine.p == pytest.approx(theirs.pvalue, abs=1e-9)
    if not math.isclose(mine.p, 0.05, rel_tol=1e-6):
        assert mine.significant == (mine.p < 0.05)


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_the_detectable_difference_is_found_as_often_as_a_simulation_says(n):
    draws = np.random.default_rng(n).normal(detectable(0.7, n), 0.7, (200_000, n))
    t = draws.mean(axis=1) / (draws.std(axis=1, ddof=1) / math.sqrt(n))
    assert np.mean(np.abs(t) > stats.t.ppf(0.975, n - 1)) == pytest.approx(0.8, abs=0.005)


def test_one_seed_says_nothing_and_equal_rows_differ_in_nothing():
    alone = paired([0.3], [0.2])
    assert alone.mean == pytest.approx(0.1)
    assert (alone.low, alone.p, alone.significant, alone.detectable) == (None, None, None, None)
    same = paired([0.1, 0.2], [0.1, 0.2])
    assert (same.mean, same.p, same.significant) == (0, 1, False)
    constant = paired([0.2, 0.3], [0.1, 0.2])
    assert constant.significant
    assert spread([1.0, 2.0, 4.0]).sd == pytest.approx(np.std([1, 2, 4], ddof=1))


def test_holms_adjustment():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
