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

from tailwise.shards.columns import BATCH_ROWS, numbers, open_table, score_columns, uid_texts
from tailwise.sources.embedding_files import (
    BadPartition,
    EmbeddingFile,
    Naming,
    Opened,
    StoredRows,
    open_member,
    read_member,
)

MEMBERS = {"image": "img", "text": "txt"}  # by column
EMBEDDINGS = ("l14", "b32")
UID = np.dtype("u8,u8")  # an entry of a subset file


@dataclass(frozen=True)
class MetadataEmbeddings(EmbeddingFile):
    """One array of an `X.npz`, whose rows are those of `X.parquet`, which may be a shard."""

    path: Path  # the `.npz` file
    metadata: Path  # the `.parquet` file
    member: str  # name of the array, such as "l14_img"
    naming: Naming = "uid"

    @property
    def home(self) -> str:  # type: ignore[override]
        """The `.parquet` file."""
        return str(self.metadata)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of both files, with the array's name."""
        return f"{super().fingerprint} {self.member}"

    def header(self) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Return shape and dtype of the array."""
        member = read_member(self.path, self.member)
        return member.shape, member.dtype

    def names(self) -> Iterator[pa.Array]:
        """Yield the uids, in lower case."""
        with open_table(self.metadata, ["uid"]) as file:
            for batch in file.iter_batches(BATCH_ROWS, ["uid"]):
                yield pc.utf8_lower(uid_texts(batch.column(0)))

    def open(self, dimension: int | None, unpacked: Path) -> Opened | BadPartition:
        """Check the file, and open it for one join; see EmbeddingFile."""
        if not self.path.exists():
            return BadPartition("no .npz beside the metadata", str(self.path), 0)
        return super().open(dimension, unpacked)

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
