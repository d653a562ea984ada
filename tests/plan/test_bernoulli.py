import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.plan.bernoulli import bernoulli_copies

FIXED = settings(derandomize=True, deadline=None, max_examples=100)
ROWS = np.arange(200_000)


@pytest.mark.parametrize("rate", [0.0001, 0.003, 0.25, 0.5, 0.9, 1.0, 1.3, 2.0, 19.99, 254.5])
def test_copies_are_floor_or_ceil_and_average_to_the_rate(rate):
    rates = np.full(len(ROWS), rate, np.float32)
    exact = float(rates[0])
    copies = bernoulli_copies(1, 0, ROWS, rates)
    assert copies.dtype == np.uint8
    assert set(np.unique(copies)) <= {int(np.floor(exact)), int(np.ceil(exact))}
    part = exact - np.floor(exact)
    error = np.sqrt(part * (1 - part) / len(ROWS))
    assert abs(copies.mean() - exact) <= 4 * error


@FIXED
@given(st.lists(st.floats(0, 255, width=32), min_size=1, max_size=50), st.integers(0, 2**63), st.integers(0, 10**9))
def test_copies_are_floor_or_ceil_of_each_rows_own_rate(rates, seed, epoch):
    rates = np.array(rates, np.float32)
    copies = bernoulli_copies(seed, epoch, np.arange(len(rates)), rates)
    assert (copies >= np.floor(rates)).all()
    assert (copies <= np.ceil(rates)).all()


def test_whole_rates_are_met():
    rates = np.array([0, 1, 2, 255], np.float32)
    np.testing.assert_array_equal(bernoulli_copies(0, 3, np.arange(4), rates), [0, 1, 2, 255])
    np.testing.assert_array_equal(
        bernoulli_copies(0, 3, np.arange(4), rates.astype(np.float64), np.arange(4, dtype=np.int32)), [0, 1, 2, 255]
    )


@FIXED
@given(st.lists(st.integers(0, 2999), max_size=80), st.integers(0, 2**63), st.integers(0, 1000))
def test_the_draw_of_some_rows_is_that_part_of_the_whole_draw(rows, seed, epoch):
    rows = np.array(rows, np.int64)
    rng = np.random.default_rng(0)
    rates = rng.exponential(1, 3000).astype(np.float32)
    labels = rng.integers(-1, 7, 3000).astype(np.int32)
    all_rows = np.arange(3000)
    whole = bernoulli_copies(seed, epoch, all_rows, rates)
    np.testing.assert_array_equal(bernoulli_copies(seed, epoch, rows, rates[rows]), whole[rows])
    cluster_rates = np.array([0.1, 0.5, 0.99, 1.5, 3.2, 0.0, 1.0])
    whole = bernoulli_copies(seed, epoch, all_rows, cluster_rates, labels)
    np.testing.assert_array_equal(bernoulli_copies(seed, epoch, rows, cluster_rates, labels[rows]), whole[rows])


def test_rates_of_clusters_are_rates_of_their_rows():
    rng = np.random.default_rng(1)
    cluster_rates = np.array([0.125, 0.5, 1.75, 3.0])  # the same in float32
    labels = rng.integers(-1, 4, 10_000).astype(np.int32)
    rates = np.where(labels < 0, 0, cluster_rates[labels]).astype(np.float32)
    rows = rng.permutation(10**6)[:10_000]
    np.testing.assert_array_equal(
        bernoulli_copies(3, 2, rows, cluster_rates, labels), bernoulli_copies(3, 2, rows, rates)
    )


def test_rows_without_a_cluster_are_never_drawn():
    labels = np.array([-1, 0, -1], np.int32)
    np.testing.assert_array_equal(bernoulli_copies(0, 0, np.arange(3), np.array([1.0]), labels), [0, 1, 0])


def test_a_higher_rate_never_takes_a_sample_away():
    low, high = (bernoulli_copies(0, 0, ROWS, np.full(len(ROWS), rate, np.float32)) for rate in (0.3, 0.6))
    assert (high >= low).all()


def agreement(first, second):
    """z of how often two draws of rate 0.3 hold the same row, against independence."""
    expected = first.mean() * second.mean()
    return ((first & second).mean() - expected) / (0.3 * 0.7 / np.sqrt(len(first)))


def draw(seed, epoch, first_row=0):
    rates = np.full(len(ROWS), 0.3, np.float32)
    return bernoulli_copies(seed, epoch, first_row + ROWS, rates)


@pytest.mark.parametrize(
    "other",
    [(5, 1), (5, 2), (5, 1000), (6, 0), (4, 0), (0, 5), (5 + 2**32, 0), (-5, 0), (5, 0, 1), (5, 0, 2), (5, 0, 2**32)],
)
def test_epochs_seeds_and_rows_are_independent(other):
    assert abs(agreement(draw(5, 0), draw(*other))) < 4


def test_neighbouring_seeds_and_epochs_are_not_shifts_of_each_other():
    assert abs(agreement(draw(5, 0), draw(4, 1))) < 4
    assert abs(agreement(draw(5, 0, 1), draw(5, 1, 0))) < 4
    assert abs(agreement(draw(5, 1, 0), draw(5, 0, 10**6))) < 4


def test_repeats_over_epochs_are_binomial():
    epochs = 40
    seen = np.sum([draw(0, epoch)[:20_000] for epoch in range(epochs)], axis=0)
    counts = np.bincount(seen, minlength=epochs + 1)
    expected = 20_000 * scipy.stats.binom.pmf(np.arange(epochs + 1), epochs, np.float32(0.3))
    common = expected > 10
    assert (
        scipy.stats.chisquare(counts[common], expected[common] * counts[common].sum() / expected[common].sum())[1]
        > 1e-3
    )


def test_golden_draw():
    """A plan drawn by another release must not change."""
    rates = np.array([0.1, 0.5, 0.9, 1.4, 2.5], np.float32)
    golden = {
        (0, 0): "0012300112011230111200112011120111300123",
        (0, 1): "1012300012011120011300112011130012301122",
        (2026, 7): "0111300113001120111201123001120012200112",
    }
    for (seed, epoch), expected in golden.items():
        assert "".join(map(str, bernoulli_copies(seed, epoch, np.arange(40), np.tile(rates, 8)))) == expected
