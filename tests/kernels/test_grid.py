import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.kernels.grid import GRID, row_chunks, row_norms, to_grid, unit_rows_on_grid

FIXED = settings(derandomize=True, deadline=None, max_examples=100)


def all_float16_up_to_one():
    values = np.arange(2**16, dtype=np.uint16).view(np.float16)
    return values[np.abs(values.astype(np.float32)) <= 1]


def test_every_float16_up_to_one_is_on_the_grid():
    values = all_float16_up_to_one()
    assert len(values) == 2 * (15 * 1024 + 1)
    steps = values.astype(np.float64) / GRID
    np.testing.assert_array_equal(steps, np.rint(steps))
    gridded = to_grid(values)
    assert gridded.dtype == np.float32
    np.testing.assert_array_equal(gridded.astype(np.float64), values.astype(np.float64))
    np.testing.assert_array_equal(to_grid(values.astype(np.float32)), gridded)


@FIXED
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30), st.sampled_from([np.float32, np.float64]))
def test_to_grid_rounds_to_the_nearest_multiple(values, dtype):
    values = np.array(values, dtype)
    gridded = to_grid(values)
    assert gridded.dtype == np.float32
    steps = gridded.astype(np.float64) / GRID
    np.testing.assert_array_equal(steps, np.rint(steps))
    assert (np.abs(gridded - values.astype(np.float64)) <= GRID / 2).all()
    np.testing.assert_array_equal(to_grid(gridded), gridded)


@pytest.mark.parametrize("dimension", [1, 3, 64, 768, 1024])
def test_dot_products_do_not_depend_on_order(unit_rows, dimension):
    x = to_grid(unit_rows(200, dimension, seed=1)).astype(np.float64)
    centroids = unit_rows_on_grid(unit_rows(30, dimension, seed=2, dtype=np.float64)).astype(np.float64)
    dots = x @ centroids.T
    rng = np.random.default_rng(0)
    for _ in range(3):
        order = rng.permutation(dimension)
        np.testing.assert_array_equal(x[:, order] @ centroids[:, order].T, dots)
    exact = [[math.fsum(row * centroid) for centroid in centroids] for row in x[:20]]  # products are exact in float64
    np.testing.assert_array_equal(dots[:20], exact)


@FIXED
@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 2**32))
def test_unit_rows_have_unit_norm(count, dimension, seed):
    rows = np.random.default_rng(seed).standard_normal((count, dimension)) * 10.0 ** np.arange(count)[:, None]
    rows[0] = 0
    unit = unit_rows_on_grid(rows)
    assert unit.dtype == np.float32
    steps = unit.astype(np.float64) / GRID
    np.testing.assert_array_equal(steps, np.rint(steps))
    norms = np.linalg.norm(unit.astype(np.float64), axis=1)
    assert norms[0] == 0
    np.testing.assert_allclose(norms[1:], 1, atol=GRID * dimension)
    if count > 1:
        expected = rows[1:] / np.linalg.norm(rows[1:], axis=1, keepdims=True)
        np.testing.assert_allclose(unit[1:], expected, atol=0.51 * GRID)


@pytest.mark.parametrize("dimension", [1, 5, 513])
def test_row_norms(unit_rows, dimension):
    rows = to_grid(unit_rows(50, dimension))
    rows[7] = 0
    squares = [math.fsum(row.astype(np.float64) ** 2) for row in rows]
    np.testing.assert_array_equal(row_norms(rows), np.sqrt(squares))


@pytest.mark.parametrize("wrong", [0.5, 1.06, 0.93, 30.0, np.nan, np.inf, -np.inf])
def test_row_norms_refuse_rows_that_are_not_normalised(wrong):
    rows = np.zeros((5, 3), np.float32)
    rows[0, 1] = rows[1, 0] = 1
    rows[3, 2] = wrong
    with pytest.raises(ValueError, match=r"row 3 has norm .*, not 1: normalise the rows first"):
        row_norms(rows)


@pytest.mark.parametrize("norm", [0.96, 1.04])
def test_row_norms_allow_the_rounding_of_stored_embeddings(norm):
    assert row_norms(to_grid(np.array([[norm, 0]]))) == pytest.approx([norm], abs=GRID)


@FIXED
@given(st.lists(st.integers(0, 20), max_size=6), st.integers(1, 25))
def test_row_chunks_cover_all_rows_in_order(lengths, rows):
    blocks = np.split(np.arange(sum(lengths))[:, None], np.cumsum(lengths))[: len(lengths)]
    chunks = list(row_chunks(blocks, rows))
    assert [first for first, _ in chunks] == [int(chunk[0, 0]) for _, chunk in chunks]
    assert [int(row) for _, chunk in chunks for row in chunk[:, 0]] == list(range(sum(lengths)))
    assert all(len(chunk) <= rows for _, chunk in chunks)
    assert len(chunks) == sum(-(-length // rows) for length in lengths)


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_row_chunks_leave_memory_mapped_rows_as_they_are(tmp_path, mode):
    expected = np.arange(12_000, dtype=np.float32).reshape(3000, 4)
    np.save(tmp_path / "rows.npy", expected)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode=mode)
    if mode != "r":
        mapped[2500] = expected[2500] = -1  # copy on write: the change is in memory alone
    for _ in range(2):
        np.testing.assert_array_equal(np.concatenate([chunk for _, chunk in row_chunks([mapped], 1000)]), expected)


def test_row_chunks_take_what_was_computed_from_memory_mapped_rows(tmp_path):
    np.save(tmp_path / "rows.npy", np.ones((10, 4), np.float16))
    computed = np.load(tmp_path / "rows.npy", mmap_mode="r").astype(np.float32)
    assert isinstance(computed, np.memmap)
    assert [len(chunk) for _, chunk in row_chunks([computed], 4)] == [4, 4, 2]
