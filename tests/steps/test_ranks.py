import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.catalog.catalog import Part
from tailwise.catalog.columns import PartColumn, PlainColumn
from tailwise.context import Context
from tailwise.steps.ranks import write_appearance_ranks, write_value_ranks


def columns(folder, groups, values, cut):
    """Columns of groups and values in two parts, and the parts."""
    parts = [Part(0, 0, cut), Part(1, cut, len(groups) - cut)]
    made = []
    for name, column in (("group", groups), ("value", values)):
        made.append(PartColumn(folder, name))
        for part in parts:
            made[-1].write(part, column[part.span])
    return *made, PlainColumn(folder, "rank"), parts


def plain_ranks(groups, key):
    expected = np.zeros(len(groups), np.uint32)
    for group in range(7):
        rows = [row for row in range(len(groups)) if groups[row] == group]
        for rank, row in enumerate(sorted(rows, key=key)):
            expected[row] = rank
    return expected


VALUES = [0.0, -0.0, 0.25, 0.25000003, -0.5, 1.0, -1e30, 3e-42, float("inf")]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    groups=st.lists(st.integers(-1, 6), max_size=60),
    values=st.data(),
    cut=st.integers(0, 60),
    bucket_rows=st.integers(1, 100),
    sign=st.sampled_from([1, -1]),
)
def test_ranks_are_those_of_a_plain_sort_whatever_the_buckets(tmp_path_factory, groups, values, cut, bucket_rows, sign):
    groups = np.array(groups, np.int32)
    values = np.array([values.draw(st.sampled_from(VALUES)) for _ in groups], np.float32)
    folder = tmp_path_factory.mktemp("ranks")
    *made, ranks, parts = columns(folder, groups, values, min(cut, len(groups)))
    sizes = np.bincount(groups[groups >= 0], minlength=7)
    write_value_ranks(*made, sign, ranks, sizes, parts, Context(), bucket_rows=bucket_rows)
    found = np.concatenate([ranks.read(part) for part in parts])
    assert np.array_equal(found, plain_ranks(groups, lambda row: (sign * values[row], row)))
    assert {path.name for path in folder.iterdir() if path.name.startswith("rank")} == {"rank.npy", "rank-000001.npy"}
    for part in parts:
        ranks.path(part).unlink()
    write_appearance_ranks(made[0], ranks, 7, parts, Context())
    assert np.array_equal(np.concatenate([ranks.read(part) for part in parts]), plain_ranks(groups, int))


def test_ranks_that_are_there_are_not_written_again(tmp_path):
    groups = np.arange(20, dtype=np.int32) % 3
    *made, ranks, parts = columns(tmp_path, groups, -np.arange(20, dtype=np.float32), 12)
    expected = np.empty(20, np.uint32)
    for write in (
        lambda: write_value_ranks(*made, 1, ranks, np.bincount(groups), parts, Context()),
        lambda: write_appearance_ranks(made[0], ranks, 3, parts, Context()),
    ):
        for part in parts:
            ranks.path(part).unlink(missing_ok=True)
        write()
        expected = [ranks.read(part).tolist() for part in parts]
        ranks.path(parts[1]).unlink()
        before = ranks.path(parts[0]).stat()
        write()
        assert [ranks.read(part).tolist() for part in parts] == expected
        assert ranks.path(parts[0]).stat() == before


def test_the_spill_is_removed_after_an_error(tmp_path):
    *made, ranks, parts = columns(tmp_path, np.zeros(3, np.int32), np.zeros(3, np.float32), 2)
    made[1].path(parts[1]).unlink()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(Exception, match="value-part-000001"):
        write_value_ranks(*made, 1, ranks, np.array([3]), parts, Context())
    assert sorted(tmp_path.iterdir()) == before


def test_the_spill_of_a_run_that_was_killed_at_its_end_is_removed(tmp_path):
    *made, ranks, parts = columns(tmp_path, np.zeros(3, np.int32), np.zeros(3, np.float32), 2)
    write_value_ranks(*made, 1, ranks, np.array([3]), parts, Context())
    before = sorted(tmp_path.iterdir())
    (tmp_path / "rank.spill" / "ranks").mkdir(parents=True)
    write_value_ranks(*made, 1, ranks, np.array([3]), parts, Context())
    assert sorted(tmp_path.iterdir()) == before
