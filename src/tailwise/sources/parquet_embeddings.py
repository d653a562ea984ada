"""Embeddings in Parquet: any file with a column of ids and a column of lists of floats, of fixed or variable length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tailwise.catalog.files import create_array, read_array, replacing
from tailwise.sources.embedding_files import DAMAGE, BadPartition, Naming, Opened, as_text, fingerprint

ID_COLUMNS = ("uid", "key", "image_path", "id")
EMBEDDING_COLUMNS = ("embedding", "embeddings")
BATCH_ROWS = 4096
_BUFFER_BYTES = 1 << 20
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)


def choose_columns(schema: pa.Schema, id_column: str | None, embedding_column: str | None) -> tuple[str, str] | None:
    """The columns of ids and of embeddings of a Parquet file, or None if it lacks one.

    Args:
        schema: of the file.
        id_column: None takes the first of ID_COLUMNS that is there.
        embedding_column: None takes the first of EMBEDDING_COLUMNS that is there, and holds lists of floats.
    """
    ids = [name for name in ID_COLUMNS if name in schema.names] if id_column is None else [id_column]
    named = EMBEDDING_COLUMNS if embedding_column is None else (embedding_column,)
    embeddings = [name for name in named if name in schema.names and _is_vectors(schema.field(name).type)]
    return (ids[0], embeddings[0]) if ids and ids[0] in schema.names and embeddings else None


def _is_vectors(kind: pa.DataType) -> bool:
    return any(is_list(kind) for is_list in _LISTS) and pa.types.is_floating(kind.value_type)


@dataclass(frozen=True)
class ParquetEmbeddings:
    """One Parquet file; an EmbeddingFile. Lists can't be mapped: each join lays them out first, batch by batch.

    Attributes:
        path: of the file.
        id_column: "uid", or another that holds keys, or paths that end in tar and key.
        embedding_column: of lists of floats.
    """

    path: Path
    id_column: str
    embedding_column: str
    home: None = None

    @property
    def naming(self) -> Naming:
        """By uid where the column is called so, else by key."""
        return "uid" if self.id_column == "uid" else "key"

    @property
    def fingerprint(self) -> str:
        """Of the file, and the columns' names."""
        return f"{fingerprint(self.path)} {self.id_column} {self.embedding_column}"

    def size(self) -> tuple[int, int] | None:
        """(n, d), d as most lists at its begin have; None if it can't be read."""
        try:
            with pq.ParquetFile(self.path) as file:
                kind = file.schema_arrow.field(self.embedding_column).type
                if pa.types.is_fixed_size_list(kind):
                    return (file.metadata.num_rows, kind.list_size) if kind.list_size else None
                for batch in file.iter_batches(BATCH_ROWS, columns=[self.embedding_column]):
                    counts = pc.value_counts(_lengths(batch.column(0)).drop_null()).to_pylist()
                    usual = max(counts, key=lambda count: (count["counts"], count["values"]), default=None)
                    return (file.metadata.num_rows, usual["values"]) if usual and usual["values"] else None
        except (*DAMAGE, pa.ArrowException):
            pass
        return None

    def _batches(self, column: str) -> Iterator[pa.Array]:
        """A column, without holding more of a row group than its pages of this moment."""
        with pq.ParquetFile(self.path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
            for batch in file.iter_batches(BATCH_ROWS, columns=[column]):
                yield batch.column(0)

    def names(self) -> Iterator[pa.Array]:
        """The column of ids."""
        for ids in self._batches(self.id_column):
            names = as_text(ids)
            yield pc.utf8_lower(names) if self.naming == "uid" else names

    def open(self, dimension: int | None, unpacked: Path) -> Opened | BadPartition:
        """Lays the vectors out in `unpacked`, 2 or 4 bytes a number."""
        size = self.size()
        if size is None:
            return self._unreadable("no list of floats can be read", 0)
        rows, own = size
        if dimension is not None and own != dimension:
            return BadPartition("wrong dimension", f"{own}, not {dimension}", rows)
        try:
            sum(len(names) for names in self.names())  # reads them all
        except (OSError, pa.ArrowException) as error:
            return BadPartition("unreadable metadata", str(error), rows)
        try:
            unfit = self._unpack(unpacked, rows, own)
        except (*DAMAGE, pa.ArrowException) as error:
            return self._unreadable(str(error), rows)
        return Opened(read_array(unpacked), self.names(), unfit)

    def _unreadable(self, detail: str, rows: int) -> BadPartition:
        try:
            pq.read_metadata(self.path)
        except (OSError, pa.ArrowException) as error:
            detail = str(error)
        return BadPartition("unreadable embeddings", detail, rows)

    def _unpack(self, unpacked: Path, rows: int, dimension: int) -> npt.NDArray[np.bool_]:
        """Writes [n, d]; returns which lists are null or of another length: bool [n], mapped."""
        unfit = create_array(unpacked.with_suffix(".unfit.npy"), (rows,), np.bool_)
        with replacing(unpacked) as temporary:
            target: npt.NDArray[Any] | None = None
            start = 0
            for lists in self._batches(self.embedding_column):
                fits = pc.equal(_lengths(lists), dimension).fill_null(False)
                vectors = lists.filter(fits).flatten()
                if target is None:
                    half = pa.types.is_float16(vectors.type)
                    target = create_array(temporary, (rows, dimension), np.float16 if half else np.float32)
                good = fits.to_numpy(zero_copy_only=False)
                with np.errstate(
                    over="ignore"
                ):  # a float64 beyond float32's range becomes inf, and is rejected as such
                    block = np.asarray(vectors.to_numpy(zero_copy_only=False)).reshape(-1, dimension)
                    target[start : start + len(lists)][good] = block
                unfit[start : start + len(lists)] = ~good
                start += len(lists)
            if target is None:
                create_array(temporary, (rows, dimension), np.float32)
        return unfit

    def rows(self, unpacked: Path) -> npt.NDArray[Any]:
        """The vectors as they were laid out, mapped."""
        return read_array(unpacked)


def _lengths(lists: pa.Array) -> pa.Array:
    return pc.list_value_length(lists).cast(pa.int64())
