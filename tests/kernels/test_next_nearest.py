import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.kernels.assign import MISSING, Assigner, assign
from tailwise.kernels.grid import to_grid, unit_rows_on_grid
from tailwise.kernels.next_nearest import next_nearest


def reference(x, labels, centroids, count):
    dots = to_grid(x).astype(np.float64) @ to_grid(centroids).astype(np.float64).T
    found = np.full((len(x), count), MISSING, np.int32)
    for row, own in enumerate(labels):
        if own >= 0:
            order = [at for at in np.argsort(-dots[row], kind="stable") if at != own][:count]
            found[row, : len(order)] = order
    return found


@pytest.mark.parametrize(
    ("rows", "clusters", "dimension"), [(0, 5, 8), (900, 1, 8), (900, 2, 8), (900, 40, 24), (2000, 1500, 16)]
)
@pytest.mark.parametrize("count", [1, 3])
def test_equals_a_float64_reference(unit_rows, rows, clusters, dimension, count):
    x, centroids = unit_rows(rows, dimension), unit_rows(clusters, dimension, seed=1, dtype=np.float32)
    labels, _ = assign(x, centroids, device="cpu")
    labels[::7] = MISSING
    np.testing.assert_array_equal(
        next_nearest(x, labels, Assigner(centroids, device="cpu"), count), reference(x, labels, centroids, count)
    )


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), clusters=st.integers(2, 90), dimension=st.integers(1, 5), count=st.integers(1, 4))
def test_ties_go_to_the_lowest_index(seed, clusters, dimension, count):
    """Few directions, many equal centroids: more of them may be equally near than a list has places."""
    rng = np.random.default_rng(seed)
    x, centroids = (unit_rows_on_grid(rng.integers(-1, 2, (n, dimension)) + 0.0) for n in (50, clusters))
    centroids = centroids[centroids.any(axis=1)]
    if not len(centroids):
        return
    labels = rng.integers(-1, len(centroids), 50).astype(np.int32)  # any centroid may be the own one
    labels[~x.any(axis=1)] = MISSING
    np.testing.assert_array_equal(
        next_nearest(x, labels, Assigner(centroids, device="cpu"), count), reference(x, labels, centroids, count)
    )
