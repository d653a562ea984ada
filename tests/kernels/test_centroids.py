import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.kernels.centroids import merge_centroids, neighbour_distance
from tailwise.kernels.grid import unit_rows_on_grid

FIXED = settings(derandomize=True, deadline=None, max_examples=150)


@st.composite
def centroid_sets(draw):
    count, dimension = draw(st.integers(1, 40)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = rng.integers(-2, 3, (count, dimension)) if draw(st.booleans()) else rng.standard_normal((count, dimension))
    rows = rows.astype(np.float64)
    rows[~rows.any(axis=1), 0] = 1
    return unit_rows_on_grid(rows)


def cosine(one, other):
    return math.fsum(one.astype(np.float64) * other.astype(np.float64))


def merged_one_by_one(centroids, threshold):
    kept = []
    for index in range(len(centroids)):
        if all(cosine(centroids[index], centroids[other]) < threshold for other in kept):
            kept.append(index)
    return kept


@FIXED
@given(centroid_sets(), st.floats(-0.9, 1), st.sampled_from([1, 2, 7, 1024]))
def test_merging_equals_a_plain_loop(centroids, threshold, block):
    kept = merge_centroids(centroids, threshold, block_rows=block)
    assert kept.dtype == np.int64
    assert kept.tolist() == merged_one_by_one(centroids, threshold)


@pytest.mark.parametrize("block", [1, 3, 1024])
def test_a_merged_centroid_merges_no_other(block):
    """0–1 and 1–2 are near, 0–2 are not: 2 is kept, as 1 is gone when its turn comes."""
    angles = np.radians([0, 40, 80, 120])
    chain = unit_rows_on_grid(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    assert merge_centroids(chain, 0.7, block_rows=block).tolist() == [0, 2]


def test_the_threshold_itself_merges():
    pair = np.array([[1, 0], [0.5, 0.75]], np.float32)  # cosine 0.5 exactly
    assert merge_centroids(pair, 0.5).tolist() == [0]
    assert merge_centroids(pair, np.nextafter(0.5, 1)).tolist() == [0, 1]


def test_merging_more_than_a_block(unit_rows):
    centroids = unit_rows_on_grid(unit_rows(2500, 3, dtype=np.float64))
    wide = centroids.astype(np.float64)
    near, kept = wide @ wide.T >= 0.97, []
    for index in range(len(near)):
        if not near[index, kept].any():
            kept.append(index)
    assert merge_centroids(centroids, 0.97).tolist() == kept
    assert 20 < len(kept) < 500


def test_no_centroids():
    assert merge_centroids(np.empty((0, 4), np.float32), 0.7).tolist() == []


@FIXED
@given(centroid_sets(), st.integers(1, 45), st.sampled_from([1, 2, 7, 1024]))
def test_neighbour_distance_equals_a_plain_loop(centroids, neighbours, block):
    distance = neighbour_distance(centroids, neighbours, block_rows=block)
    expected = []
    for index in range(len(centroids)):
        others = sorted(1 - cosine(centroids[index], other) for at, other in enumerate(centroids) if at != index)
        expected.append(math.fsum(others[:neighbours]) / max(len(others[:neighbours]), 1))
    assert distance.dtype == np.float64
    np.testing.assert_allclose(distance, expected, rtol=0, atol=1e-14)


def test_twenty_neighbours_by_default(unit_rows):
    centroids = unit_rows_on_grid(unit_rows(100, 8, dtype=np.float64))
    np.testing.assert_array_equal(neighbour_distance(centroids), neighbour_distance(centroids, 20))
    assert (neighbour_distance(centroids) > neighbour_distance(centroids, 19)).all()


def test_a_lone_centroid_has_no_neighbours():
    assert neighbour_distance(np.array([[1, 0]], np.float32)).tolist() == [0]


def test_a_copy_of_a_centroid_is_a_neighbour_but_the_centroid_itself_is_not():
    twins = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    np.testing.assert_array_equal(neighbour_distance(twins, 1), [0, 0, 1])
    np.testing.assert_array_equal(neighbour_distance(twins, 2), [0.5, 0.5, 1])
