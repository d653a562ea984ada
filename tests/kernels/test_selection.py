import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.kernels.selection import from_ordered_bits, order_statistics, ordered_bits

numbers = st.one_of(
    st.floats(width=32, allow_nan=False), st.sampled_from([0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf")])
)


@given(st.lists(numbers, min_size=1, max_size=60))
@settings(max_examples=200, deadline=None)
def test_bits_sort_as_the_numbers_do(values):
    values = np.array(values, np.float32)
    bits = ordered_bits(values)
    assert np.array_equal(from_ordered_bits(bits), values)
    assert np.array_equal(bits[:, None] < bits, values[:, None] < values)


@given(st.lists(numbers, min_size=1, max_size=80), st.data())
@settings(max_examples=100, deadline=None)
def test_order_statistics_are_those_of_the_sorted_values(values, data):
    values = np.array(values, np.float32)
    cut = data.draw(st.integers(0, len(values)))
    ranks = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=5))
    found, below = order_statistics(lambda: [values[:cut], values[cut:]], ranks)
    assert np.array_equal(found, np.sort(values)[ranks])
    assert below.tolist() == [(values < value).sum() for value in found]


@pytest.mark.parametrize("spread", [1.0, 1e-6])  # many upper halves; one upper half for all
def test_order_statistics_of_many(spread):
    values = (1 + spread * np.random.default_rng(0).normal(size=50_000)).astype(np.float32)
    ranks = [0, 1, 777, 25_000, 49_999]
    found, below = order_statistics(lambda: np.array_split(values, 7), ranks)
    assert np.array_equal(found, np.sort(values)[ranks])
    assert below.tolist() == [(values < value).sum() for value in found]
