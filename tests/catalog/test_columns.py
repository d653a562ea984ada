"""Contract of columns over the rows of several parts."""

import gc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.catalog.catalog import Part
from tailwise.catalog.columns import PlainColumn, RowColumn, RowsByPart
from tailwise.errors import DamagedError

SIZES = {"one part": [40], "several": [7, 0, 1, 20, 12], "none": [], "empty": [0, 0]}


def parts_of(sizes):
    ends = np.cumsum([0, *sizes]).tolist()
    return [Part(number, ends[number], rows) for number, rows in enumerate(sizes)]


def column_of(folder, sizes, shape=()):
    """A column of the parts, and the same values as one array."""
    parts = parts_of(sizes)
    values = np.random.default_rng(0).integers(0, 1000, (sum(sizes), *shape)).astype(np.int32)
    column = PlainColumn(folder, "group")
    for part in parts:
        column.write(part, values[part.span])
    return RowColumn(column.path, parts, np.int32, shape), values


@pytest.mark.parametrize("shape", [(), (3,)])
@pytest.mark.parametrize("name", SIZES)
def test_rows_are_those_of_one_array(tmp_path, name, shape):
    column, values = column_of(tmp_path, SIZES[name], shape)
    assert len(column) == len(values)
    random = np.random.default_rng(1)
    rows = [slice(None), slice(5, 9), slice(3, 30), slice(10, 3), slice(0, 10**6), slice(-4, None), slice(1, 39, 5)]
    rows += [np.empty(0, np.int64)]
    if len(values):
        rows += [
            np.arange(40),
            np.sort(random.integers(0, 40, 30)),
            random.integers(0, 40, 90),
            np.array([3, 3, 39, 3]),
        ]
        rows += [np.array([39]), np.arange(8, 20)[::-1]]
    for wanted in rows:
        found = column[wanted]
        assert (found.dtype, found.shape) == (values.dtype, values[wanted].shape)
        assert np.array_equal(found, values[wanted])
    assert np.array_equal(np.asarray(column), values)


@settings(derandomize=True, deadline=None, max_examples=80)
@given(sizes=st.lists(st.integers(0, 5), max_size=8), data=st.data())
def test_any_rows_of_any_parts(tmp_path_factory, sizes, data):
    column, values = column_of(tmp_path_factory.mktemp("column"), sizes)
    total = sum(sizes)
    rows = np.array(data.draw(st.lists(st.integers(0, total - 1), max_size=20)) if total else [], np.int64)
    assert np.array_equal(column[rows], values[rows])
    assert np.array_equal(column[np.sort(rows)], values[np.sort(rows)])
    start, stop = sorted(data.draw(st.tuples(st.integers(0, total), st.integers(0, total))))
    assert np.array_equal(column[start:stop], values[start:stop])


def test_a_slice_inside_a_part_is_the_mapped_file(tmp_path):
    column, _ = column_of(tmp_path, [10, 20])
    for rows in (slice(0, 10), slice(12, 15)):
        assert not column[rows].flags.owndata
        assert not column[rows].flags.writeable
        assert np.shares_memory(column[rows], column[rows])
    assert column[5:15].flags.owndata


def test_other_rows_are_refused(tmp_path):
    column, _ = column_of(tmp_path, [4, 6])
    for rows in ([-1], [10], [0, 11, 3]):
        with pytest.raises(IndexError, match="not among 0 … 9"):
            column[np.array(rows)]


def test_only_files_with_wanted_rows_are_read_and_none_stays_open(tmp_path):
    parts, read = parts_of([5] * 30), []
    column, values = column_of(tmp_path, [5] * 30)

    def note(path):
        read.append(path.name)
        return np.load(path, mmap_mode="r")

    noted = RowColumn(PlainColumn(tmp_path, "group").path, parts, np.int32, read=note)
    assert np.array_equal(noted[np.array([12, 3, 11])], values[[12, 3, 11]])
    assert noted[6:9].tolist() == values[6:9].tolist()
    assert read == ["group.npy", "group-000002.npy", "group-000001.npy"]
    gc.collect()
    before = len([*Path("/proc/self/fd").iterdir()])
    column[:]
    assert len([*Path("/proc/self/fd").iterdir()]) == before


def test_values_stay_when_pages_are_released(tmp_path):
    column, values = column_of(tmp_path, [5000, 5000])
    held = column[10:4000]
    column.release_pages()
    column.release_pages()
    assert np.array_equal(held, values[10:4000])
    assert np.array_equal(column[:], values)


def test_a_file_that_does_not_fit_its_part_is_refused_by_name(tmp_path):
    column, _ = column_of(tmp_path, [4, 6])
    other = RowColumn(column.path, parts_of([4, 7]), np.int32)
    assert len(other[:4]) == 4
    with pytest.raises(DamagedError, match=r"group-000001\.npy holds int32 \[6\], and its part needs int32 \[7\]"):
        other[:]
    with pytest.raises(DamagedError, match=r"group\.npy holds int32"):
        RowColumn(column.path, parts_of([4, 6]), np.uint32)[np.array([1])]


def test_rows_are_split_by_part():
    rows = RowsByPart(parts_of([3, 0, 2, 4]))
    split = [(part.number, places if isinstance(places, slice) else places.tolist()) for part, places in
             rows.split(np.array([8, 0, 4, 1, 8]))]  # fmt: skip
    assert split == [(0, [1, 3]), (2, [2]), (3, [0, 4])]
    assert [(part.number, places) for part, places in rows.split(np.array([0, 0, 3, 8]))] == [
        (0, slice(0, 2)),
        (2, slice(2, 3)),
        (3, slice(3, 4)),
    ]
    assert [places for _, places in rows.split(np.array([7, 5]))] == [slice(None)]
