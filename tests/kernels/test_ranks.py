import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.kernels.ranks import appearance_ranks, value_ranks

FIXED = settings(derandomize=True, deadline=None, max_examples=150)
labels_of_rows = st.lists(st.integers(-2, 4), max_size=80).map(lambda labels: np.array(labels, np.int32))


def reference_ranks(labels, values):
    """In-cluster ranks by (value, row); 0 for rows of no cluster."""
    ranks = [0] * len(labels)
    for cluster in {label for label in labels if label >= 0}:
        members = [row for row in range(len(labels)) if labels[row] == cluster]
        for rank, row in enumerate(sorted(members, key=lambda row: (values[row], row))):
            ranks[row] = rank
    return ranks


@FIXED
@given(labels_of_rows)
def test_ranks_in_order_of_appearance(labels):
    seen = np.zeros(5, np.int64)
    ranks = appearance_ranks(labels, seen)
    assert ranks.dtype == np.uint32
    assert ranks.tolist() == reference_ranks(labels.tolist(), [0] * len(labels))
    np.testing.assert_array_equal(seen, np.bincount(labels[labels >= 0], minlength=5))


@FIXED
@given(labels_of_rows, st.lists(st.integers(0, 80), max_size=5))
def test_ranks_of_pieces_continue_one_another(labels, cuts):
    seen = np.zeros(5, np.int64)
    pieces = [
        appearance_ranks(piece, seen) for piece in np.split(labels, sorted(min(cut, len(labels)) for cut in cuts))
    ]
    np.testing.assert_array_equal(np.concatenate(pieces), appearance_ranks(labels, np.zeros(5, np.int64)))


def test_ranks_of_a_strided_view():
    labels = np.array([0, 9, 0, 9, 1, 9, 0, 9], np.int32)[::2]
    assert appearance_ranks(labels, np.zeros(2, np.int64)).tolist() == [0, 1, 0, 2]


@FIXED
@given(labels_of_rows, st.integers(0, 2**32))
def test_ranks_by_value(labels, seed):
    values = np.random.default_rng(seed).integers(-3, 3, len(labels)).astype(np.float32) / 4  # with ties
    ranks = value_ranks(labels, values)
    assert ranks.dtype == np.uint32
    assert ranks.tolist() == reference_ranks(labels.tolist(), values.tolist())


def test_ranks_by_infinite_and_signed_zero_values():
    labels = np.zeros(5, np.int32)
    values = np.array([np.inf, 0.0, -np.inf, -0.0, 1e-40], np.float32)
    assert value_ranks(labels, values).tolist() == [4, 1, 0, 2, 3]
