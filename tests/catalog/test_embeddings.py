"""Embedding columns: normalising, one encoder a column, parts that are whole or absent."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tailwise.catalog.embeddings import normalise_rows, open_column, write_part
from tailwise.errors import UserError

ROWS = arrays.arrays(
    np.float32, st.tuples(st.integers(0, 5), st.integers(1, 8)), elements=st.floats(width=32, allow_subnormal=True)
)


@given(ROWS)
def test_rows_are_unit_or_zero_with_a_fault(rows):
    with np.errstate(over="ignore"):
        scaled, faults = normalise_rows(rows)
    assert (scaled.dtype, scaled.shape) == (np.float16, rows.shape)
    assert np.isfinite(scaled).all()
    for at, (row, unit) in enumerate(zip(rows.astype(np.float64), scaled.astype(np.float64), strict=True)):
        if not np.isfinite(row).all():
            assert faults[at] == "NaN or Inf"
        elif not row.any():
            assert faults[at] == "zero norm"
        else:
            assert at not in faults
            assert abs(np.linalg.norm(unit) - 1) < 2e-3
            np.testing.assert_allclose(unit, row / np.linalg.norm(row), atol=1e-3)
            continue
        assert not unit.any()


def test_a_column_takes_one_encoder_and_one_width(small_catalog):
    open_column(small_catalog, "image", 16, "imported")
    open_column(small_catalog, "text", 6, "transformers:y")  # came to nothing: no part was written
    open_column(small_catalog, "text", 5, "transformers:x")
    part = small_catalog.parts()[0]
    write_part(small_catalog, "text", part, 5, [np.zeros((part.rows, 5), np.float16)])
    open_column(small_catalog, "text", 5, "transformers:x")
    for column, dimension, encoder in (
        ("image", 16, "open_clip:ViT-B-32/openai"),
        ("image", 17, "imported"),
        ("text", 5, "transformers:y"),
    ):
        with pytest.raises(UserError, match="encoders can't be mixed") as caught:
            open_column(small_catalog, column, dimension, encoder)
        assert str(dimension) in str(caught.value)
        assert encoder in str(caught.value)


def test_a_part_is_written_whole_or_not_at_all(small_catalog, tree_bytes):
    part = small_catalog.parts()[1]
    before = tree_bytes(small_catalog.folder)

    def interrupted():
        yield np.ones((10, 4), np.float16)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_part(small_catalog, "text", part, 4, interrupted())
    with pytest.raises(ValueError, match="10 rows for a part of 140"):
        write_part(small_catalog, "text", part, 4, [np.ones((10, 4), np.float16)])
    assert tree_bytes(small_catalog.folder) == before


def test_rows_without_embedding_are_not_counted(small_catalog):
    part = small_catalog.parts()[1]
    rows = np.zeros((part.rows, 4), np.float16)
    rows[3:10, 0] = 1
    chunks = [rows[:5], rows[5:5], rows[5:]]
    assert write_part(small_catalog, "text", part, 4, chunks) == 7
    np.testing.assert_array_equal(small_catalog.embedding("text", part), rows)


def test_a_part_is_the_file_that_numpy_would_write(small_catalog, tmp_path):
    part = small_catalog.parts()[1]
    rows = np.random.default_rng(0).normal(size=(part.rows, 3)).astype(np.float16)
    rows[1] = 0
    open_column(small_catalog, "text", 3, "x")
    assert write_part(small_catalog, "text", part, 3, [rows[:1], rows[1:1], rows[1:]]) == part.rows - 1
    np.save(tmp_path / "rows.npy", rows)
    written = small_catalog.embedding_folder("text") / f"{part.name}.npy"
    assert written.read_bytes() == (tmp_path / "rows.npy").read_bytes()
    np.testing.assert_array_equal(small_catalog.embedding("text", part), rows)
