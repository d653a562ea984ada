import math

import numpy as np
import pytest
import qpsolvers
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.errors import UserError
from tailwise.plan.quotas import UNITS, fill_by_scale, fill_by_shift, round_to_sum

FIXED = settings(derandomize=True, deadline=None, max_examples=150)


GAP = 1e-13  # of the solver's objective


def project_with_solver(targets, lower, upper, budget):
    """min Σ (q − t)² s.t. Σ q = budget, l ≤ q ≤ u, by an interior-point solver; in units of the largest bound.

    Returns the solution, and how far from the true one it may lie: ‖q − q*‖² is at most the gap of the objective.
    """
    scale = max(1.0, np.abs(upper).max())
    solution = qpsolvers.solve_qp(
        2 * scipy.sparse.eye_array(len(targets), format="csc"),
        -2 * targets / scale,
        A=scipy.sparse.csc_matrix(np.ones((1, len(targets)))),
        b=np.array([budget / scale]),
        lb=lower / scale,
        ub=upper / scale,
        solver="clarabel",
        tol_gap_abs=GAP,
        tol_gap_rel=GAP,
        tol_feas=GAP,
    )
    assert solution is not None
    objective = np.abs(solution * (solution - 2 * targets / scale)).sum()
    return solution * scale, scale * np.sqrt(GAP * max(1.0, objective))


def assert_optimal(quotas, targets, lower, upper, budget):
    """The optimality conditions: one λ = t − q of all free clusters; t − l ≤ λ at the lower bound, t − u ≥ λ at the upper."""
    slack = 1e-9 * max(1.0, np.abs(targets).max(), upper.max())
    assert (quotas >= lower).all()
    assert (quotas <= upper).all()
    assert math.fsum(quotas) == pytest.approx(budget, abs=slack)
    shift = targets - quotas
    most = shift[quotas > lower].min(initial=np.inf)  # who could give less must not want to give less than anybody ...
    least = shift[quotas < upper].max(initial=-np.inf)  # ... who could give more
    assert least <= most + slack


def scale_by_bisection(weights, lower, upper, budget):
    low, high = 0.0, float((upper / weights).max())
    for _ in range(200):
        middle = 0.5 * (low + high)
        if math.fsum(np.clip(middle * weights, lower, upper)) < budget:
            low = middle
        else:
            high = middle
    return np.clip(high * weights, lower, upper)


@st.composite
def shift_problems(draw):
    clusters = draw(st.one_of(st.integers(1, 6), st.integers(1, 300)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    upper = rng.integers(1, draw(st.sampled_from([2, 10, 1000])), clusters, endpoint=True).astype(np.float64)
    lower = np.minimum(upper, draw(st.sampled_from([0, 1, 3])))
    least, most = int(lower.sum()), int(upper.sum())
    budget = draw(st.one_of(st.integers(least, most), st.sampled_from([least, most, min(least + 1, most)])))
    weights = rng.random(clusters) ** draw(st.sampled_from([0, 1, 4, 30])) + 1e-6
    if draw(st.booleans()):
        weights = np.round(weights, 1) + 0.1  # many equal targets
    return weights / weights.sum() * budget, lower, upper, float(budget)


@FIXED
@given(shift_problems())
def test_fill_by_shift_solves_the_quadratic_program(problem):
    targets, lower, upper, budget = problem
    quotas = fill_by_shift(*problem)
    assert_optimal(quotas, targets, lower, upper, budget)
    np.testing.assert_allclose(quotas, project_with_solver(*problem)[0], rtol=0, atol=1e-6 * max(1.0, upper.max()))


def test_fill_by_shift_solves_the_quadratic_program_of_50000_clusters():
    rng = np.random.default_rng(0)
    upper = np.minimum(np.ceil(20 * rng.pareto(1, 50_000) + 1e-9), 3000)
    lower = np.minimum(upper, rng.integers(0, 3, 50_000))
    budget = float(np.floor(0.277 * upper.sum()))
    weights = np.exp(8 * rng.random(50_000))
    problem = weights / weights.sum() * budget, lower, upper, budget
    quotas = fill_by_shift(*problem)
    shares = [np.mean(quotas == upper), np.mean(quotas == lower), np.mean((quotas > lower) & (quotas < upper))]
    assert min(shares) > 0.01, f"the case must have clusters at either bound and free ones: {shares}"
    assert_optimal(quotas, *problem)
    solution, error = project_with_solver(*problem)
    assert error < 0.01
    np.testing.assert_allclose(quotas, solution, rtol=0, atol=error)


@pytest.mark.parametrize("clusters", [1, 2, 7])
def test_fill_by_shift_at_the_ends_of_the_budget(clusters):
    rng = np.random.default_rng(clusters)
    lower, upper = np.arange(clusters) + 1.0, 3.0 * np.arange(clusters) + 4.0
    targets = rng.normal(0, 100, clusters)
    np.testing.assert_allclose(fill_by_shift(targets, lower, upper, lower.sum()), lower, rtol=1e-13)
    np.testing.assert_allclose(fill_by_shift(targets, lower, upper, upper.sum()), upper, rtol=1e-13)


def test_fill_by_shift_of_equal_targets_is_equal_where_bounds_allow():
    upper = np.array([1.0, 50.0, 2.0, 50.0, 50.0])
    quotas = fill_by_shift(np.full(5, 7.0), np.ones(5), upper, 33.0)
    np.testing.assert_allclose(quotas, [1, 10, 2, 10, 10], rtol=1e-14)


def test_fill_by_shift_where_all_bounds_coincide():
    bounds = np.array([3.0, 1.0, 4.0])
    np.testing.assert_array_equal(fill_by_shift(np.array([9.0, -2.0, 4.0]), bounds, bounds, 8.0), bounds)


def test_fill_by_shift_leaves_feasible_targets_alone():
    targets = np.array([2.5, 3.25, 1.0, 13.25])
    np.testing.assert_array_equal(fill_by_shift(targets, np.zeros(4), np.full(4, 20.0), 20.0), targets)


def test_fill_by_shift_of_one_cluster_is_the_budget():
    assert fill_by_shift(np.array([3.0]), np.array([1.0]), np.array([9.0]), 5.0) == 5.0


@FIXED
@given(shift_problems(), st.floats(0, 1))
def test_fill_by_shift_gives_no_cluster_less_for_a_larger_budget(problem, share):
    targets, lower, upper, budget = problem
    more = budget + share * (float(upper.sum()) - budget)
    slack = 1e-9 * max(1.0, upper.max())
    assert (fill_by_shift(targets, lower, upper, more) >= fill_by_shift(*problem) - slack).all()


def test_fill_by_shift_refuses_a_budget_out_of_bounds():
    targets, lower, upper = np.ones(3), np.full(3, 400.0), np.full(3, 1000.0)
    with pytest.raises(UserError, match=r"1,199\b.*1,200\b"):
        fill_by_shift(targets, lower, upper, 1199)
    with pytest.raises(UserError, match=r"3,001\b.*3,000\b"):
        fill_by_shift(targets, lower, upper, 3001)


@st.composite
def scale_problems(draw):
    clusters = draw(st.one_of(st.integers(1, 6), st.integers(1, 300)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    sizes = np.ceil(rng.pareto(draw(st.sampled_from([0.7, 2.0])), clusters) * 5 + 1e-9).clip(max=1e6)
    alpha = draw(st.sampled_from([0.0, 0.2, 0.5, 1.0]))
    repeats = draw(st.sampled_from([1, 2, 255]))
    most = int(repeats * sizes.sum())
    budget = draw(st.one_of(st.integers(1, most), st.sampled_from([1, most, max(1, most - 1)])))
    return sizes, alpha, repeats, budget


@FIXED
@given(scale_problems())
def test_fill_by_scale_equals_bisection(problem):
    sizes, alpha, repeats, budget = problem
    weights, upper = sizes**alpha, repeats * sizes
    quotas = fill_by_scale(weights, np.zeros(len(weights)), upper, budget)
    assert (quotas > 0).all()
    assert (quotas <= upper).all()
    assert math.fsum(quotas) == pytest.approx(budget, rel=1e-12)
    np.testing.assert_allclose(quotas, scale_by_bisection(weights, np.zeros(len(weights)), upper, budget), rtol=1e-9)


@FIXED
@given(st.integers(1, 200), st.integers(0, 2**32), st.floats(0, 1))
def test_fill_by_scale_equals_bisection_for_any_weights(clusters, seed, share):
    rng = np.random.default_rng(seed)
    weights = np.exp(rng.uniform(-20, 20, clusters))
    upper = np.exp(rng.uniform(0, 10, clusters))
    budget = share * float(upper.sum())
    quotas = fill_by_scale(weights, np.zeros(len(weights)), upper, budget)
    assert (quotas <= upper).all()
    assert math.fsum(quotas) == pytest.approx(budget, rel=1e-12)
    np.testing.assert_allclose(
        quotas, scale_by_bisection(weights, np.zeros(len(weights)), upper, budget), rtol=1e-7, atol=1e-12
    )


@FIXED
@given(st.integers(1, 300), st.integers(0, 2**32), st.floats(0, 1))
def test_fill_by_scale_within_lower_and_upper_bounds_equals_bisection(clusters, seed, share):
    rng = np.random.default_rng(seed)
    weights = 10.0 ** rng.uniform(-3, 3, clusters)
    upper = np.ceil(10.0 ** rng.uniform(0, 5, clusters))
    lower = np.minimum(np.floor(10.0 ** rng.uniform(-1, 3, clusters)), upper)
    budget = lower.sum() + share * (upper.sum() - lower.sum())
    quotas = fill_by_scale(weights, lower, upper, budget)
    assert ((quotas >= lower) & (quotas <= upper)).all()
    assert math.fsum(quotas) == pytest.approx(budget, rel=1e-12)
    np.testing.assert_allclose(quotas, scale_by_bisection(weights, lower, upper, budget), rtol=1e-9, atol=1e-9)


@FIXED
@given(scale_problems(), st.floats(0, 1))
def test_fill_by_scale_gives_no_cluster_less_for_a_larger_budget(problem, share):
    sizes, alpha, repeats, budget = problem
    more = budget + share * (float((repeats * sizes).sum()) - budget)
    few, many = (fill_by_scale(sizes**alpha, 0 * sizes, repeats * sizes, total) for total in (budget, more))
    assert (many >= few * (1 - 1e-12)).all()


@FIXED
@given(scale_problems())
def test_larger_clusters_give_more_at_a_lower_rate(problem):
    sizes, alpha, repeats, budget = problem
    quotas = fill_by_scale(sizes**alpha, 0 * sizes, repeats * sizes, budget)
    members = sizes.astype(np.int64)
    upper = repeats * members * UNITS
    units = round_to_sum(quotas * UNITS, budget * UNITS, np.zeros_like(upper), upper, members)
    assert int(units.sum()) == budget * UNITS
    order = np.argsort(members, kind="stable")
    size, quota = members[order], units[order]
    larger = size[1:] > size[:-1]
    # Rounding moves a quota by less than one unit, and float arithmetic of large quotas by a few ulps.
    slack = 1 + np.ceil(4 * np.spacing(quota[1:].astype(np.float64))).astype(np.int64)
    assert (quota[1:] >= quota[:-1] - slack)[larger].all()
    rate = quota / size
    assert (rate[1:] <= rate[:-1] * (1 + 1e-14) + slack / size[:-1])[larger].all()


@pytest.mark.parametrize("repeats", [1, 3])
def test_fill_by_scale_of_the_whole_pool_is_the_bound(repeats):
    sizes = np.array([1.0, 7.0, 100.0, 3.0])
    np.testing.assert_allclose(
        fill_by_scale(sizes**0.2, 0 * sizes, repeats * sizes, repeats * 111.0), repeats * sizes, rtol=1e-15
    )


def test_fill_by_scale_refuses_more_than_there_is():
    with pytest.raises(UserError, match=r"3,001\b.*3,000\b.*`max_repeats`"):
        fill_by_scale(np.ones(3), np.zeros(3), np.full(3, 1000.0), 3001)


@st.composite
def rounding_problems(draw):
    clusters = draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    lower = rng.integers(0, 3, clusters)
    upper = lower + rng.integers(0, draw(st.sampled_from([1, 3, 500])), clusters, endpoint=True)
    total = draw(st.integers(int(lower.sum()), int(upper.sum())))
    return rng, lower, upper, total, rng.integers(0, 4, clusters)


@FIXED
@given(rounding_problems())
def test_rounding_moves_feasible_values_by_less_than_one(problem):
    rng, lower, upper, total, priority = problem
    targets = rng.random(len(lower)) * total
    values = fill_by_shift(targets, lower.astype(np.float64), upper.astype(np.float64), total)
    rounded = round_to_sum(values, total, lower, upper, priority)
    assert rounded.dtype == np.int64
    assert int(rounded.sum()) == total
    assert ((rounded >= lower) & (rounded <= upper)).all()
    assert (np.abs(rounded - values) < 1).all()
    raised = (rounded > values) & (values % 1 > 0)
    lowered = (rounded < values) & (rounded < upper)
    if raised.any() and lowered.any():  # nobody is rounded up before one with a larger remainder
        assert (values[raised] % 1).min() >= (values[lowered] % 1).max()


@FIXED
@given(rounding_problems(), st.floats(0.1, 10))
def test_rounding_meets_the_total_and_the_bounds_from_any_values(problem, factor):
    rng, lower, upper, total, priority = problem
    values = rng.random(len(lower)) * factor * (upper + 1)
    rounded = round_to_sum(values, total, lower, upper, priority)
    assert int(rounded.sum()) == total
    assert ((rounded >= lower) & (rounded <= upper)).all()


def test_rounding_raises_the_largest_remainders_first():
    values = np.array([0.2, 1.7, 2.6, 0.5])
    bounds = np.zeros(4, np.int64), np.full(4, 9, np.int64)
    np.testing.assert_array_equal(round_to_sum(values, 5, *bounds, np.zeros(4, np.int64)), [0, 2, 3, 0])
    np.testing.assert_array_equal(round_to_sum(values, 6, *bounds, np.zeros(4, np.int64)), [0, 2, 3, 1])


def test_rounding_breaks_ties_by_priority_then_by_index():
    values, lower, upper = np.full(6, 1.5), np.zeros(6, np.int64), np.full(6, 9, np.int64)
    priority = np.array([1, 3, 2, 3, 1, 3])
    expected = {7: [1, 2, 1, 1, 1, 1], 8: [1, 2, 1, 2, 1, 1], 9: [1, 2, 1, 2, 1, 2], 10: [1, 2, 2, 2, 1, 2]}
    for total, quotas in {**expected, 11: [2, 2, 2, 2, 1, 2]}.items():
        np.testing.assert_array_equal(round_to_sum(values, total, lower, upper, priority), quotas)


def test_rounding_passes_over_full_clusters():
    values, upper = np.array([1.9, 1.8, 1.1]), np.array([1, 9, 9])
    rounded = round_to_sum(values, 5, np.zeros(3, np.int64), upper, np.zeros(3, np.int64))
    np.testing.assert_array_equal(rounded, [1, 2, 2])


def test_rounding_of_units_is_exact_at_the_largest_budgets():
    sizes = np.array([1, 5, 10**6, 8 * 10**9])
    budget = 7 * 10**9
    quotas = fill_by_scale(sizes.astype(np.float64) ** 0.2, np.zeros(len(sizes)), sizes.astype(np.float64), budget)
    units = round_to_sum(quotas * UNITS, budget * UNITS, np.zeros_like(sizes), sizes * UNITS, sizes)
    assert sum(map(int, units)) == budget * UNITS
    np.testing.assert_allclose(units / UNITS, quotas, rtol=1e-6)  # a float64 of 2⁶² units is a multiple of 1024
