"""Headers of .npy files: what NumPy writes is read, and any damage is a ValueError before anything is allocated."""

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailwise.catalog.files import read_array, read_header

MAGIC = b"\x93NUMPY\x01\x00"


def saved(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def with_header(text, data=b""):
    return MAGIC + len(text).to_bytes(2, "little") + text + data


def read(content):
    return read_header(io.BytesIO(content), len(content))


@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8", "i8", "u1", "?", "S3", [("high", "<u8"), ("row", "<i8")]])
@pytest.mark.parametrize("shape", [(), (5,), (0,), (2, 3), (0, 3), (3, 0)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_what_numpy_writes_is_read(tmp_path, dtype, shape, order):
    array = np.asarray(np.zeros(shape, dtype), order=order)
    path = tmp_path / "a.npy"
    path.write_bytes(saved(array))
    found = read_array(path)
    assert (found.shape, found.dtype) == (array.shape, array.dtype)
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize(
    "text",
    [
        b"{}\n    x\n  y",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1000000000000)}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 2)}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (9223372036854775808, 0)}",
        b"{'descr': '|V0', 'fortran_order': False, 'shape': (1000000000000000000,)}",
        b"{'descr': '<U99999999999999', 'fortran_order': False, 'shape': (1,)}",
        b"{'descr': ('<f4', (2, 3)), 'fortran_order': False, 'shape': (1,)}",
        b"{'descr': ('<f4',), 'fortran_order': False, 'shape': (1,)}",
        b"{'descr': [1], 'fortran_order': False, 'shape': (1,)}",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
        b"{1: 2, 'a': 3, (): 4}",
        b"[" * 5000,
        b"-" * 9000 + b"1",
        b"(" * 90 + b"\xff",
        b"'''",
        b"\\",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"9" * 5000 + b",)}",
        b"",
    ],
)
def test_damaged_headers_are_one_kind_of_error(text):
    with pytest.raises(ValueError, match=r"header|pickled|bytes of data"):
        read(with_header(text))


@pytest.mark.parametrize(
    "change", [lambda c: c[:-1], lambda c: c + b"x", lambda c: c[:3], lambda c: c[:9], lambda c: b""]
)
def test_data_must_be_as_long_as_stated(change):
    with pytest.raises(ValueError, match=r"bytes of data|damaged"):
        read(change(saved(np.ones((3, 2), np.float32))))


@given(st.data())
def test_flipped_bytes_are_read_or_refused(data):
    content = bytearray(saved(np.arange(12, dtype=np.float32).reshape(4, 3)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 127))] = data.draw(st.integers(0, 255))
    try:
        header = read(bytes(content))
    except ValueError:
        return
    assert int(np.prod(header.shape)) * header.dtype.itemsize + header.offset == len(content)


@given(st.binary(max_size=400))
def test_any_text_as_a_header(text):
    with contextlib.suppress(ValueError):
        read(with_header(text))
