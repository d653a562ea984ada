"""Rows that are read from users' files: those of the array, and an error where the file was cut after it was opened."""

import numpy as np
import pytest

from tailwise.sources.embedding_files import StoredRows, open_member

ROWS = np.random.default_rng(3).normal(size=(50, 6)).astype(np.float32)
ASKED = [slice(None), slice(7, 19), slice(50, 60), np.array([3, 4, 5, 49, 0, 0, 17]), np.array([], np.int64)]


@pytest.mark.parametrize("rows", [ROWS, np.asfortranarray(ROWS), ROWS[:, :1], ROWS[:, 0], ROWS[:0], ROWS[:, :0]])
@pytest.mark.parametrize("packed", [False, True])
def test_rows_are_those_of_the_array(tmp_path, rows, packed):
    if packed:
        np.savez(tmp_path / "a.npz", other=np.arange(3, dtype=np.int8), x=rows)
        found = open_member(tmp_path / "a.npz", "x", tmp_path / "unused")
    else:
        np.save(tmp_path / "a.npy", rows)
        found = StoredRows.of_file(tmp_path / "a.npy")
    assert (found.shape, found.dtype, len(found)) == (rows.shape, rows.dtype, len(rows))
    for at in ASKED if len(rows) else ASKED[:3]:
        np.testing.assert_array_equal(found[at], rows[at], strict=True)


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_file_that_is_cut_after_it_was_opened_is_an_error(tmp_path, order):
    path = tmp_path / "a.npy"
    np.save(path, np.asarray(ROWS, order=order))
    found = StoredRows.of_file(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(OSError, match=r"a\.npy ended while it was read"):
        found[40:]
    if order == "C":
        np.testing.assert_array_equal(found[:49], ROWS[:49])
