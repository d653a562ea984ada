"""Columns of users' Parquet files: the same values whatever the Arrow type, or an error that names column and type."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tailwise.shards import columns
from tailwise.shards.columns import (
    TOO_LONG,
    is_vectors,
    numbers,
    open_table,
    score_columns,
    texts,
    uid_texts,
    unwrapped,
)

WORDS = ["a", None, "héllo", "a"]
VALUES = [1.5, None, 2.0, 1.5]
UID = "00112233445566778899aabbccddeeff"


def through_parquet(tmp_path, array):
    pq.write_table(pa.table({"x": array}), tmp_path / "t.parquet")
    return pq.read_table(tmp_path / "t.parquet").column("x")


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()]
)
def test_text_of_any_type(tmp_path, kind):
    assert texts(through_parquet(tmp_path, pa.array(WORDS).cast(kind)), "x").to_pylist() == WORDS


def test_text_of_dictionaries_and_numbers(tmp_path):
    assert texts(through_parquet(tmp_path, pa.array(WORDS).dictionary_encode()), "x").to_pylist() == WORDS
    assert texts(pa.array([7, None, 2**60]), "x").to_pylist() == ["7", None, str(2**60)]
    assert texts(pa.array([7.0, None, float("nan")]), "x").to_pylist() == ["7", None, None]
    assert texts(pa.nulls(2), "x").to_pylist() == [None, None]
    assert texts(pa.array([b"ab", b"cd"], pa.binary(2)), "x").to_pylist() == ["ab", "cd"]


@pytest.mark.parametrize(
    "values", [pa.array([["a"]]), pa.array([0.5]), pa.array([b"\xff"]), pa.array([{"a": 1}]), pa.array([True])]
)
def test_what_is_no_text_is_told_by_name_and_type(values):
    with pytest.raises(ValueError, match=r"column 'x'.*(list|double|binary|struct|bool)"):
        texts(values, "x")


@pytest.mark.parametrize("kind", [pa.binary(), pa.binary(16), pa.binary_view(), pa.large_binary()])
def test_uids_as_bytes(kind):
    assert uid_texts(pa.array([bytes.fromhex(UID), None], pa.binary()).cast(kind)).to_pylist() == [UID, None]


def test_uids_as_text_and_uuids():
    assert uid_texts(pa.array([UID.encode(), UID.upper().encode()])).to_pylist() == [UID, UID.upper()]
    storage = pa.array([bytes.fromhex(UID)], pa.binary(16))
    assert uid_texts(pa.ExtensionArray.from_storage(pa.uuid(), storage)).to_pylist() == [UID]


@pytest.mark.parametrize(
    "array",
    [
        pa.array(VALUES, pa.float32()),
        pa.array(VALUES).dictionary_encode(),
        pa.array(VALUES, pa.float32()).cast(pa.decimal128(10, 2)),
        pa.array([str(value) if value is not None else None for value in VALUES]),
    ],
)
def test_numbers_of_any_type(tmp_path, array):
    assert numbers(through_parquet(tmp_path, array), "x").to_pylist() == VALUES


@pytest.mark.parametrize("value", [2**53 + 1, 2**60, -(2**60)])
def test_whole_numbers_that_a_float_does_not_hold(value):
    with pytest.raises(ValueError, match=r"column 'x' \(int64\).*2\^53"):
        numbers(pa.array([1, value]), "x")
    assert numbers(pa.array([2**53, -(2**53)]), "x").to_pylist() == [2.0**53, -(2.0**53)]


@pytest.mark.parametrize("values", [pa.array([[512]]), pa.array(["wide"]), pa.array([b"1"]), pa.array([{"a": 1}])])
def test_what_is_no_number_is_told_by_name_and_type(values):
    with pytest.raises(ValueError, match=r"column 'x'.*(list|string|binary|struct)"):
        numbers(values, "x")


@pytest.mark.parametrize(
    "make", [pa.list_, pa.large_list, pa.list_view, pa.large_list_view, lambda kind: pa.list_(kind, 2)]
)
def test_vectors_of_any_type(tmp_path, make):
    rows = [[1.0, 2.0], None, [3.0, 4.0], [5.0, 6.0]]
    column = through_parquet(tmp_path, pa.array(rows, make(pa.float32())))
    assert is_vectors(column.type)
    assert unwrapped(column).to_pylist() == rows
    assert unwrapped(column.slice(1, 2)).drop_null().flatten().to_pylist() == [3.0, 4.0]


def test_tensors_are_vectors():
    kind = pa.fixed_shape_tensor(pa.float32(), (2,))
    column = pa.ExtensionArray.from_storage(kind, pa.array([[1.0, 2.0]], pa.list_(pa.float32(), 2)))
    assert is_vectors(kind)
    assert unwrapped(column).flatten().to_pylist() == [1.0, 2.0]
    assert not is_vectors(pa.binary())
    assert not is_vectors(pa.list_(pa.int8()))


def test_columns_must_be_there_once(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array([1.0])] * 3, ["a", "b", "b"]), path)
    with pytest.raises(ValueError, match="2 columns called 'b'"):
        open_table(path, ["a", "b"])
    with pytest.raises(ValueError, match="no column 'c'"):
        open_table(path, ["c"])
    with open_table(path, ["a"]) as file:
        assert score_columns(file) == (["a"], {"b": "it has 2 columns called 'b'"})


def test_scores_are_the_users_own_numbers(tmp_path):
    path = tmp_path / "t.parquet"
    columns = {
        "key": ["a"], "width": [1], "note": ["x"], "flag": [True], "list": [[1.0]], "big": [2**60],
        "half": np.array([1], np.float16), "price": pa.array([1]).cast(pa.decimal128(30, 2)), "id": [7],
    }  # fmt: skip
    pq.write_table(pa.table(columns), path)
    with open_table(path) as file:
        found, unfit = score_columns(file)
    assert found == ["half", "id", "price"]
    assert list(unfit) == ["big"]


# --- files that unfold to more than they hold ----------------------------------------------------------------------------


@pytest.fixture
def small_bounds(monkeypatch):
    for name, value in {
        "BATCH_BYTES": 1000,
        "MAX_TEXT_BYTES": 400,
        "MAX_COLUMN_BYTES": 3000,
        "MAX_MEAN_BYTES": 50,
    }.items():
        monkeypatch.setattr(columns, name, value)


def write(path, kind, texts, **options):
    array = pa.array(texts).dictionary_encode() if kind == "dictionary" else pa.array(texts, kind)
    pq.write_table(pa.table({"x": array, "y": range(len(texts))}), path, **options)
    return open_table(path)


@pytest.mark.parametrize("kind", ["dictionary", pa.string(), pa.large_binary(), pa.string_view()])
@pytest.mark.parametrize("use_dictionary", [True, False])
def test_batches_are_smaller_where_text_is_long(tmp_path, small_bounds, kind, use_dictionary):
    words = ["a", *["b" * 300] * 30, None, *"cde" * 10]
    with write(tmp_path / "t.parquet", kind, words, row_group_size=31, use_dictionary=use_dictionary) as file:
        batches = list(file.iter_batches(1000, ["x", "y"]))
    found = [text for batch in batches for text in texts(batch.column("x"), "x").to_pylist()]
    assert found == words
    assert [row for batch in batches for row in batch.column("y").to_pylist()] == list(range(62))
    assert max(batch.column("x").nbytes for batch in batches) < 1500
    assert (
        len(batches[-1]) == 31 or kind == "dictionary"
    )  # short ones come at once; a given dictionary stands in all row groups


def test_texts_that_are_too_long_are_refused_or_marked(tmp_path, small_bounds):
    words = ["a", None, "b" * 401, "ü" * 200, "ü" * 201]
    for kind in ("dictionary", pa.string()):
        with write(tmp_path / "t.parquet", kind, words) as file:
            with pytest.raises(ValueError, match=r"column 'x' has a text of 40[12] bytes, more than 400"):
                file.read(["x"])
            assert file.read(["y"]).num_rows == 5
            assert file.read(["x"], ["x"]).column("x").to_pylist() == ["a", None, TOO_LONG, "ü" * 200, TOO_LONG]


def test_columns_that_unfold_to_too_much_are_refused(tmp_path, small_bounds):
    with (
        write(tmp_path / "t.parquet", "dictionary", ["a" * 300] * 30) as file,
        pytest.raises(ValueError, match=r"of its rows take [\d,]+ bytes, more than 50 each"),
    ):
        file.read(["x"])
    with write(tmp_path / "t.parquet", "dictionary", ["a" * 20] * 1000) as file:
        assert file.read(["x"]).num_rows == 1000
    with write(tmp_path / "t.parquet", "dictionary", []) as file:
        assert file.read(["x"]).num_rows == 0


def test_no_damaged_byte_of_a_footer_ends_the_process_or_loses_rows(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"key": ["a", "b", "a"] * 4, "size": range(12)}), path)
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    for at in range(footer, len(whole)):
        for bit in (0, 3, 6):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            try:
                with columns.open_table(path) as file:
                    stated = file.metadata.num_rows
                    assert (
                        file.read([name for name in file.schema_arrow.names if name == "key"] or ["size"]).num_rows
                        == stated
                    )
            except columns.DAMAGE:
                pass
