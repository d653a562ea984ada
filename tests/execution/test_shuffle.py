import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.execution.shuffle import write_value_ranks


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    labels=st.lists(st.integers(-1, 6), max_size=60),
    values=st.data(),
    cut=st.integers(0, 60),
    bucket_rows=st.integers(1, 100),
)
def test_ranks_are_those_of_a_plain_sort_whatever_the_buckets(tmp_path_factory, labels, values, cut, bucket_rows):
    labels = np.array(labels, np.int32)
    scores = np.array(
        [
            values.draw(st.sampled_from([0.0, -0.0, 0.25, 0.25000003, -0.5, 1.0, -1e30, 3e-42, float("inf")]))
            for _ in labels
        ],
        np.float32,
    )
    sizes = np.bincount(labels[labels >= 0], minlength=7)
    path = tmp_path_factory.mktemp("ranks") / "rank.npy"
    parts = [(labels[:cut], scores[:cut]), (labels[cut:], scores[cut:])]
    write_value_ranks(path, sizes, parts, bucket_rows=bucket_rows)
    expected = np.zeros(len(labels), np.uint32)
    for label in range(7):
        rows = [row for row in range(len(labels)) if labels[row] == label]
        for rank, row in enumerate(sorted(rows, key=lambda row: (scores[row], row))):
            expected[row] = rank
    assert np.array_equal(np.load(path), expected)
    assert [item.name for item in path.parent.iterdir()] == ["rank.npy"]


def test_the_spill_is_removed_after_an_error(tmp_path):
    def columns():
        yield np.zeros(3, np.int32), np.zeros(3, np.float32)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_value_ranks(tmp_path / "rank.npy", np.array([3]), columns())
    assert list(tmp_path.iterdir()) == []
