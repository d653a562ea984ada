import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.kernels import density as density_module
from tailwise.kernels.density import NeighbourCounter, radius_that_holds, similarity_steps
from tailwise.kernels.grid import unit_rows_on_grid
from tailwise.kernels.kmeans import kmeans

FIXED = settings(derandomize=True, deadline=None, max_examples=100)


def cosine(row, centroid):
    """To the centroid's own rounding, which counts as of norm 1."""
    wide = row.astype(np.float64)
    return math.fsum(wide * centroid.astype(np.float64)) / math.sqrt(math.fsum(wide * wide))


def counted_one_by_one(x, centroids, radius):
    present = [row for row in x if row.any()]
    return [sum(cosine(row, centroid) >= radius for row in present) for centroid in centroids]


@st.composite
def rows_and_centroids(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count, k, dimension = draw(st.integers(0, 40)), draw(st.integers(1, 9)), draw(st.integers(1, 6))
    coarse = draw(st.booleans())  # many equal rows and angles
    rows, centroids = (
        rng.integers(-2, 3, (n, dimension)).astype(float) if coarse else rng.standard_normal((n, dimension))
        for n in (count, k)
    )
    centroids[~centroids.any(axis=1), 0] = 1
    return unit_rows_on_grid(rows).astype(draw(st.sampled_from([np.float16, np.float32]))), unit_rows_on_grid(centroids)


@FIXED
@given(rows_and_centroids(), st.floats(0.01, 1), st.integers(0, 10**6), st.sampled_from([1, 3, 2048]))
def test_counts_equal_a_plain_loop(given_rows, radius, pick, tile):
    x, centroids = given_rows
    present = [row for row in x if row.any()]
    if present and pick % 2:  # a pair exactly on the radius
        on_it = cosine(present[pick % len(present)], centroids[pick % len(centroids)])
        radius = on_it if on_it > 0 else radius
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TILE_ROWS", "TILE_CENTROIDS", "DEVICE_CANDIDATES"):
            patch.setattr(density_module, name, tile)
        counts = NeighbourCounter(centroids, radius, device="cpu")(x)
    assert counts.dtype == np.int64
    assert counts.tolist() == counted_one_by_one(x, centroids, radius)


def test_what_lies_on_the_radius_counts():
    centroid = np.array([[1, 0, 0, 0]], np.float32)
    x = np.full((3, 4), 0.5, np.float16)  # cosine 0.5 exactly
    assert NeighbourCounter(centroid, 0.5, device="cpu")(x).tolist() == [3]
    assert NeighbourCounter(centroid, float(np.nextafter(0.5, 1)), device="cpu")(x).tolist() == [0]


def test_the_cosine_is_of_the_rows_own_norm():
    centroid = np.array([[1, 0]], np.float32)
    long, short = np.array([[0.62, 0.80]]), np.array([[0.58, 0.80]])  # norms 1.012 and 0.988
    for row, at in ((long, 0.62), (short, 0.58)):
        own = cosine(row.astype(np.float16)[0], centroid[0])
        between = (own + at) / 2
        assert NeighbourCounter(centroid, between, device="cpu")(row.astype(np.float16)).tolist() == [int(own > at)]


def test_what_a_float32_product_gets_wrong_is_decided_exactly(unit_rows):
    """A radius in the middle of the cosines of thousands of nearly equal pairs."""
    rng = np.random.default_rng(0)
    centroid = unit_rows_on_grid(rng.standard_normal((1, 300)))
    x = unit_rows_on_grid(centroid + 1e-7 * rng.standard_normal((4000, 300)))
    cosines = np.array([cosine(row, centroid[0]) for row in x])
    radius = float(np.sort(cosines)[2000])
    assert np.unique(cosines).size > 100
    single = x @ centroid[0]
    assert ((single >= np.float32(radius)) != (cosines >= radius)).sum() > 100, "float32 alone must not be good enough"
    assert NeighbourCounter(centroid, radius, device="cpu")(x).tolist() == [int((cosines >= radius).sum())]


def test_pieces_add_up(blobs):
    x = blobs(3000, 24, 20)
    x[[0, 5, 1700]] = 0
    counter = NeighbourCounter(kmeans(x, 40, device="cpu").centroids, 0.6, device="cpu")
    whole = counter(x)
    assert whole.min() > 0
    np.testing.assert_array_equal(sum(counter(piece) for piece in np.array_split(x, 7)), whole)
    present = x[x.any(axis=1)]
    np.testing.assert_array_equal(counter(np.concatenate([present, present])), 2 * whole)


def test_rows_of_zeros_and_no_rows_count_nothing():
    counter = NeighbourCounter(np.array([[1, 0]], np.float32), 0.1, device="cpu")
    assert counter(np.zeros((5, 2), np.float16)).tolist() == [0]
    assert counter(np.empty((0, 2), np.float16)).tolist() == [0]


def test_rows_that_are_not_normalised_are_refused(unit_rows):
    x = unit_rows(50, 4, dtype=np.float32)
    x[7] *= 2
    with pytest.raises(ValueError, match="row 7 has norm 2, not 1"):
        NeighbourCounter(unit_rows(3, 4, dtype=np.float32), 0.5, device="cpu")(x)


def test_density_tells_common_from_rare_where_sizes_do_not():
    """k-means cuts what is common into many clusters: their sizes are those of the rare ones, their surroundings aren't."""
    rng = np.random.default_rng(0)
    axes = np.eye(12)
    label = np.repeat(np.arange(12), [2000, *[40] * 11])
    x = unit_rows_on_grid(axes[label] + 0.12 * rng.standard_normal((len(label), 12))).astype(np.float16)
    common = unit_rows_on_grid(
        x[label == 0][:50].astype(float)
    )  # as many centroids of the common one as make equal sizes
    rare = unit_rows_on_grid(axes[1:])
    counts = NeighbourCounter(np.concatenate([common, rare]), 0.7, device="cpu")(x)
    assert counts[:50].min() > 20 * counts[50:].max()


@FIXED
@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=60), st.floats(0, 1), st.integers(0, 60))
def test_the_radius_is_the_largest_step_that_enough_reach(values, share, cut):
    similarity = np.array(values, np.float32)
    histogram = similarity_steps(similarity[:cut]) + similarity_steps(similarity[cut:])
    assert histogram.sum() == len(values)
    radius = radius_that_holds(histogram, share)
    steps = [int(max(value, 0.0) / 1e-3) for value in similarity.astype(np.float64)]
    enough = [step for step in range(1, 1001) if sum(own >= step for own in steps) >= share * len(steps)]
    assert radius == max(enough, default=1) / 1000
