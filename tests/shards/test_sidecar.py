"""Sidecars: each row is used, or counted by reason; no sample gets the values of another row."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.shards.metadata import read_sidecar

UID = "00112233445566778899aabbccddeeff"


@pytest.fixture
def read(tmp_path):
    """`read(columns, keys)` → what a sidecar of these columns tells of a tar with these keys."""

    def run(columns, keys):
        table = columns if isinstance(columns, pa.Table) else pa.table(columns)
        pq.write_table(table, tmp_path / "00000.parquet")
        return read_sidecar(str(tmp_path / "00000.tar"), dict.fromkeys(keys))

    return run


def counts(sidecar):
    return {row["reason"]: row["rows"] for row in sidecar.rejected}


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.binary(1),
        pa.dictionary(pa.int8(), pa.string()),
    ],
)
def test_keys_of_any_type(read, kind):
    found = read({"key": pa.array(["a", "b"]).cast(kind), "width": [1.0, float("nan")], "score": [3, None]}, "ab")
    assert found.rows == {"a": {"width": 1, "score": 3.0}, "b": {}}
    assert counts(found) == {}


@pytest.mark.parametrize("kind", [pa.int64(), pa.uint8(), pa.float64()])
def test_numbers_are_the_keys_that_lost_their_zeros(read, kind):
    found = read({"key": pa.array([7, 0], kind), "s": [1, 2]}, ["000", "007"])
    assert found.rows == {"007": {"s": 1.0}, "000": {"s": 2.0}}
    assert counts(found) == {}


def test_numbers_that_may_be_several_keys(read):
    found = read({"key": [7, 8, 9], "s": [1, 2, 3]}, ["007", "07", "8"])
    assert found.rows == {"8": {"s": 2.0}}
    assert counts(found) == {"ambiguous key": 1, "row without sample": 1, "sample without row": 2}


def test_keys_of_text_must_be_the_tars_own(read):
    found = read({"key": ["7", "8"], "s": [1, 2]}, ["007", "008"])
    assert found.rows == {}
    assert counts(found) == {"sidecar matches no sample": 2}
    assert "'7'" in found.rejected[0]["detail"]
    assert "'007'" in found.rejected[0]["detail"]


def test_a_key_given_twice(read):
    found = read({"key": ["a", "b", "a", "b"], "s": [1, 2, 1, 3]}, "ab")
    assert found.rows == {"a": {"s": 1.0}}
    assert counts(found) == {"key given twice with different values": 2, "row given twice": 1}


def test_odd_columns_are_left_out_and_counted(read):
    columns = {
        "key": ["a", "b"],
        "width": [[1], [2]],
        "height": [-1, 5],
        "hash": [2**60, 1],
        "uid": [UID, "x"],
        "s": [1, 2],
    }
    found = read(columns, "ab")
    assert found.rows == {"a": {"uid": bytes.fromhex(UID), "s": 1.0}, "b": {"height": 5, "s": 2.0}}
    assert Counter(row["reason"] for row in found.rejected) == {
        "column not used": 2, "height is no whole number of pixels": 1, "uid is not 32 hexadecimal digits": 1,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["key", "uid", "width", "status"])
def test_two_columns_of_one_name(read, name):
    table = pa.Table.from_arrays([pa.array(["a"])] * 5, ["key", "status", "uid", "width", name])
    found = read(table, "a")
    assert found.rows == {}
    assert counts(found) == {"unreadable sidecar": 1}


@settings(max_examples=60, deadline=None)
@given(
    keys=st.lists(st.integers(0, 30), max_size=12),
    rows=st.lists(st.tuples(st.one_of(st.none(), st.integers(0, 30)), st.integers(0, 2)), max_size=30),
    kind=st.sampled_from(["text", "number"]),
)
def test_rows_read_are_used_or_counted(tmp_path_factory, keys, rows, kind):
    folder = tmp_path_factory.mktemp("sidecar")
    tar_keys = dict.fromkeys(f"{key:04d}" for key in keys)
    named = [key if kind == "number" or key is None else f"{key:04d}" for key, _ in rows]
    column = pa.array(named, pa.int64() if kind == "number" else pa.string())
    pq.write_table(pa.table({"key": column, "s": pa.array([s for _, s in rows], pa.int64())}), folder / "0.parquet")
    found = read_sidecar(str(folder / "0.tar"), tar_keys)
    counted = counts(found)
    counted.pop("sample without row", None)
    assert len(found.rows) + sum(row["rows"] for row in found.rejected if row["reason"] != "sample without row") == len(
        rows
    )
    for key, record in found.rows.items():
        values = {s for name, s in rows if name is not None and f"{name:04d}" == key}
        assert values == {int(record["s"])}
    assert set(found.rows) <= set(tar_keys)


def test_numbers_stay_exact(read):
    found = read({"key": ["a"], "s": np.array([0.1], np.float32), "n": [2**53]}, "a")
    assert found.rows["a"] == {"s": float(np.float32(0.1)), "n": float(2**53)}
