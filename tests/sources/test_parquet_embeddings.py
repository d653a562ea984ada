"""Parquet files of ids and vectors: laid out row for row, whatever the lists' type, row groups and batches."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tailwise.sources import parquet_embeddings as module
from tailwise.sources.embedding_files import BadPartition
from tailwise.sources.parquet_embeddings import ParquetEmbeddings, choose_columns

ROWS = np.random.default_rng(0).normal(size=(7, 3))
KEYS = [f"k{row}" for row in range(7)]


def lists(rows, kind="list", number=None):
    number = number or pa.float32()
    kinds = {"list": pa.list_(number), "large": pa.large_list(number), "fixed": pa.list_(number, 3)}
    values = [
        None if row is None else [np.float16(value) if number == pa.float16() else value for value in row]
        for row in rows
    ]
    return pa.array(values, kinds[kind])


@pytest.fixture
def write(tmp_path):
    """`write(vectors, **columns)` → the path of a file with the column embedding."""

    def run(vectors, row_group=None, **columns):
        path = tmp_path / "e.parquet"
        names = {"key": KEYS[: len(vectors)], **columns}
        table = {name: values for name, values in names.items() if values is not None}
        pq.write_table(pa.table({**table, "embedding": vectors}), path, row_group_size=row_group or 1000)
        return path

    return run


def opened(path, dimension=3, id_column="key"):
    return ParquetEmbeddings(path, id_column, "embedding").open(dimension, path.with_name("unpacked.npy"))


@pytest.mark.parametrize("kind", ["list", "large", "fixed"])
@pytest.mark.parametrize("number", [pa.float16(), pa.float32(), pa.float64()])
@pytest.mark.parametrize(("row_group", "batch"), [(None, 4096), (2, 4096), (None, 3)])
def test_rows_are_what_was_written(write, monkeypatch, kind, number, row_group, batch):
    monkeypatch.setattr(module, "BATCH_ROWS", batch)
    found = opened(write(lists(ROWS, kind, number), row_group))
    exact = ROWS.astype(np.float16 if number == pa.float16() else np.float32)
    np.testing.assert_array_equal(found.rows, exact)
    assert found.rows.dtype == exact.dtype
    assert [name for names in found.names for name in names.to_pylist()] == KEYS
    assert not found.unfit.any()


@pytest.mark.parametrize("kind", ["list", "large", "fixed"])
def test_rows_without_a_vector_of_the_width(write, kind):
    rows = [*ROWS[:3], None, *ROWS[4:6], None if kind == "fixed" else ROWS[6, :2]]
    found = opened(write(lists(rows, kind)))
    assert found.unfit.tolist() == [False, False, False, True, False, False, True]
    np.testing.assert_array_equal(found.rows[~found.unfit], ROWS.astype(np.float32)[[0, 1, 2, 4, 5]])


def test_numbers_that_are_null_or_too_large_are_not_finite(write):
    rows = ROWS.tolist()
    rows[1][2], rows[4][0] = None, 1e300
    found = opened(write(pa.array(rows, pa.list_(pa.float64()))))
    assert np.isfinite(found.rows).all(axis=1).tolist() == [True, False, True, True, False, True, True]


def test_one_odd_row_does_not_decide_the_width(write):
    path = write(lists([ROWS[0, :2], *ROWS[1:]]))
    assert ParquetEmbeddings(path, "key", "embedding").size() == (7, 3)
    assert opened(path, None).unfit.tolist() == [True] + [False] * 6


def test_uids_as_text_or_bytes(write):
    uids = [f"{row:032X}" for row in range(7)]
    for values in (uids, pa.array([bytes.fromhex(uid) for uid in uids], pa.binary(16))):
        path = write(lists(ROWS), key=None, uid=values)
        names = [name for batch in opened(path, id_column="uid").names for name in batch.to_pylist()]
        assert names == [uid.lower() for uid in uids]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: b"", "unreadable embeddings"),
        (lambda content: content[:-20], "unreadable embeddings"),
        (lambda content: b"junk", "unreadable embeddings"),
        (None, "wrong dimension"),
    ],
    ids=["empty", "cut", "junk", "width"],
)
def test_files_that_can_not_be_used(write, change, reason):
    path = write(lists(ROWS if change else ROWS[:, :2]))
    if change:
        path.write_bytes(change(path.read_bytes()))
    found = opened(path)
    assert isinstance(found, BadPartition)
    assert found.reason == reason


def test_ids_that_are_no_text(write):
    assert opened(write(lists(ROWS), key=pa.array([["a"]] * 7))).reason == "unreadable metadata"


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["uid", "key", "embedding"], ("uid", "embedding")),
        (["id", "key", "embeddings"], ("key", "embeddings")),
        (["id", "image_path", "embedding", "embeddings"], ("image_path", "embedding")),
        (["id", "embeddings"], ("id", "embeddings")),
        (["name", "embedding"], None),
        (["key", "vector"], None),
    ],
)
def test_columns_are_found(names, chosen):
    vectors = {"embedding", "embeddings", "vector"}
    schema = pa.schema([(name, pa.list_(pa.float32()) if name in vectors else pa.string()) for name in names])
    assert choose_columns(schema, None, None) == chosen


def test_columns_that_are_named():
    schema = pa.schema(
        [("uid", pa.string()), ("name", pa.string()), ("v", pa.list_(pa.float16(), 4)), ("n", pa.list_(pa.int8()))]
    )
    assert choose_columns(schema, "name", "v") == ("name", "v")
    assert choose_columns(schema, "absent", "v") is None
    assert choose_columns(schema, None, "n") == ("uid", "n")  # rejected by its type when it is read
    assert choose_columns(schema, None, "m") is None


def test_no_rows(write):
    assert opened(write(lists([], "fixed"))).rows.shape == (0, 3)
