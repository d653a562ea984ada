from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tailwise.kernels.spacing import space_out


def crowded(rows, distance):
    """How many rows of a sequence came less than `distance` before."""
    last, count = {}, 0
    for at, row in enumerate(rows):
        count += at - last.get(row, -distance) < distance
        last[row] = at
    return count


def shuffled(copies, seed):
    """Row r as often as copies[r] says, in a random order: int64 [n]."""
    rows = np.repeat(np.arange(len(copies)), copies)
    return np.random.default_rng(seed).permutation(rows) * 3 + 100  # row numbers are neither small nor dense


@st.composite
def sequences(draw):
    copies = draw(st.lists(st.integers(1, 20), min_size=1, max_size=60))
    return shuffled(copies, draw(st.integers(0, 10**6)))


@st.composite
def roomy(draw):
    """A sequence of 8 distances or more, in which the copies of any row, at that distance, take up to 70 % of it."""
    distance = draw(st.integers(1, 40))
    most = draw(st.integers(1, 20))
    total = max(8 * distance, int((most - 1) * distance / 0.7) + 1)
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))
    repeated = draw(st.floats(0, 1))  # share of the rows that come more than once
    copies = np.where(generator.random(total) < repeated, generator.integers(1, most + 1, total), 1)
    copies[0] = most
    copies = copies[: int(np.searchsorted(np.cumsum(copies), total)) + 1]
    return shuffled(copies, int(generator.integers(10**6))), distance


@settings(deadline=None)
@given(rows=sequences(), distance=st.integers(1, 50), edges=st.tuples(sequences(), sequences()), labelled=st.booleans())
def test_the_result_is_a_permutation_and_the_same_each_time(rows, distance, edges, labelled):
    labels = (rows % 7).astype(np.int32) if labelled else None
    given_rows, given_edges = rows.copy(), [edge.copy() for edge in edges]
    order = space_out(rows, distance, *edges, labels)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(len(rows)))
    assert np.array_equal(space_out(rows, distance, *edges, labels), order)
    assert np.array_equal(rows, given_rows)
    assert all(np.array_equal(edge, given_edge) for edge, given_edge in zip(edges, given_edges, strict=True))


@settings(deadline=None)
@given(case=roomy())
def test_equal_rows_stand_apart_where_there_is_room(case):
    rows, distance = case
    assert crowded(rows[space_out(rows, distance)], distance) == 0


@settings(deadline=None)
@given(count=st.integers(2, 60), repeats=st.integers(8, 20), seed=st.integers(0, 10**6))
def test_a_few_rows_over_and_over(count, repeats, seed):
    """Shuffles of the same rows, one after the other, at 70 % of the greatest distance there can be."""
    generator = np.random.default_rng(seed)
    rows = np.concatenate([generator.permutation(count) for _ in range(repeats)])
    distance = max(1, int(0.7 * count))
    assert crowded(rows[space_out(rows, distance)], distance) == 0


@settings(deadline=None)
@example(count=30, share=0.875, seed=14519)
@given(count=st.integers(30, 200), share=st.floats(0.01, 1), seed=st.integers(0, 10**6))
def test_one_row_of_many_copies_among_single_ones(count, share, seed):
    """Copies times distance fit the sequence.

    What the walk forward leaves crowded is in the last `distance` places; from there the walk back has room.
    """
    distance = 1 + seed % 20
    copies = np.ones(count, np.int64)
    copies[0] = max(1, int(share * (count - 1) / distance))
    rows = shuffled(copies, seed)
    assert copies[0] * distance <= len(rows)
    assert crowded(rows[space_out(rows, distance)], distance) == 0


@settings(deadline=None)
@given(rows=sequences(), distance=st.integers(1, 50))
def test_a_sequence_that_crowds_nowhere_stays(rows, distance):
    order = space_out(rows, distance)
    settled = rows[order]
    if crowded(settled, distance) == 0:
        assert np.array_equal(space_out(settled, distance), np.arange(len(rows)))


def test_only_what_crowds_changes_places():
    rows = np.arange(1000)
    rows[501] = rows[500]
    order = space_out(rows, 10)
    moved = np.flatnonzero(order != np.arange(1000))
    assert moved.tolist() == [501, 510]  # the nearest place where it may stand


def test_what_stands_beside_the_sequence_counts():
    rows = np.arange(100)
    before, after = np.arange(90, 140), np.arange(1000, 1050)
    before[-1], after[0] = 0, 99
    whole = np.concatenate([before[-20:], rows, after[:20]])
    assert crowded(whole, 20) > 0
    settled = rows[space_out(rows, 20, before, after)]
    assert crowded(np.concatenate([before[-20:], settled, after[:20]]), 20) == 0
    assert settled[0] != 0
    assert settled[-1] != 99
    assert np.array_equal(space_out(rows, 20), np.arange(100))  # without them nothing crowds


@settings(deadline=None)
@given(distance=st.integers(1, 25), edge=st.integers(0, 60), seed=st.integers(0, 10**6))
def test_edges_of_the_same_rows_are_kept_away_from(distance, edge, seed):
    """Three shuffles of the same rows, of which only the middle one may be arranged."""
    generator = np.random.default_rng(seed)
    before, rows, after = (generator.permutation(8 * distance) for _ in range(3))
    before, after = before[max(0, len(before) - edge) :], after[:edge]
    settled = rows[space_out(rows, distance, before, after)]
    whole = np.concatenate([before[-distance:], settled, after[:distance]])
    assert crowded(whole, distance) == 0


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), distance=st.integers(2, 30))
def test_labels_keep_their_places_where_that_suffices(seed, distance):
    generator = np.random.default_rng(seed)
    rows = np.concatenate([generator.permutation(200) for _ in range(3)])
    labels = (rows % 3).astype(np.int32)
    settled = rows[space_out(rows, distance, labels=labels)]
    assert crowded(settled, distance) == 0
    assert np.array_equal(settled % 3, rows % 3)


def test_labels_give_way_where_they_must():
    """Both copies of row 0 are all that its label has: they can only be parted by crossing labels."""
    rows = np.array([0, 0, *range(1, 50)])
    labels = np.minimum(rows, 1).astype(np.int32)
    assert crowded(rows[space_out(rows, 20, labels=labels)], 20) == 0


@pytest.mark.parametrize("labelled", [False, True])
def test_what_cannot_be_parted_is_left_in_some_order(labelled):
    """A pool smaller than the distance; so long a sequence that searching it to its end from every place would never end."""
    rows = np.random.default_rng(0).integers(0, 20_000, 300_000)
    labels = (rows % 11).astype(np.int32) if labelled else None
    order = space_out(rows, 32_768, labels=labels)
    assert np.array_equal(np.sort(order), np.arange(len(rows)))
    assert crowded(rows[order].tolist(), 32_768) < crowded(rows.tolist(), 32_768)


def test_the_smallest_sequences():
    assert space_out(np.empty(0, np.int64), 5).tolist() == []
    assert space_out(np.array([7]), 5, np.array([7]), np.array([7])).tolist() == [0]
    assert sorted(space_out(np.array([7, 7]), 5).tolist()) == [0, 1]
    assert Counter(space_out(np.array([1, 1, 2]), 2).tolist()) == Counter(range(3))
