"""clip-retrieval partitions: numbering, pairs of files, and whole files that can't be used."""

import io
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.sources.clip_retrieval import BadPartition, Partition, find_partitions


def open_partition(made, dimension):
    """Rows and keys of a partition, or why it can't be used."""
    found = made.open(dimension, made.path)
    return found if isinstance(found, BadPartition) else (found.rows, *found.names)


@pytest.fixture
def partition(tmp_path, make_partition):
    """`partition(rows, keys)` → one partition with these files."""

    def write(rows, keys=("a", "b", "c")):
        make_partition(tmp_path, 0, keys, rows)
        return find_partitions(tmp_path)["image"][0]

    return write


def npy(array, **options):
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


@pytest.mark.parametrize("width", [0, 2, 5])
def test_partitions_in_numeric_order_with_their_metadata(tmp_path, make_partition, width):
    for number in (2, 10, 0, 11, 1):
        make_partition(tmp_path, f"{number:0{width}d}", ["a"], np.ones((1, 2)))
    (tmp_path / "img_emb" / "img_emb_0_indices.npy").touch()
    (tmp_path / "img_emb" / "img_emb_x.npy").touch()
    found = find_partitions(tmp_path)["image"]
    numbers = [f"{number:0{width}d}" for number in (0, 1, 2, 10, 11)]
    assert [item.path.name for item in found] == [f"img_emb_{number}.npy" for number in numbers]
    assert [item.metadata.name for item in found] == [f"metadata_{number}.parquet" for number in numbers]
    assert all(item.metadata.exists() for item in found)


def test_another_kind_of_folder(tmp_path):
    assert find_partitions(tmp_path) == {}
    assert find_partitions(tmp_path / "absent") == {}


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_good_partition(partition, dtype, order):
    rows = np.arange(12, dtype=dtype).reshape(3, 4)
    array, keys = open_partition(partition(np.asarray(rows, order=order)), 4)
    np.testing.assert_array_equal(array[:], rows)
    assert keys.to_pylist() == ["a", "b", "c"]


def test_partition_without_rows(partition):
    array, keys = open_partition(partition(np.zeros((0, 4), np.float16), []), 4)
    assert (array.shape, len(keys)) == ((0, 4), 0)


@pytest.mark.parametrize(
    "keys", [pa.array([1, 2, 3]), pa.array(["a", "b", "c"]).dictionary_encode(), pa.array([b"a", b"b", b"c"])]
)
def test_keys_of_other_types(partition, keys):
    made = partition(np.ones((3, 2), np.float16))
    pq.write_table(pa.table({"image_path": keys}), made.metadata)
    assert all(isinstance(key, str) for key in open_partition(made, None)[1].to_pylist())


@pytest.mark.parametrize(
    ("rows", "reason", "count"),
    [
        (np.ones((3, 5), np.float16), "wrong dimension", 3),
        (np.ones((2, 4), np.float16), "rows differ from metadata", 2),
        (np.ones((4, 4), np.float16), "rows differ from metadata", 4),
        (np.ones((3, 4), np.int64), "not an embedding matrix", 3),
        (np.ones(3, np.float16), "not an embedding matrix", 3),
        (np.ones((3, 4, 1), np.float16), "not an embedding matrix", 3),
        (np.float16(1), "not an embedding matrix", 1),
    ],
)
def test_bad_arrays(partition, rows, reason, count):
    found = open_partition(partition(rows), 4)
    assert isinstance(found, BadPartition)
    assert (found.reason, found.rows) == (reason, count)


GOOD = npy(np.ones((3, 4), np.float16))


def pickled_array():
    return npy(np.array([{}, 1, "x"], object), allow_pickle=True)


def zipped_arrays():
    stream = io.BytesIO()
    np.savez(stream, np.ones((3, 4)))
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        b"no array",
        b"PK\x03\x04no zip",
        GOOD[:-5],
        GOOD.replace(b"}", b" "),
        GOOD.replace(b"(3, 4), }          ", b"(999999999999999, 4), }")[: len(GOOD)],
        pickle.dumps(np.ones((3, 4))),
        pickled_array(),
        zipped_arrays(),
    ],
    ids=["empty", "magic", "text", "fake zip", "cut", "open brace", "huge", "pickle", "objects", "npz"],
)
def test_unreadable_arrays(partition, content):
    made = partition(np.ones((3, 4), np.float16))
    made.path.write_bytes(content)
    found = open_partition(made, None)
    assert isinstance(found, BadPartition)
    assert found.reason == "unreadable embeddings"


class Marked:
    """Leaves a mark when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_nothing_is_unpickled(partition, tmp_path):
    mark = tmp_path / "unpickled"
    made = partition(np.ones((3, 4), np.float16))
    for content in (npy(np.array([Marked(mark)], object), allow_pickle=True), pickle.dumps(Marked(mark))):
        made.path.write_bytes(content)
        assert isinstance(open_partition(made, None), BadPartition)
    assert not mark.exists()


@pytest.mark.parametrize(
    "columns",
    [
        {"path": ["a", "b", "c"]},
        {"image_path": pa.array([["a"], ["b"], ["c"]])},
        {"image_path": pa.array([b"a", b"\xff", b"c"])},
        {"image_path": pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"\xff", b"c"]).buffers())},
        None,
        b"no parquet",
    ],
    ids=["no column", "lists", "bytes", "not UTF-8", "missing", "damaged"],
)
def test_unreadable_metadata(partition, columns):
    made = partition(np.ones((3, 4), np.float16))
    made.metadata.unlink()
    if isinstance(columns, bytes):
        made.metadata.write_bytes(columns)
    elif columns is not None:
        pq.write_table(pa.table(columns), made.metadata)
    found = open_partition(made, None)
    assert isinstance(found, BadPartition)
    assert (found.reason, found.rows) == ("unreadable metadata", 3)


@given(harm=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4))
@settings(deadline=None, max_examples=100)
def test_damaged_arrays_never_crash(harm):
    content = bytearray(GOOD)
    for place, value in harm:
        content[place] = value
    with tempfile.TemporaryDirectory() as folder:
        made = Partition(Path(folder) / "e.npy", Path(folder) / "m.parquet")
        made.path.write_bytes(content)
        pq.write_table(pa.table({"image_path": ["a", "b", "c"]}), made.metadata)
        found = open_partition(made, None)
        assert isinstance(found, BadPartition) or (len(found[0].shape) == 2 and len(found[0]) == len(found[1]))
