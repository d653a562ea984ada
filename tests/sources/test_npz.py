"""Arrays of .npz files: read where they lie or laid out, never unpickled, and whole or refused."""

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.shards.columns import DAMAGE
from tailwise.sources.embedding_files import open_member, read_member

ROWS = np.arange(24, dtype=np.float16).reshape(6, 4)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.npz"


def opened(path, name="x"):
    return open_member(path, name, path.with_name("unpacked.npy"))[:]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_what_was_saved(path, save, dtype, order):
    first = np.arange(6, dtype=np.int8)  # so that the next one begins at any byte
    rows = np.asarray(ROWS, dtype, order=order)
    save(path, first=first, x=rows, last=first)
    found = opened(path)
    np.testing.assert_array_equal(found, rows)
    assert found.dtype == rows.dtype
    member = read_member(path, "x")
    assert (member.shape, member.dtype) == ((6, 4), rows.dtype)


def test_stored_arrays_are_read_where_they_lie(path):
    np.savez(path, x=ROWS)
    opened(path)
    assert not path.with_name("unpacked.npy").exists()


def test_compressed_arrays_are_laid_out_once(path):
    np.savez_compressed(path, x=ROWS)
    unpacked = path.with_name("unpacked.npy")
    opened(path)
    written = unpacked.stat().st_mtime_ns
    np.testing.assert_array_equal(opened(path), ROWS)
    assert unpacked.stat().st_mtime_ns == written


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_empty_arrays(path, save):
    save(path, x=np.zeros((0, 4), np.float16))
    assert opened(path).shape == (0, 4)


def test_a_version_two_header(path):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, ROWS, version=(2, 0))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", stream.getvalue())
    np.testing.assert_array_equal(opened(path), ROWS)


class Marked:
    """Leaves a mark when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_nothing_is_unpickled(path, tmp_path, save):
    mark = tmp_path / "unpickled"
    save(path, x=np.array([Marked(mark)], object))
    with pytest.raises(ValueError, match="pickled"):
        opened(path)
    path.write_bytes(pickle.dumps(Marked(mark)))
    with pytest.raises(zipfile.BadZipFile):
        opened(path)
    assert not mark.exists()


def test_an_array_that_is_not_there(path):
    np.savez(path, y=ROWS)
    with pytest.raises(KeyError):
        opened(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.999])
def test_truncated_files(path, save, share):
    save(path, x=np.random.default_rng(0).normal(size=(50, 8)))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DAMAGE):
        opened(path)


@pytest.mark.parametrize("rows", [5, 7])
def test_a_header_that_tells_other_rows_than_there_are(path, rows):
    stream = io.BytesIO()
    np.save(stream, ROWS)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", stream.getvalue().replace(b"(6, 4)", f"({rows}, 4)".encode()))
    with pytest.raises(ValueError, match="bytes of data"):
        opened(path)


def test_changed_bytes_of_a_compressed_array(path):
    np.savez_compressed(path, x=np.random.default_rng(0).normal(size=(50, 8)))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DAMAGE):
        opened(path)
    assert not path.with_name("unpacked.npy").exists()


@given(
    harm=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4), packed=st.booleans()
)
@settings(deadline=None, max_examples=60)
def test_damage_gives_an_array_or_a_known_error(tmp_path_factory, harm, packed):
    path = tmp_path_factory.mktemp("harm") / "a.npz"
    (np.savez_compressed if packed else np.savez)(path, x=ROWS)
    content = bytearray(path.read_bytes())
    for place, value in harm:
        content[place % len(content)] = value
    path.write_bytes(content)
    try:
        found = opened(path)
    except DAMAGE:
        return
    assert not found.dtype.hasobject
