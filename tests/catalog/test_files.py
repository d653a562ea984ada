"""Atomic writes, arrays without pickle, hashes."""

import json
import os
import pickle
import re
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tailwise.catalog.files import (
    ROW_GROUP_ROWS,
    create_array,
    digest,
    file_digest,
    known_digest,
    read_array,
    read_json,
    write_array,
    write_json,
    write_table,
)
from tailwise.mapped import release_pages
from tailwise.storage.local import replacing


class Interrupted(BaseException):
    """Like KeyboardInterrupt: no Exception."""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_replacing_makes_folders_and_the_file(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    with replacing(path) as temporary:
        assert temporary.parent == path.parent  # a rename is atomic within one file system only
        assert not path.exists()
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert names(path.parent) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Interrupted])
@pytest.mark.parametrize("written", [True, False])
def test_an_error_leaves_the_old_file_and_no_temporary(tmp_path, error, written):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as temporary:
        if written:
            temporary.write_text("half of the ne")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_temporary_left_by_a_killed_process_is_no_obstacle(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as temporary:
        name = temporary.name
        temporary.write_text("x")
    path.unlink()
    (tmp_path / name).write_text("left by a killed process")
    write_json(path, [1])
    assert read_json(path) == [1]
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("write", "bad"),
    [
        (write_json, {"a": object()}),
        (write_array, np.array([object()], dtype=object)),
        (write_table, "no table"),
    ],
)
def test_values_that_can_not_be_written_leave_the_old_file(tmp_path, write, bad):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises((TypeError, ValueError, AttributeError)):
        write(path, bad)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_json_does_not_depend_on_the_order_of_keys(tmp_path):
    write_json(tmp_path / "a", {"x": 1, "ä": [None, True]})
    write_json(tmp_path / "b", {"ä": [None, True], "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert json.loads((tmp_path / "a").read_text()) == read_json(tmp_path / "b") == {"x": 1, "ä": [None, True]}


@pytest.mark.parametrize("shape", [(3, 4), (5,), (0, 4), (0,), (4, 0)])
@pytest.mark.parametrize("dtype", ["float16", "int64", "uint8", "bool"])
def test_arrays_come_back(tmp_path, shape, dtype):
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    write_array(tmp_path / "a.npy", array)
    created = create_array(tmp_path / "b.npy", shape, dtype)
    assert not created.any()
    created[:] = array
    del created
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    read = read_array(tmp_path / "a.npy")
    np.testing.assert_array_equal(read, array)
    assert read.dtype == array.dtype
    assert not array.size or not read.flags.owndata


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="files can't be given room in advance here")
def test_a_created_array_has_its_room_on_the_disk(tmp_path):
    """For writing to a map for which there is no room ends the process, without a word."""
    create_array(tmp_path / "a.npy", (1 << 20,), np.float64)
    assert (tmp_path / "a.npy").stat().st_blocks * 512 >= 8 << 20


def test_mapped_arrays_can_not_be_written_to(tmp_path):
    write_array(tmp_path / "a.npy", np.ones(3))
    with pytest.raises(ValueError, match="read-only"):
        read_array(tmp_path / "a.npy")[0] = 2


def test_pickled_arrays_are_refused(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(np.ones(3)))
    for name in ("objects.npy", "pickle.npy"):
        with pytest.raises(ValueError, match=r"allow_pickle|[Mm]agic|pickle"):
            read_array(tmp_path / name)


def test_cut_arrays_are_refused(tmp_path):
    write_array(tmp_path / "a.npy", np.ones(1000))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"."):
        read_array(tmp_path / "a.npy")


def test_tables_come_back(tmp_path):
    table = pa.table({"a": [1, 2], "b": ["x", None]})
    write_table(tmp_path / "t.parquet", table)
    assert pq.read_table(tmp_path / "t.parquet").equals(table)


def test_digests_are_pinned(tmp_path):
    assert (
        digest({"b": [1, "ä"], "a": None}) == digest({"a": None, "b": [1, "ä"]}) == "ed6dcdcfae8c436b0e7790a6a12ba4b9"
    )
    assert digest([1]) != digest(["1"])
    (tmp_path / "f").write_bytes(b"tailwise" * 1_000_000)
    assert file_digest(tmp_path / "f") == "ff6ca4486050ae1961932f76074a828d"


def test_mapped_arrays_keep_no_file_open(tmp_path):
    for number in range(20):
        write_array(tmp_path / f"{number}.npy", np.full((5, 3), number, np.float16))
    before = len(list(Path("/proc/self/fd").iterdir()))
    arrays = [read_array(tmp_path / f"{number}.npy") for number in range(20)]
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert [int(array[4, 2]) for array in arrays] == list(range(20))


def test_released_pages_are_read_again(tmp_path):
    write_array(tmp_path / "a.npy", np.arange(1 << 20))
    array = read_array(tmp_path / "a.npy")

    def resident():
        maps = Path("/proc/self/smaps").read_text().split(str(tmp_path / "a.npy"))[1]
        return int(re.search(r"Rss: +(\d+) kB", maps)[1])

    assert array.sum() == sum(range(1 << 20))
    assert resident() >= 8192
    release_pages(array[5:])
    assert resident() == 0
    assert array[-1] == (1 << 20) - 1
    for other in (np.ones(3), None):
        release_pages(other)


@pytest.mark.parametrize(
    ("write", "value"),
    [
        (write_json, {"ä": [1, None]}),
        (write_table, pa.table({"a": range(200_000), "b": ["x", None] * 100_000})),
        (write_array, np.arange(12.0).reshape(3, 4)),
        (write_array, np.arange(12, dtype=np.float16).reshape(3, 4).T),
        (write_array, np.arange(5_000_000)[::2]),
        (write_array, np.empty((0, 4), bool)),
    ],
    ids=["JSON", "Parquet", "array", "Fortran", "slice", "empty"],
)
def test_a_file_is_hashed_while_it_is_written(tmp_path, monkeypatch, write, value):
    write(tmp_path / "f", value)
    expected = file_digest(tmp_path / "f")
    with monkeypatch.context() as patched:
        patched.setattr("tailwise.catalog.files.file_digest", lambda path: 1 / 0)
        assert known_digest(tmp_path / "f") == expected


def test_written_files_have_the_bytes_of_their_libraries(tmp_path):
    array, table = np.asfortranarray(np.arange(12.0).reshape(3, 4)), pa.table({"a": [1, 2], "b": ["x", None]})
    write_array(tmp_path / "a.npy", array)
    np.save(tmp_path / "b.npy", array)
    write_table(tmp_path / "a.parquet", table)
    pq.write_table(table, tmp_path / "b.parquet", compression="zstd", row_group_size=ROW_GROUP_ROWS)
    for kind in ("npy", "parquet"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_a_file_that_was_changed_since_is_hashed_again(tmp_path):
    write_array(tmp_path / "f", np.arange(5))
    time.sleep(0.02)  # longer than a tick of the clock of files
    with (tmp_path / "f").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"x")
    assert known_digest(tmp_path / "f") == file_digest(tmp_path / "f")
