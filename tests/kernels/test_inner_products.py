"""The column of the greatest inner product, against NumPy in float64."""

import numpy as np
import pytest

from tailwise.kernels.inner_products import NONE, InnerProducts


@pytest.mark.parametrize(("rows", "columns", "dimension"), [(1, 1, 1), (50, 3, 7), (2500, 1500, 24), (0, 5, 4)])
@pytest.mark.parametrize("scale", [0.01, 1.0, 300.0])
def test_columns_of_any_norm(rows, columns, dimension, scale):
    rng = np.random.default_rng([rows, dimension])
    means = (scale * rng.uniform(0.1, 1, (columns, 1)) * rng.normal(size=(columns, dimension))).astype(np.float32)
    x = (rng.normal(size=(rows, dimension)) * rng.choice([0.1, 1, 20], (rows, 1))).astype(np.float16)
    expected = np.argmax(x.astype(np.float64) @ means.T.astype(np.float64), axis=1)
    np.testing.assert_array_equal(InnerProducts(means)(x), expected)


def test_ties_go_to_the_first_column_and_rows_that_are_not_finite_to_none():
    means = np.array([[1, 0], [0, 1], [1, 0], [0, 0]], np.float32)
    x = np.array([[2, 0], [0, 3], [-1, -1], [0, 0], [np.nan, 1], [np.inf, 0]], np.float32)
    assert InnerProducts(means)(x).tolist() == [0, 1, 3, 0, NONE, NONE]
