"""DataComp's metadata: `X.parquet` (uid, text, sizes, scores) and `X.npz` (CLIP embeddings), in the same row order.

Without images it is a pool: each `X.parquet` becomes a shard whose samples have no bytes. With tars made from it, it gives their samples
scores and embeddings, by uid.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tailwise.shards.columns import BATCH_ROWS, DAMAGE, count_rows, numbers, open_table, score_columns, uid_texts
from tailwise.sources.embedding_files import BadPartition, Naming, Opened, fingerprint, matrix_fault, matrix_size
from tailwise.sources.npz import open_member, read_member
from tailwise.sources.stored_rows import StoredRows

MEMBERS = {"image": "img", "text": "txt"}  # by column
EMBEDDINGS = ("l14", "b32")


@dataclass(frozen=True)
class MetadataEmbeddings:
    """One array of an `X.npz`, whose rows are those of `X.parquet`; an EmbeddingFile."""

    path: Path  # the `.npz` file
    metadata: Path  # the `.parquet` file
    member: str  # name of the array, such as "l14_img"
    naming: Naming = "uid"

    @property
    def home(self) -> str:
        """The `.parquet` file, which may be a shard."""
        return str(self.metadata)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of both files, with the array's name."""
        return f"{fingerprint(self.path, self.metadata)} {self.member}"

    def size(self) -> tuple[int, int] | None:
        """Return (n, d), or None."""
        try:
            member = read_member(self.path, self.member)
        except DAMAGE:
            return None
        return matrix_size(member.shape, member.dtype)

    def names(self) -> Iterator[pa.Array]:
        """Yield the uids, in lower case."""
        with open_table(self.metadata, ["uid"]) as file:
            for batch in file.iter_batches(BATCH_ROWS, ["uid"]):
                yield pc.utf8_lower(uid_texts(batch.column(0)))

    def open(self, dimension: int | None, unpacked: Path) -> Opened | BadPartition:
        """Check the array's header and the number of rows, then open the array."""
        if not self.path.exists():
            return BadPartition("no .npz beside the metadata", str(self.path), 0)
        try:
            member = read_member(self.path, self.member)
            fault = matrix_fault(member.shape, member.dtype, dimension) or self._names_fault(member.shape[0])
            return fault or Opened(open_member(self.path, self.member, unpacked), self.names())
        except DAMAGE as error:
            return BadPartition("unreadable embeddings", str(error), count_rows(self.metadata))

    def _names_fault(self, rows: int) -> BadPartition | None:
        try:
            named = sum(len(batch) for batch in self.names())
        except DAMAGE as error:
            return BadPartition("unreadable metadata", str(error), rows)
        return None if named == rows else BadPartition("rows differ from metadata", f"{rows} rows, {named} uids", rows)

    def rows(self, unpacked: Path) -> npt.NDArray[Any] | StoredRows:
        """Return the array."""
        return open_member(self.path, self.member, unpacked)


def score_batches(path: Path, columns: list[str]) -> Iterator[tuple[list[str], npt.NDArray[np.float64]]]:
    """Yield uids (lower case, "" where there is none) and scores [n, S] of a metadata file, NaN where there is none.

    `columns` are names of scores; a missing or unusable one gives NaN. Raises DAMAGE if the file cannot be read, or has no uids.
    """
    with open_table(path, ["uid"]) as file:
        there = [name for name in score_columns(file)[0] if name in columns]
        for batch in file.iter_batches(BATCH_ROWS, ["uid", *there]):
            scores = np.full((len(batch), len(columns)), np.nan)
            for name in there:
                scores[:, columns.index(name)] = numbers(batch.column(name), name).to_numpy(zero_copy_only=False)
            yield pc.utf8_lower(uid_texts(batch.column("uid"))).fill_null("").to_pylist(), scores
