import numpy as np
import pytest

from tailwise.kernels.projection import principal_axes


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(("count", "dimension"), [(9000, 24), (7, 24), (50, 2)])
def test_axes_are_those_of_a_singular_value_decomposition(blobs, dtype, count, dimension):
    rows = blobs(count, dimension, 5, dtype=dtype)
    mean, axes = principal_axes(rows)
    wide = rows.astype(np.float64)
    expected = np.linalg.svd(wide - wide.mean(axis=0), full_matrices=False)[2][:2]
    expected *= np.sign(expected[[0, 1], np.abs(expected).argmax(axis=1)])[:, None]
    assert mean.dtype == axes.dtype == np.float32
    np.testing.assert_allclose(mean, wide.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(axes, expected, atol=0.02)
    np.testing.assert_allclose(axes @ axes.T, np.eye(2), atol=1e-6)


def test_the_order_of_the_rows_does_not_matter(blobs):
    rows = blobs(20_000, 16, 5)
    shuffled = rows[np.random.default_rng(0).permutation(len(rows))]
    for one, other in zip(principal_axes(rows), principal_axes(shuffled), strict=True):
        assert one.tobytes() == other.tobytes()


def test_few_rows_and_dimensions():
    mean, axes = principal_axes(np.empty((0, 3), np.float32))
    assert not mean.any()
    np.testing.assert_array_equal(np.abs(axes).sum(axis=1), 1)
    mean, axes = principal_axes(np.array([[1], [-1], [1], [1]], np.float16))
    assert (mean.tolist(), axes.tolist()) == ([0.5], [[1], [0]])
