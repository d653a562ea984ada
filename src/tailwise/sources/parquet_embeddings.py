"""Parquet files in a source: their kinds, and embeddings in any file with a column of ids and a column of lists of floats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tailwise.catalog.files import create_array, read_array
from tailwise.requests import SourceRequest
from tailwise.shards.columns import BATCH_ROWS, DAMAGE, is_vectors, open_table, texts, uid_texts, unwrapped, value_type
from tailwise.shards.members import MemberChoice
from tailwise.shards.metadata import metadata_columns
from tailwise.shards.parquet_images import image_columns
from tailwise.sources.embedding_files import EmbeddingFile, Naming, fingerprint, matrix_fault
from tailwise.storage.local import replacing

ID_COLUMNS = ("uid", "key", "image_path", "id")
EMBEDDING_COLUMNS = ("embedding", "embeddings")
Kind = Literal["images", "metadata", "urls", "embeddings", "unreadable", "other"]


def kind_of(path: Path, options: SourceRequest) -> tuple[Kind, tuple[str, str] | None]:
    """Return the kind of a Parquet file, by its columns, and its columns of ids and of embeddings (see `choose_columns`).

    A column of images means images, unless `embedding_column` asks for vectors beside them. A column of vectors means embeddings; names of
    columns mean metadata or a list of URLs (see `metadata_columns`). A column with a name of embeddings but another type means embeddings
    too; they are rejected because of that type when they are read.
    """
    try:
        schema = pq.read_schema(path)
        names = schema.names
    except DAMAGE:
        return "unreadable", None
    choice = MemberChoice.given(options.image, options.caption)
    if image_columns(schema, choice) and not options.embedding_column:
        return "images", None
    columns = choose_columns(schema, options.id_column, options.embedding_column)
    found = metadata_columns(names)
    metadata = found is not None and found.is_uid
    if columns and (options.embedding_column or not metadata or is_vectors(schema.types[names.index(columns[1])])):
        return "embeddings", columns
    return "metadata" if metadata else "urls" if found else "other", None


def choose_columns(schema: pa.Schema, id_column: str | None, embedding_column: str | None) -> tuple[str, str] | None:
    """Return the columns of ids and of embeddings of a Parquet file, or None if it lacks one.

    Without `id_column`, it is the first of ID_COLUMNS in the file. Without `embedding_column`, it is the first of EMBEDDING_COLUMNS in the
    file, preferably one with lists of floats.
    """
    ids = [name for name in ID_COLUMNS if name in schema.names] if id_column is None else [id_column]
    named = EMBEDDING_COLUMNS if embedding_column is None else (embedding_column,)
    there = [name for name in named if name in schema.names]
    vectors = [name for name in there if is_vectors(schema.types[schema.names.index(name)])]
    return (ids[0], (vectors or there)[0]) if ids and ids[0] in schema.names and there else None


@dataclass(frozen=True)
class ParquetEmbeddings(EmbeddingFile):
    """One Parquet file. Lists cannot be mapped: each join first writes them to an array, batch by batch."""

    path: Path  # the file
    id_column: str  # "uid", or another column with keys, or with paths that end in tar and key
    embedding_column: str  # column with lists of floats

    @property
    def metadata(self) -> Path:  # type: ignore[override]
        """The file itself."""
        return self.path

    @property
    def naming(self) -> Naming:  # type: ignore[override]
        """The kind of names: "uid" if the column has this name, else "key"."""
        return "uid" if self.id_column == "uid" else "key"

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the file, with the columns' names."""
        return f"{fingerprint(self.path)} {self.id_column} {self.embedding_column}"

    def header(self) -> tuple[tuple[int, int], np.dtype[Any]]:
        """Return (n, d), d as most lists at its start have, and float32; raise DAMAGE, also if its column has no vectors."""
        with open_table(self.path, [self.id_column, self.embedding_column]) as file:
            given = file.schema_arrow.field(self.embedding_column).type
            if not is_vectors(given):
                raise ValueError(f"column {self.embedding_column!r} has type {given}, not lists of floats")
            if pa.types.is_fixed_size_list(kind := value_type(given)):
                dimension = kind.list_size
            else:
                lists = next(self._batches(self.embedding_column), pa.array([], pa.list_(pa.float32())))
                counts = pc.value_counts(_lengths(unwrapped(lists)).drop_null()).to_pylist()
                _, dimension = max(((count["counts"], count["values"]) for count in counts), default=(0, 0))
            shape, dtype = (int(file.metadata.num_rows), dimension), np.dtype(np.float32)
        if fault := matrix_fault(shape, dtype, None):
            raise ValueError(f"column {self.embedding_column!r} holds no vectors: {fault.detail}")
        return shape, dtype

    def _batches(self, column: str) -> Iterator[pa.Array]:
        """Yield a column, with no more of a row group in memory than its current pages."""
        with open_table(self.path, [column]) as file:
            for batch in file.iter_batches(BATCH_ROWS, [column]):
                yield batch.column(0)

    def names(self) -> Iterator[pa.Array]:
        """Yield the column of ids."""
        for ids in self._batches(self.id_column):
            yield pc.utf8_lower(uid_texts(ids)) if self.naming == "uid" else texts(ids, self.id_column)

    def unpack(self, unpacked: Path, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
        """Write [n, d], 2 or 4 bytes a number; return which lists are null or of another length: bool [n]."""
        rows, dimension = shape
        unfit = np.zeros(rows, np.bool_)
        with replacing(unpacked) as temporary:
            target: npt.NDArray[Any] | None = None
            start = 0
            for lists in map(unwrapped, self._batches(self.embedding_column)):
                fits = pc.equal(_lengths(lists), dimension).fill_null(False)
                vectors = lists.filter(fits).flatten()
                if target is None:
                    half = pa.types.is_float16(vectors.type)
                    target = create_array(temporary, (rows, dimension), np.float16 if half else np.float32)
                good = fits.to_numpy(zero_copy_only=False)
                with np.errstate(over="ignore"):  # a float64 beyond float32's range becomes inf, and is rejected later
                    block = np.asarray(vectors.to_numpy(zero_copy_only=False)).reshape(-1, dimension)
                    target[start : start + len(lists)][good] = block
                unfit[start : start + len(lists)] = ~good
                start += len(lists)
            if target is None:
                create_array(temporary, (rows, dimension), np.float32)
        return unfit

    def rows(self, unpacked: Path) -> npt.NDArray[Any]:
        """Return the vectors that were written, mapped."""
        return read_array(unpacked)


def _lengths(lists: pa.Array) -> pa.Array:
    return pc.list_value_length(lists).cast(pa.int64())
