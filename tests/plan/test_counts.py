import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.plan.quotas import UNITS
from tailwise.plan.stream import StreamPosition, next_counts

FIXED = settings(derandomize=True, deadline=None, max_examples=60)


def reference_counts(schedule):
    """METHODS, stream, step 1, in plain integers."""
    clusters = len(schedule[0])
    deficit, epochs = [0] * clusters, []
    for quotas in schedule:
        floors = [int(quota) // UNITS for quota in quotas]
        extra = int(sum(map(int, quotas))) // UNITS - sum(floors)
        deficit = [
            owed + int(quota) - floor * UNITS for owed, quota, floor in zip(deficit, quotas, floors, strict=True)
        ]
        fractional = [cluster for cluster in range(clusters) if quotas[cluster] % UNITS]
        raised = sorted(fractional, key=lambda cluster: (-deficit[cluster], cluster))[:extra]
        for cluster in raised:
            floors[cluster] += 1
            deficit[cluster] -= UNITS
        epochs.append(floors)
    return epochs


def check_schedule(schedule, most_deviation=2.0):
    """Runs the epochs; checks each one, and the position after it."""
    position = StreamPosition.start(len(schedule[0]))
    owed = np.zeros(len(schedule[0]), np.int64)
    taken = np.zeros(len(schedule[0]), np.int64)
    for epoch, quotas in enumerate(schedule):
        given_quotas = quotas.copy()
        counts, position = next_counts(position, quotas)
        np.testing.assert_array_equal(quotas, given_quotas)
        assert int(counts.sum()) * UNITS == int(quotas.sum())
        assert (counts >= quotas // UNITS).all()
        assert (counts <= -(-quotas // UNITS)).all()  # so that whole quotas are met, neither exceeded nor missed
        owed, taken = owed + quotas - counts * UNITS, taken + counts
        assert np.abs(owed).max() < most_deviation * UNITS
        assert position.epoch == epoch + 1
        np.testing.assert_array_equal(position.taken, taken)
        np.testing.assert_array_equal(position.deficit, owed)


def test_200_epochs_of_50000_clusters(scaled_quotas):
    sizes = np.ceil(10 * np.random.default_rng(0).pareto(0.8, 50_000) + 1e-9).clip(max=10**6).astype(np.int64)
    quotas = scaled_quotas(sizes, int(sizes.sum()) // 50, 0.2)
    capped = quotas == sizes * UNITS
    assert 0.01 < capped.mean() < 0.99
    check_schedule([quotas] * 200)


@FIXED
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=40),
    st.lists(st.tuples(st.floats(0.001, 1), st.floats(0, 1)), min_size=1, max_size=30),
    st.sampled_from([1, 3]),
    st.integers(1, 8),
)
def test_budgets_and_alpha_that_vary(scaled_quotas, sizes, course, repeats, hold):
    most = repeats * sum(sizes)
    schedule = [scaled_quotas(sizes, max(1, int(share * most)), alpha, repeats) for share, alpha in course]
    check_schedule([quotas for quotas in schedule for _ in range(hold)])


@pytest.mark.parametrize("clusters", [3, 50, 1000])
def test_alpha_annealed_from_flat_to_proportional(scaled_quotas, clusters):
    sizes = np.ceil(10 * np.random.default_rng(clusters).pareto(0.8, clusters) + 1e-9).astype(np.int64)
    budgets = np.linspace(0.1, 0.6, 100) * sizes.sum()
    check_schedule([scaled_quotas(sizes, int(budgets[epoch]), epoch / 99) for epoch in range(100)])


@FIXED
@given(st.integers(1, 40), st.integers(0, 2**32), st.sampled_from([1, 4, 24]), st.sampled_from([0.01, 0.5, 1, 7]))
def test_fixed_quotas_of_any_size(rated_quotas, clusters, seed, grain, mean):
    rng = np.random.default_rng(seed)
    rates = np.minimum(rng.exponential(mean, clusters), 20)
    _, quotas = rated_quotas(np.ones(clusters, np.int64), np.rint(rates * grain) / grain if grain > 1 else rates)
    check_schedule([quotas] * 120)


@FIXED
@given(st.integers(1, 12), st.integers(0, 2**32), st.integers(1, 20))
def test_counts_equal_a_plain_reference(clusters, seed, epochs):
    rng = np.random.default_rng(seed)
    schedule = []
    for _ in range(epochs):
        quotas = rng.integers(0, 3 * UNITS, clusters) // 2 ** rng.integers(0, 29) * 2 ** rng.integers(0, 2)
        quotas[rng.random(clusters) < 0.3] = UNITS * rng.integers(0, 3)
        schedule.append(np.append(quotas, -int(quotas.sum()) % UNITS))
    position, counts = StreamPosition.start(clusters + 1), []
    for quotas in schedule:
        given_counts, position = next_counts(position, quotas)
        counts.append(given_counts.tolist())
    assert counts == reference_counts(schedule)


def test_ties_go_to_the_lower_index():
    counts, position = next_counts(StreamPosition.start(4), np.full(4, UNITS // 2))
    np.testing.assert_array_equal(counts, [1, 1, 0, 0])
    np.testing.assert_array_equal(next_counts(position, np.full(4, UNITS // 2))[0], [0, 0, 1, 1])


def test_ties_among_many_go_to_the_lower_indices():
    counts, position = next_counts(StreamPosition.start(1000), np.full(1000, UNITS // 4))
    np.testing.assert_array_equal(np.flatnonzero(counts), np.arange(250))
    counts, _ = next_counts(position, np.full(1000, UNITS // 4))
    np.testing.assert_array_equal(np.flatnonzero(counts), np.arange(250, 500))


def test_a_whole_quota_stays_whole_beside_fractional_ones():
    """An accumulated deficit must not push a capped cluster above its cap."""
    position = StreamPosition(1, np.array([0, 1, 1]), np.array([UNITS - 1, -UNITS // 2, 1 - UNITS // 2]))
    counts, _ = next_counts(position, np.array([2 * UNITS, UNITS // 2, UNITS // 2]))
    np.testing.assert_array_equal(counts, [2, 0, 1])


def test_quotas_that_sum_to_a_fraction_are_refused():
    with pytest.raises(ValueError, match=r"2\.5 samples, not to a whole number"):
        next_counts(StreamPosition.start(2), np.array([UNITS, UNITS + UNITS // 2]))
